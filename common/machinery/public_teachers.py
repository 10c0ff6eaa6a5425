"""NVIDIA's public EDM checkpoints: found, downloaded, checked, converted once into the cache."""
import hashlib
import json
from pathlib import Path

from common import UsageError
from common.machinery.edm_pickle import MOST_BYTES, NAMES, PUBLIC, READER, read_edm_pickle
from common.machinery.files import cache_dir, download, locked, save_json, save_weights
from common.machinery.foreign import read_file, refusing


def is_public(spec):
    """Whether `spec` is a short name, a URL or the path of a .pkl."""
    return spec in NAMES or "://" in str(spec) or str(spec).endswith(".pkl")


def convert_public(spec, check):
    """Short name, URL or path of a public .pkl -> the path of a file in our own format.

    A download's size and SHA-256 are recorded beside it, and checked when it is read again.
    check(state, path) raises for weights that fit no network. A conversion in the cache is found by
    the file's digest and the reader's number. Raises UsageError.
    """
    url = f"{PUBLIC}{spec}.pkl" if spec in NAMES else spec if "://" in spec else None
    path = cache_dir() / Path(url).name if url else Path(spec)
    record = path.with_name(path.name + ".json")
    with locked(cache_dir() / path.name):
        fresh = url and not path.exists()
        if url:
            download(url, path, f"--teacher {spec}")
        with refusing(f"--teacher {path}: not a readable EDM checkpoint"):
            data = read_file(path, MOST_BYTES, b"\x80")
        found = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if fresh:
            save_json(record, found)
        elif url and record.exists() and json.loads(record.read_text()) != found:
            raise UsageError(
                f"--teacher {spec}: {path} is no longer the file that was downloaded "
                f"({record.name}); delete it"
            )
        converted = cache_dir() / f"{path.stem}-{found['sha256'][:16]}-reader{READER}.safetensors"
        if not converted.exists():
            state = read_edm_pickle(data, path)
            check(state, path)
            save_weights(converted, "teacher", **state, dataset=None)
    return converted
