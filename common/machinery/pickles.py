"""Pickles read as data: nothing in them is imported, called or changed.

A pickle is a program for a stack machine (Lib/pickletools.py describes every opcode) that may
import any function and call it. The machine here cannot: it is Python's own, `pickle._Unpickler`,
in which a name stays a `Name` and a call stays a `Record` of the name and its arguments. So a file
makes None, numbers, text, bytes, lists, tuples, dicts, Names and Records, and nothing else. Whoever
asked for the file picks from these what it needs, and checks it.

Opcodes are counted, and each makes at most one object: memory stays a small multiple of the file's
size. Short pickles still make lists of 2^40 items (doubled 40 times)
and tuples 100,000 deep. So nothing that a pickle made is compared, hashed, printed or walked,
except numbers and short texts.
"""
import io
import pickle
from dataclasses import dataclass

from common.machinery.foreign import Refused

MOST_OPCODES = 400_000  # EDM's CIFAR-10 checkpoints have about 40,000
LONGEST = 200  # characters of a key
PERSISTENT = "a persistent id"  # as an allowed name: the pickle may have BINPERSID
SPELLING = ("collections.OrderedDict", "builtins.set", "__builtin__.set", "_codecs.encode")
OPCODES = b"".join(getattr(pickle, name) for name in """
    PROTO FRAME STOP MARK NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT
    BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINBYTES8
    EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_SET ADDITEMS
    EMPTY_DICT SETITEM SETITEMS BINPUT LONG_BINPUT MEMOIZE BINGET LONG_BINGET
    GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID
""".split())


class Name(str):
    """What GLOBAL would import: "module.name"."""


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """What REDUCE would call and BUILD would change."""

    name: str
    args: tuple
    state: object = None


def call_of(value, name, what, at_least=0):
    """The arguments of a Record with that name; Refused for anything else: `what` it is."""
    found = value.name if type(value) is Record else type(value).__name__
    if found != name or len(value.args) < at_least:
        raise Refused(f"{what} is a {found}, not a {name}")
    return value.args


class Machine(pickle._Unpickler):
    """Reads the pickles in `data`, bytes, one after the other.

    allowed: names ("module.name") that may occur beside those of SPELLING, which spell dicts, sets
    (here: lists, or Records) and bytes. what: what is read, for messages.
    """

    def __init__(self, data, allowed, what, most=MOST_OPCODES):
        self.file, self.allowed, self.what, self.left = io.BytesIO(data), allowed, what, most
        self.encoded = {}  # id of a text -> the text, its bytes
        super().__init__(self.file)

    def load(self):
        """The value of the next pickle; `file` then stands at its end. Raises Refused."""
        self.memo = {}
        try:
            return super().load()
        except Refused:
            raise
        except Exception:  # cut short, no such mark or memo, items for a tuple
            raise Refused(f"it is damaged at byte {self.file.tell()}") from None

    @property
    def dispatch(self):
        """Where `pickle._Unpickler.load` looks up each opcode's method: in __getitem__."""
        return self

    def __getitem__(self, code):
        self.left -= 1
        if self.left < 0:
            raise Refused(f"it has more opcodes than any {self.what}")
        if code not in OPCODES:
            raise Refused(f"opcode {chr(code)!r} at byte {self.file.tell()} is in no {self.what}")
        return getattr(Machine, pickle._Unpickler.dispatch[code].__name__)

    load_empty_set = pickle._Unpickler.load_empty_list
    load_additems = pickle._Unpickler.load_appends

    def load_setitem(self):
        check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self):
        for key in self.stack[::2]:
            check_key(key)
        super().load_setitems()

    def persistent_load(self, pid):
        if PERSISTENT not in self.allowed:
            raise Refused("it refers to objects outside the file")
        return Record(PERSISTENT, (pid,))

    def find_class(self, module, name):
        text = f"{module}.{name}"
        if text not in self.allowed and text not in SPELLING:
            raise Refused(f"it asks for {text}, which no {self.what} needs")
        return Name(text)

    def load_reduce(self):
        args, name = self.stack.pop(), self.stack.pop()
        if type(name) is not Name or type(args) is not tuple:
            raise Refused("a call of what is no name")
        if name == "collections.OrderedDict" and not args:
            self.append({})
        elif name == "_codecs.encode":
            self.append(self.encode(*args))
        else:
            self.append(Record(name, args))

    load_newobj = load_reduce

    def encode(self, text, codec):
        """Bytes, as protocol 2 writes them; each text once, or a short file would fill memory."""
        if type(text) is not str or codec not in ("latin1", "latin-1"):
            raise Refused("bytes that are no text in latin1")
        if id(text) not in self.encoded:
            self.encoded[id(text)] = text, text.encode("latin1")
        return self.encoded[id(text)][1]

    def load_build(self):
        state, target = self.stack.pop(), self.stack[-1]
        if type(target) is Record and target.state is None:
            target.state = state
        elif type(target) is not dict:  # attributes of an OrderedDict: not needed
            raise Refused(f"a {type(target).__name__} that is to be changed")


def check_key(key):
    """Refused unless it is a short text or a small number, or a pair that begins with a text.

    Each is fast to hash and to compare, and nobody can make many of them with one hash.
    """
    def plain(part):
        if type(part) is str:
            return len(part) <= LONGEST
        return type(part) is int and 0 <= part < 2**31

    pair = type(key) is tuple and len(key) == 2 and type(key[0]) is str
    if not (all(map(plain, key)) if pair else plain(key)):
        raise Refused(f"a key that is a {type(key).__name__}, or too long")
