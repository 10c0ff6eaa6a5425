"""Pickles read as data: nothing in them is imported, called or changed.

A pickle is a program for a stack machine (Lib/pickletools.py describes every opcode) that may
import any function and call it. The machine here cannot: a name stays a `Name`, a call stays a
`Record` of the name and its arguments. So a file makes None, numbers, text, bytes, lists,
tuples, dicts and Records, and nothing else. Whoever asked for the file picks from these what
it needs, and checks it.

Opcodes are counted, each makes at most one object, bytes are views of the file: memory stays a
small multiple of the file's size. Short pickles still make lists of 2^40 items (doubled 40 times)
and tuples 100,000 deep. So nothing that a pickle made is compared, hashed, printed or walked,
except numbers and short texts.
"""
import os
import re
import stat
import struct
from dataclasses import dataclass

MOST_OPCODES = 400_000  # EDM's CIFAR-10 checkpoints have about 40,000
LONGEST = 200  # characters of a name or a key
PERSISTENT = "a persistent id"  # as an allowed name: the pickle may have BINPERSID

CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
EMPTY = {b"]": list, b"}": dict, b")": tuple, b"\x8f": list}  # the last: a set
TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
U1, U2, U4, U8, I4, F8 = map(struct.Struct, ("<B", "<H", "<I", "<Q", "<i", ">d"))
NUMBERS = {b"K": U1, b"M": U2, b"J": I4, b"G": F8}
TEXTS = {b"X": U4, b"\x8c": U1, b"\x8d": U8}  # opcode -> form of the length
OLD_TEXTS = {b"U": U1, b"T": U4}              # Python 2's str
BYTES = {b"B": U4, b"C": U1, b"\x8e": U8}
PUTS = {b"q": U1, b"r": U4}
GETS = {b"h": U1, b"j": U4}
SKIPPED = {b"\x80": 1, b"\x95": 8}            # protocol and frame: bytes
OPCODES = [bytes([code]) for code in range(256)]


class Refused(ValueError):
    """The file is not what was asked for; says why."""


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


def one_line(error, most=200):
    """An exception's text, of which a file may have written a part: one line, printable."""
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:most])


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
        self.data, self.at = memoryview(data), 0
        self.allowed, self.what, self.left = allowed, what, most
        self.records = []   # every Record, in the order of the file
        self.text = 0       # bytes of text so far
        self.encoded = {}   # id of a text -> the text, its bytes

    def load(self):
        """The value of the pickle that begins at `at`, which then is its end. Raises Refused."""
        self.stack, self.marks, self.memo = [], [], {}
        try:
            while (code := OPCODES[self.data[self.at]]) != b".":
                self.at += 1
                self.left -= 1
                if self.left < 0:
                    raise Refused(f"it has more opcodes than any {self.what}")
                self.step(code)
            self.at += 1
            return self.stack.pop()
        except (IndexError, KeyError, struct.error):  # empty stack, no such mark or memo, end
            raise Refused(f"it is damaged at byte {self.at}") from None

    def take(self, n):
        part = self.data[self.at : self.at + n]
        if len(part) < n:
            raise Refused("it is cut short")
        self.at += n
        return part

    def number(self, form):
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def step(self, code):
        push = self.stack.append
        if code in PUTS:
            self.memo[self.number(PUTS[code])] = self.stack[-1]
        elif code == b"\x94":
            self.memo[len(self.memo)] = self.stack[-1]
        elif code in GETS:
            push(self.memo[self.number(GETS[code])])
        elif code in TEXTS:
            push(self.decode(self.take(self.number(TEXTS[code]))))
        elif code in NUMBERS:
            push(self.number(NUMBERS[code]))
        elif code in CONSTANTS:
            push(CONSTANTS[code])
        elif code in EMPTY:
            push(EMPTY[code]())
        elif code in BYTES:
            push(self.take(self.number(BYTES[code])))
        elif code in OLD_TEXTS:
            push(str(self.take(self.number(OLD_TEXTS[code])), "latin1"))
        elif code == b"\x8a":
            push(int.from_bytes(self.take(self.number(U1)), "little", signed=True))
        elif code in SKIPPED:
            self.take(SKIPPED[code])
        elif code == b"(":
            self.marks.append(len(self.stack))
        elif code in TUPLES:
            push(tuple(self.pop(TUPLES[code])))
        elif code == b"t":
            push(tuple(self.since_mark()))
        elif code == b"a":
            self.extend(self.pop(1))
        elif code in (b"e", b"\x90"):
            self.extend(self.since_mark())
        elif code == b"s":
            self.update(self.pop(2))
        elif code == b"u":
            self.update(self.since_mark())
        elif code == b"c":
            push(self.name(self.line(), self.line()))
        elif code == b"\x93":
            push(self.name(*self.pop(2)))
        elif code in (b"R", b"\x81"):  # REDUCE, NEWOBJ
            push(self.call(*self.pop(2)))
        elif code == b"b":
            self.build(*self.pop(1))
        elif code == b"Q":
            if PERSISTENT not in self.allowed:
                raise Refused("it refers to objects outside the file")
            push(self.record(PERSISTENT, tuple(self.pop(1))))
        else:
            raise Refused(f"opcode {code!r} at byte {self.at - 1} is in no {self.what}")

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

    def decode(self, part):
        """Text takes up to four times its bytes, but no more than these if it is latin1."""
        self.text += len(part)
        if self.text > 2**20 and re.search(rb"[\xc4-\xff]", part):
            raise Refused(f"it has more text than any {self.what}")
        return str(part, "utf-8", "surrogatepass")

    def line(self):
        end = bytes(self.data[self.at : self.at + LONGEST]).find(b"\n")
        if end < 0:
            raise Refused("a name that is too long")
        return str(self.take(end + 1), "utf-8")[:-1]

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
        return self.record(name.text, args)

    def record(self, name, args):
        self.records.append(Record(name, args))
        return self.records[-1]

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


