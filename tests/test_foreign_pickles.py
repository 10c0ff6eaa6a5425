"""Public checkpoints from strangers: refused in one line, soon and in little memory.

Every hostile file is made here. Each is read in a process of its own (tests/guarded.py), where a
crash, a hang or a bomb shows.
"""

import collections
import functools
import io
import os
import pickle
import pickletools
import random
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from edm_files import (
    Opaque, Persistent, Storage, dump, edm_object, saved, small, tensor_of, vector_of, with_weight,
)
from guarded import MEASURED, guarded, one_line_refusal, read, write
from opcodes import doubled, doubled_tuple, pickled, text

from common import UsageError, unet
from common.diffusion import Denoiser
from common.machinery import edm_pickle, pickles, public_teachers

ROOT = Path(__file__).parent.parent
pytestmark = [MEASURED, pytest.mark.usefixtures("cache")]


# ------------------------------------------------------------------------- pickles by the opcode

HERE = "@@HERE@@"


def body(value):
    """A value's opcodes in protocol 2, which can stand one after the other."""
    return dump(value, 2)[2:-1]


def edm(arch="ddpmpp", **more):
    """A genuine checkpoint of a very small network."""
    sizes = {"resolution": 8, "channel_mult": [1], "attn_resolutions": [], **more}
    return edm_object(arch, **sizes)[0]


@functools.cache
def genuine():
    return body(edm())


def beside(code, key=None):
    """A genuine checkpoint with one more entry, made by these opcodes."""
    return pickled(genuine() + (key or text("more")) + code + b"s")


def planted(code, place):
    """A checkpoint with these opcodes where place(value) has put the text HERE."""
    value = edm()
    place(value)
    data = dump(value, 2)
    assert data.count(text(HERE)) == 1
    return data.replace(text(HERE), code)


def network(value):
    return value["ema"]._modules["model"]


def claim(name, claimed, **more):
    """A checkpoint with another constructor's argument."""
    value = edm(**more)
    network(value)._init_kwargs[name] = claimed
    return dump(value)


def planted_claim(name, code):
    return planted(code, lambda value: network(value)._init_kwargs.update({name: HERE}))


def in_a_storage(code):
    """A weight whose storage's bytes hold these opcodes where a storage should be."""
    head = saved(torch.zeros(4))
    start = head.index(b"\x80\x02(X\x07\x00\x00\x00storage")
    end = head.index(b"Q.", start) + 2
    return Storage(head[:start] + pickled(code) + head[end:])


def patched_storage(attributes):
    """BUILD on what a storage's bytes gave: on a class, if they hold one."""
    reduced = in_a_storage(b"ctorch\nTensor\n").__reduce__()
    storage = Opaque((*reduced, attributes))
    return dump(with_weight(tensor_of(storage, 0, (4,), (1,))), 2)


def shared_modules(levels=19, width=20):
    module = Persistent("Linear")
    for _ in range(levels):
        above = Persistent("Linear")
        above._modules = {str(i): module for i in range(width)}
        module = above
    value = edm()
    network(value)._modules["enc"] = module
    return dump(value)


def shared_storage(times=4000, values=2**18):
    """A file of 2 MB, 4 GB of weights."""
    value = edm()
    storage = Storage(saved(torch.zeros(values)))
    function, (data,) = storage.__reduce__()
    layer = Persistent("Linear")
    for i in range(times):
        layer._parameters[str(i)] = tensor_of(Opaque((function, (data,))), 0, (values,), (1,))
    network(value)._modules["enc"] = layer
    return dump(value)


def weight_of(size, stride, values=4, offset=0):
    return dump(with_weight(tensor_of(Storage(saved(torch.zeros(values))), offset, size, stride)))


def baseline(kind):
    value = edm()
    value["ema"]._class_name = kind
    return dump(value)


def one_hash():
    keys = (k * (2**61 - 1) for k in range(150_000))
    entries = b"".join(b"\x8a\x0a" + k.to_bytes(10, "little") + b"N" for k in keys)
    return b"}(" + entries + b"u"


