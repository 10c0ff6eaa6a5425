"""Pickles read as data: nothing in them is imported, called or changed.

A pickle is a program for a stack machine (Lib/pickletools.py describes every opcode) that may
import any function and call it. The machine here cannot: a name stays a `Name`, a call stays a
`Record` of the name and its arguments. So a file makes None, numbers, text, bytes, lists,
tuples, dicts and Records, and nothing else. Whoever asked for the file picks from these what
it needs, and checks it.

Opcodes are counted, and each makes at most one object: memory stays a small multiple of the file's
size. Short pickles still make lists of 2^40 items (doubled 40 times)
and tuples 100,000 deep. So nothing that a pickle made is compared, hashed, printed or walked,
except numbers and short texts.
"""
import io
import pickletools
from dataclasses import dataclass

from common.machinery.foreign import Refused

MOST_OPCODES = 400_000  # EDM's CIFAR-10 checkpoints have about 40,000
LONGEST = 200  # characters of a name or a key
PERSISTENT = "a persistent id"  # as an allowed name: the pickle may have BINPERSID

CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
EMPTY = {"EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": tuple, "EMPTY_SET": list}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
VALUES = {  # numbers, texts and bytes
    "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINSTRING", "SHORT_BINSTRING",
    "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
}


@dataclass(slots=True, eq=False, repr=False)
class Name:
    """What GLOBAL would import."""

    text: str  # "module.name"


@dataclass(slots=True, eq=False, repr=False)
class Record:
    """What REDUCE would call and BUILD would change."""

    name: str
    args: tuple
    state: object = None


def call_of(value, name, at_least=0):
    """The arguments of a Record with that name; Refused for anything else."""
    fits = type(value) is Record and value.name == name and len(value.args) >= at_least
    if not fits:
        found = value.name if type(value) is Record else type(value).__name__
        raise Refused(f"a {found} in place of {name}")
    return value.args


class Machine:
    """Reads the pickles in `data`, bytes, one after the other.

    allowed: names ("module.name") that may occur beside OrderedDict, set and _codecs.encode, which
    spell dicts, sets (here: lists) and bytes. what: what is read, for messages.
    """

    def __init__(self, data, allowed, what, most=MOST_OPCODES):
        self.file, self.allowed, self.what, self.left = io.BytesIO(data), allowed, what, most
        self.encoded = {}  # id of a text -> the text, its bytes

    def load(self):
        """The value of the next pickle; `file` then stands at its end. Raises Refused."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            for opcode, argument, _ in pickletools.genops(self.file):
                self.left -= 1
                if self.left < 0:
                    raise Refused(f"it has more opcodes than any {self.what}")
                self.step(opcode.name, argument)
            return self.stack.pop()
        except Refused:
            raise
        except (IndexError, KeyError, ValueError):  # empty stack, no such mark or memo, cut short
            raise Refused(f"it is damaged at byte {self.file.tell()}") from None

    def step(self, code, argument):
        push = self.stack.append
        if code in VALUES:
            push(argument)
        elif code in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]
        elif code == "MEMOIZE":
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in ("BINGET", "LONG_BINGET"):
            push(self.memo[argument])
        elif code in CONSTANTS:
            push(CONSTANTS[code])
        elif code in EMPTY:
            push(EMPTY[code]())
        elif code == "MARK":
            self.marks.append(len(self.stack))
        elif code in TUPLES:
            push(tuple(self.pop(TUPLES[code])))
        elif code == "TUPLE":
            push(tuple(self.since_mark()))
        elif code == "APPEND":
            self.extend(self.pop(1))
        elif code in ("APPENDS", "ADDITEMS"):
            self.extend(self.since_mark())
        elif code == "SETITEM":
            self.update(self.pop(2))
        elif code == "SETITEMS":
            self.update(self.since_mark())
        elif code == "GLOBAL":
            push(self.name(*argument.split(" ", 1)))
        elif code == "STACK_GLOBAL":
            push(self.name(*self.pop(2)))
        elif code in ("REDUCE", "NEWOBJ"):
            push(self.call(*self.pop(2)))
        elif code == "BUILD":
            self.build(*self.pop(1))
        elif code == "BINPERSID":
            if PERSISTENT not in self.allowed:
                raise Refused("it refers to objects outside the file")
            push(Record(PERSISTENT, tuple(self.pop(1))))
        elif code not in ("PROTO", "FRAME", "STOP"):
            raise Refused(f"opcode {code} before byte {self.file.tell()} is in no {self.what}")

    def pop(self, n):
        start = len(self.stack) - n
        if start < (self.marks[-1] if self.marks else 0):
            raise IndexError
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def since_mark(self):
        items = self.pop(len(self.stack) - self.marks[-1])
        self.marks.pop()
        return items

    def name(self, module, name):
        if not type(module) is type(name) is str or len(module) + len(name) > LONGEST:
            raise Refused("a name that is none")
        text = f"{module}.{name}"
        spelling = ("collections.OrderedDict", "builtins.set", "__builtin__.set", "_codecs.encode")
        if text not in self.allowed and text not in spelling:
            raise Refused(f"it asks for {text}, which no {self.what} needs")
        return Name(text)

    def call(self, name, args):
        if type(name) is not Name or type(args) is not tuple:
            raise Refused("a call of what is no name")
        if name.text == "collections.OrderedDict" and not args:
            return {}
        if name.text.endswith(".set") and len(args) == 1 and type(args[0]) is list:
            return args[0]
        if name.text == "_codecs.encode" and len(args) == 2:
            return self.encode(*args)
        return Record(name.text, args)

    def encode(self, text, codec):
        """Bytes, as protocol 2 writes them; each text once, or a short file would fill memory."""
        if type(text) is not str or codec not in ("latin1", "latin-1"):
            shown = repr(codec) if type(codec) is str else type(codec).__name__
            raise Refused(f"a text in {shown}")
        if id(text) not in self.encoded:
            self.encoded[id(text)] = text, text.encode("latin1")
        return self.encoded[id(text)][1]

    def build(self, state):
        target = self.stack[-1]
        if type(target) is Record and target.state is None:
            target.state = state
        elif type(target) is not dict:  # attributes of an OrderedDict: not needed
            raise Refused(f"a {type(target).__name__} that is to be changed")

    def extend(self, items):
        if type(self.stack[-1]) is not list:
            raise Refused(f"items for a {type(self.stack[-1]).__name__}")
        self.stack[-1].extend(items)

    def update(self, items):
        target, keys, values = self.stack[-1], items[::2], items[1::2]
        if type(target) is not dict or len(keys) != len(values):
            raise Refused(f"entries for a {type(target).__name__}")
        for key, value in zip(keys, values):
            check_key(key)
            target[key] = value


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