# -------------------------------------------------------------------------------- torch's tensors

STORAGES = {  # numpy has no bfloat16: two bytes of anything
    "torch.DoubleStorage": "f8", "torch.FloatStorage": "f4", "torch.HalfStorage": "f2",
    "torch.BFloat16Storage": "V2", "torch.LongStorage": "i8", "torch.IntStorage": "i4",
    "torch.ShortStorage": "i2", "torch.CharStorage": "i1", "torch.ByteStorage": "u1",
    "torch.BoolStorage": "?",
}
TENSOR = "torch._utils._rebuild_tensor_v2"


def storage_claim(record):
    """The persistent id of a storage -> numpy's code of its type, its key, its values."""
    (pid,) = call_of(record, PERSISTENT)
    if type(pid) is not tuple or len(pid) < 5 or type(pid[1]) is not Name:
        raise Refused("a storage that is none")
    kind, key, count = pid[1].text, pid[2], pid[4]
    if kind not in STORAGES or type(key) is not str or type(count) is not int or count < 0:
        raise Refused("a storage that is none")
    return STORAGES[kind], key, count


def check_view(offset, size, stride, count, dense):
    """Refused unless a tensor lies in its storage of `count` values; returns its own number.

    dense: contiguous up to the order of its axes (transposed, channels_last). No value twice.
    """
    if type(offset) is not int or not type(size) is type(stride) is tuple:
        raise Refused("a tensor that is none")
    if len(size) != len(stride) or len(size) > 8:
        raise Refused("a tensor that is none")
    if not all(type(n) is int and 0 <= n < 2**40 for n in (*size, *stride)):
        raise Refused("a tensor of impossible shape or stride")
    steps = sorted((s, n) for s, n in zip(stride, size) if n > 1)
    end, total, gaps = offset, 1, False
    for s, n in steps:
        gaps |= s != total
        end += s * (n - 1)
        total *= n
    total *= 0 not in size
    if offset < 0 or total and (end >= count or gaps and dense):
        raise Refused(f"a tensor of shape {size} and stride {stride} on {count} values")
    return total


def file_size(path):
    """Bytes of a file. Refused if it is none: opening a pipe would wait for its other end."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise Refused("it is not a file")
    return status.st_size


def read_file(path, most, begins=b""):
    """The bytes of a file from anywhere, read once: what is hashed is also what is parsed.

    Refused unless it is a regular file of 1 to `most` bytes that `begins`, an expression, matches.
    """
    try:
        with open(path, "rb", opener=_without_waiting) as file:
            size = file_size(file.fileno())
            if not 0 < size <= most:
                raise Refused(f"it has {size:,} bytes, not 1 to {most:,}")
            if not re.match(begins, file.peek(16), re.DOTALL):
                raise Refused("it begins like another kind of file")
            return file.read(size)
    except OSError as error:
        raise Refused(error.strerror) from None


def _without_waiting(path, flags):
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))  # Windows has no pipes there


mapped_file = read_file