def storage_with(old, new):
    data = saved(torch.zeros(4))
    assert data.count(old) >= 1
    return dump(with_weight(vector_of(data.replace(old, new))))


def weight_like(change):
    """The genuine checkpoint with one weight changed in place."""
    value = edm()
    weight = network(value)._modules["map_layer0"]._parameters["weight"]
    with torch.no_grad():
        change(weight)
    return dump(value)


LOOP = (  # a module whose child is itself
    b"ctorch.nn.modules.container\nModuleDict\n)\x81r\x00\x00\x10\x00}"
    + text("_parameters") + b"}s" + text("_buffers") + b"}s" + text("_modules")
    + b"}" + text("again") + b"j\x00\x00\x10\x00ssb"
)
INSIDE = (  # of a module's opcodes what stands before its only child; behind it: ssb
    b"ctorch.nn.modules.container\nModuleDict\n)\x81}" + text("_parameters") + b"}s"
    + text("_buffers") + b"}s" + text("_modules") + b"}" + text("a")
)
MANY = b"]" * 500_000

TABLE = {  # the cases of issue 13: how the file is made, what its refusal says
    "a class in a storage, patched": (lambda: patched_storage({"hacked": 1}), "torch.Tensor"),
    "a function in a storage": (
        lambda: dump(with_weight(tensor_of(in_a_storage(b"cos\nsystem\n"), 0, (4,), (1,)))),
        "os.system",
    ),
    "BUILD on encode": (lambda: beside(b"c_codecs\nencode\n}b"), "a Name that is to be changed"),
    "one storage 4,000 times": (shared_storage, "larger than the file"),
    "bytearray(2^31) in a storage": (
        lambda: dump(with_weight(vector_of(b"\x80\x02c__builtin__\nbytearray\nJ\xff\xff\xff\x7f"
                                           b"\x85R."))),
        "bytearray",
    ),
    "stride 0 in a storage": (
        lambda: dump(with_weight(vector_of(
            pickled(b"ctorch._utils\n_rebuild_tensor_v2\n)R")))),
        "_rebuild_tensor_v2",
    ),
    "stride 0": (lambda: weight_of((2**14, 2**14), (0, 0)), "larger than the file"),
    "num_blocks 10^7": (lambda: claim("num_blocks", 10**7), "num_blocks is 10000000"),
    "__setstate__ of a tensor": (
        lambda: dump(with_weight(Opaque((*tensor_of(
            small, 0, (4,), (1,)).reduced, (10**10,))))),
        "map_layer0.weight",
    ),
    "a doubled list as class": (
        lambda: planted(doubled(), lambda v: setattr(v["ema"], "_class_name", HERE)),
        "a class name is a tuple",
    ),
    "a doubled tuple as key": (
        lambda: beside(b"N", key=doubled_tuple()), "a key that is a tuple",
    ),
    "keys of one hash": (lambda: beside(one_hash()), "a key that is a int"),
    "modules shared 20 x 19": (shared_modules, "in more than one place"),
    "a tuple 3 million deep": (
        lambda: beside(b"N", key=b")" + b"\x85" * 3_000_000), "more opcodes",
    ),
    "a tuple 300,000 deep": (
        lambda: beside(b"N", key=b")" + b"\x85" * 300_000), "a key that is a tuple",
    ),
    "a VP baseline": (lambda: baseline("VPPrecond"), "a 'VPPrecond'; those with EDMPrecond"),
    "torch's advice": (
        lambda: dump(with_weight(vector_of(pickle.dumps(print, 2)))), "__builtin__.print",
    ),
}
MORE = {
    "a doubled list as argument": (
        lambda: planted_claim("num_blocks", doubled()), "num_blocks is a tuple"),
    "two doubled lists as channels": (
        lambda: planted_claim("in_channels", doubled()), "in_channels is a tuple"),
    "a doubled list as embedding": (
        lambda: planted_claim("embedding_type", doubled()), "embedding_type is a tuple"),
    "a doubled list as sigma_data": (
        lambda: planted(doubled(), lambda v: setattr(v["ema"], "sigma_data", HERE)), "sigma_data"),
    "300,000 resolutions": (
        lambda: planted_claim("attn_resolutions", b"](" + b"K\x08" * 300_000 + b"e"),
        "attn_resolutions is a list"),
    "opcodes without end": (lambda: beside(MANY), "more opcodes"),
    "an endless name": (lambda: pickled(b"c" + b"x" * 10**6 + b"\n\n"), "it asks for xxx"),
    "2 MiB of wide text": (
        lambda: beside(text("\U0001f600" + "x" * 2**21)), None),
    "one text encoded 4,000 times": (  # harmless: it is encoded once
        lambda: beside(b"(" + text("x" * 2**20) + b"r\x00\x00\x00\x01" + 4000 * (
            b"c_codecs\nencode\nj\x00\x00\x00\x01" + text("latin1") + b"\x86R") + b"t"), None),
    "a doubled tuple in a set": (lambda: beside(b"\x8f(" + doubled_tuple() + b"\x90"), None),
    "a memo of 2^28": (lambda: beside(b"Nr\x00\x00\x00\x10"), None),
    "a list 190,000 deep": (lambda: beside(b"]" * 190_000 + b"a" * 189_999), None),
    "records 300,000 deep": (
        lambda: beside(300_000 * b"ctorch.nn.modules.container\nModuleDict\n" + b")"
                       + 300_000 * b"\x81\x85"), "more opcodes"),
    "records 90,000 deep": (
        lambda: beside(90_000 * b"ctorch.nn.modules.container\nModuleDict\n" + b")"
                       + 90_000 * b"\x81\x85"), None),
    "a magic number": (lambda: storage_with(b"\x6c\xfc\x9c\x46", b"\x6c\xfc\x9c\x47"), "old form"),
    "big-endian": (lambda: storage_with(b"little_endian\x71\x02\x88", b"little_endian\x71\x02\x89"),
                   "old format"),
    "more values than bytes": (
        lambda: dump(with_weight(vector_of(saved(torch.zeros(4)) + b"more"))), "20 bytes"),
    "bfloat16": (
        lambda: dump(with_weight(vector_of(saved(torch.zeros(4, dtype=torch.bfloat16))))),
        "BFloat16Storage"),
    "a NaN weight": (lambda: weight_like(lambda w: w[0, 0].fill_(np.nan)), "map_layer0.weight has"),
    "a shape of 10^5 axes": (lambda: weight_of((1,) * 10**5, (1,) * 10**5), "impossible shape"),
    "a shape of 10^300": (lambda: weight_of((10**300,), (1,)), "impossible shape"),
    "a negative shape": (lambda: weight_of((-1, -4), (4, 1)), "impossible shape"),
    "a negative stride": (lambda: weight_of((4,), (-1,), offset=3), "impossible shape"),
    "a view beyond its storage": (lambda: weight_of((4,), (1,), offset=2), "on 4 values"),
    "more axes than strides": (lambda: weight_of((2, 2), (1,)), "stride (1,)"),
    "overlapping rows": (lambda: weight_of((3, 2), (1, 1)), "do not fit"),
    "rows with gaps": (lambda: weight_of((2, 2), (3, 1), 8), "do not fit"),
    "a module within itself": (
        lambda: planted(LOOP, lambda v: network(v)._modules.update(enc=HERE)),
        "enc.again is a module in more than one place"),
    "2,000 modules deep": (
        lambda: planted(2000 * INSIDE + b"N" + 2000 * b"ssb",
                        lambda v: network(v)._modules.update(enc=HERE)), "recursion"),
    "12,000 empty weights": (
        lambda: planted(
            b"}(" + b"".join(text(str(i)) + b"N" for i in range(12_000)) + b"u",
            lambda v: setattr(network(v), "_buffers", HERE)), "too many weights"),
    "changed twice": (
        lambda: beside(b"ctorch.nn.modules.container\nModuleDict\n)\x81}b}b"), "Record that is to"),
    "an entry of a record": (
        lambda: beside(b"ctorch.nn.modules.container\nModuleDict\n)\x81" + text("a") + b"Ns"),
        "damaged at byte"),
    "an item for a tuple": (lambda: beside(b")Na"), "damaged at byte"),
    "a call of a text": (lambda: beside(text("os.system") + b")R"), "a call of what is no name"),
    "a call of a dict's method": (lambda: beside(b"c__builtin__\ndict.update\n)R"), "dict.update"),
    "a new os.system": (lambda: beside(b"cos\nsystem\n)\x81"), "os.system"),
    "opcode INST": (lambda: beside(b"(ios\nsystem\n"), "is in no EDM checkpoint"),
    "opcode OBJ": (lambda: beside(b"(NNo"), "is in no EDM checkpoint"),
    "opcode EXT1": (lambda: beside(b"\x82\x01"), "is in no EDM checkpoint"),
    "opcode NEXT_BUFFER": (lambda: beside(b"\x97"), "is in no EDM checkpoint"),
    "a stack that is empty": (lambda: pickled(b"\x87"), "damaged at byte"),
    "no mark": (lambda: pickled(b"Ne"), "damaged at byte"),
    "below the mark": (lambda: pickled(b"N(\x85"), "damaged at byte"),
    "no such memo": (lambda: pickled(b"j\xff\xff\xff\xff"), "damaged at byte"),
    "a text of 4 GB": (lambda: pickled(b"X\xff\xff\xff\xff"), "damaged at"),
    "bytes of 2^63": (lambda: b"\x80\x04\x8e" + b"\xff" * 8 + b".", "damaged at"),
    "a numpy object": (
        lambda: planted(
            b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n" + text("O8")
            + b"\x85R(K\x03" + text("<") + b"tb" + text("x") + b"tR",
            lambda v: setattr(v["ema"], "sigma_data", HERE)), "sigma_data is no number"),
    "an escape sequence": (lambda: baseline("\x1b[2J\n\x07" + "x" * 1000), "[2J"),
    "an escape sequence as name": (lambda: beside(b"cos\x1b[2J\nsystem\n"), "os?[2J.system"),
    "zeros": (lambda: bytes(10**6), "edm.pkl"),
}


