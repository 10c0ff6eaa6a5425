"""Pickles written opcode by opcode, for what pickle.dumps would not write."""

import struct


def text(words):
    return b"X" + struct.pack("<I", len(words.encode())) + words.encode()


def pickled(code):
    return b"\x80\x02" + code + b"."


def doubled(n=40, first=b"]", begin=b"](", end=b"e"):
    """A tuple of n + 1 lists, each of which is two times the one before; the last has 2^n items."""
    index = lambda i: struct.pack("<I", 10**6 + i)
    code = b"(" + first + b"r" + index(0)
    for i in range(n):
        code += begin + b"j" + index(i) + b"j" + index(i) + end + b"r" + index(i + 1)
    return code + b"t"


def doubled_tuple(n=40):
    """A tuple of n + 1 tuples; a hash of the last would take 2^n steps."""
    return doubled(n, first=b")", begin=b"", end=b"\x86")