SLOW = (
    "records 300,000 deep", "records 90,000 deep", "a list 190,000 deep",
    "opcodes without end", "a shape of 10^5 axes", "300,000 resolutions",
)
CASES = [*TABLE, *(pytest.param(c, marks=pytest.mark.slow) if c in SLOW else c for c in MORE)]


@pytest.mark.parametrize("case", CASES)
def test_a_hostile_pickle_is_refused(case, tmp_path, cache):
    make, said = {**TABLE, **MORE}[case]
    path = write(tmp_path, make())
    if said is None:
        found = guarded(lambda: read(path))
        assert not found.error and found.mib < 300, found
    else:
        one_line_refusal(lambda: read(path), said, path)
        assert not list(cache.glob("*.safetensors"))


@pytest.mark.slow
def test_a_program_ends_with_one_line_and_2(tmp_path):
    path = write(tmp_path, claim("num_blocks", 10**7))
    command = [sys.executable, "ld3.py", "--smoke", "--teacher", path, "--out", str(tmp_path / "o")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    line = done.stderr.splitlines()[-1]
    assert line.startswith("ld3.py: error: --teacher") and "num_blocks is 10000000" in line
    assert "Traceback" not in done.stderr


def test_files_that_are_none(tmp_path):
    os.mkfifo(tmp_path / "pipe.pkl")
    (tmp_path / "folder.pkl").mkdir()
    (tmp_path / "empty.pkl").touch()
    with open(tmp_path / "sparse.pkl", "wb") as file:
        file.truncate(10**11)
    for name, said in (
        ("pipe", "not a file"),
        ("folder", "not a file"),
        ("empty", "0 bytes"),
        ("sparse", "100,000,000,000 bytes"),
        ("none", "No such file"),
    ):
        one_line_refusal(lambda: read(str(tmp_path / f"{name}.pkl")), said)  # noqa: B023


def test_a_genuine_pickle_prints_nothing(tmp_path):
    """torch warned of its deprecated storages."""
    found = guarded(lambda: read(write(tmp_path, dump(edm()))))
    assert (found.error, found.printed) == ("", "")


def test_nothing_of_a_hostile_storage_is_kept_for_torch(tmp_path):
    path = write(tmp_path, patched_storage({"hacked": 1}))
    before = attributes()
    with pytest.raises(UsageError):
        read(path)
    assert attributes() == before and not hasattr(torch.Tensor, "hacked")


def test_a_mended_reader_converts_again(tmp_path, cache, monkeypatch):
    path = write(tmp_path, dump(edm()))
    read(path)
    (old,) = cache.glob("*.safetensors")
    monkeypatch.setattr(public_teachers, "READER", edm_pickle.READER + 1)
    read(path)
    assert len(list(cache.glob("*.safetensors"))) == 2 and old.exists()


# ------------------------------------------------------------------------------------- a fuzz run


def attributes():
    """What could be changed of torch, of Python and of the reader."""
    classes = [
        torch.Tensor, torch.nn.Module, torch.nn.Parameter, torch.nn.ModuleDict, torch.Size,
        torch.storage.TypedStorage, torch.storage.UntypedStorage, torch.FloatStorage,
        collections.OrderedDict, pickles.Machine, pickles.Record, pickles.Name, Denoiser, unet.UNet,
    ]
    modules = [
        torch, torch.storage, torch._utils, torch.serialization, torch.nn, np, os, io, sys, pickle,
        __import__("builtins"), __import__("codecs"), __import__("copyreg"), pickles, edm_pickle,
    ]
    found = {}
    for place in (*classes, *modules):
        for name, value in vars(place).items():
            found[place.__name__, name] = id(value)
            if isinstance(value, types.FunctionType):
                found[place.__name__, name, "defaults"] = repr(value.__defaults__)[:200]
    return found


def mutated(data, starts, rng):
    """A copy cut, flipped, with swapped opcodes or with a fragment spliced in."""
    data, kind = bytearray(data), rng.randrange(5)
    at = rng.choice(starts)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        for _ in range(rng.choice((1, 8))):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == 2:
        data[at] = rng.choice(b"().NRbcehjlostu]}\x81\x85\x86\x87\x90\x93\x94\x8f0123Q")
    elif kind == 3:
        other = rng.choice(starts)
        data[at], data[other] = data[other], data[at]
    else:
        begin, end = sorted(rng.choices(range(len(starts)), k=2))
        fragment = data[starts[begin] : starts[min(end, begin + 50)]]
        data[at : at + rng.choice((0, len(fragment)))] = fragment
    return data


def fuzz(tmp_path, count, seed):
    """Reads `count` mutations; says how many were refused. Raises for anything but a refusal."""
    data = dump(edm())
    starts = [at for _, _, at in pickletools.genops(data)]
    rng, refused, before = random.Random(seed), 0, attributes()
    path = tmp_path / "edm.pkl"
    for _ in range(count):
        path.write_bytes(mutated(data, starts, rng))
        try:
            read(str(path))
        except UsageError as error:
            assert str(error).isprintable() and len(str(error)) < 700
            refused += 1
    assert attributes() == before
    raise UsageError(f"{refused} of {count} refused")


@pytest.mark.parametrize("count", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_mutations_of_a_genuine_pickle(count, tmp_path):
    found = guarded(lambda: fuzz(tmp_path, count, seed=count), seconds=600)
    assert found.error == "UsageError" and found.text.endswith(f"of {count} refused"), found
    assert int(found.text.split()[0]) > 0.5 * count
    assert found.mib < 200 and not found.printed, found
