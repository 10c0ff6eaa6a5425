"""Files that are written whole or not at all, locks, the cache, checkpoints, downloads."""
import contextlib
import hashlib
import json
import os
import shutil
import urllib.request
import zipfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import UsageError
from common.machinery.foreign import Refused, check_weights, file_size, one_line, refusing

PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # of zips: others may ask for gigabytes
PATIENCE = 5  # seconds before it is said that one waits for a lock
BAR = {"dynamic_ncols": True, "mininterval": 0.5}  # of every progress bar


def cache_dir():
    """$FEWSTEP_CACHE or ~/.cache/fewstep: teachers, classifiers, downloads, reference moments."""
    try:
        return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep")
    except RuntimeError:  # neither HOME nor an entry in the list of users
        raise UsageError("no home folder here: set FEWSTEP_CACHE to a folder") from None


@contextlib.contextmanager
def locked(path):
    """One process at a time makes the file `path` of the cache; the others wait, then find it."""
    lock = FileLock(f"{path}.lock")
    hint = "; set FEWSTEP_CACHE to another folder"
    with refusing(f"the cache {path.parent} cannot be written", hint):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=PATIENCE)
        except Timeout:
            print(f"waiting for another process, which makes {path} (it holds {lock.lock_file})")
            lock.acquire()
    try:
        for part in path.parent.glob(f"{path.name}.*.part"):  # of a process that was killed
            part.unlink(missing_ok=True)
        yield
    finally:
        lock.release()


def atomic_write(path, write):
    """Call `write(file)` on a file beside `path`, then rename: the old file or the new, never half.

    Raises UsageError where the disk is full or the folder cannot be written.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        cause = error  # behind it stands what the operating system said
        while cause.__context__ and not isinstance(cause, OSError):
            cause = cause.__context__
        why = getattr(cause, "strerror", None) or one_line(error)
        raise UsageError(
            f"cannot write {path} ({why}); what was saved there before is kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def save_json(path, value):
    """Write `value` as indented JSON, atomically."""
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def save_checkpoint(path, kind, state):
    """Write a run's own `state` atomically, marked with its `kind` ('ld3', 'teacher', ...)."""
    atomic_write(path, lambda file: torch.save({"fewstep": kind, **state}, file))


def load_checkpoint(path):
    """Read a run's own checkpoint.pt; nothing in it is executed. Not for files of strangers.

    Raises UsageError when it is missing, cut short or something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state["fewstep"]
        return state
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch raises anything; its advice is not passed on
        raise UsageError(
            f"{path}: not a checkpoint of this project, or cut short ({type(error).__name__}); to "
            "start anew, delete it"
        ) from None


def save_weights(path, kind, weights, **about):
    """Write {name: tensor} as safetensors, atomically. For others: no pickle.

    Its metadata "fewstep" is JSON: the `kind` ('teacher', 'classifier', ...) and what `about` says.
    """
    weights = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    about = {"format": "pt", "fewstep": json.dumps({"kind": kind, **about})}
    atomic_write(path, lambda file: file.write(safetensors.torch.save(weights, about)))


def load_weights(path, kind):
    """A file of `save_weights` -> what it says about them, the weights: finite, on the CPU.

    Raises UsageError when it is missing, damaged, not ours, or of another kind.
    """
    with refusing(f"{path}: not a {kind} in safetensors"):
        file_size(path)
        with safetensors.safe_open(path, "pt") as file:  # checks sizes against the file
            about = json.loads((file.metadata() or {}).get("fewstep", "{}"))
            if about.get("kind") != kind:
                raise Refused(f"it holds a {about.get('kind')}, not a {kind}")
            weights = {name: file.get_tensor(name) for name in file.keys()}
        check_weights(weights)
        return about, weights


def download(url, path, what):
    """Fetch `url` to `path` unless it is there; return the path. A broken download leaves nothing.

    Raises UsageError saying what was wanted, from where, and where to put it by hand.
    """
    path = Path(path)

    def fetch(file):
        hint = f"; fetch it by hand and put it at {path}"
        with refusing(f"{what}: could not download {url}", hint):
            with urllib.request.urlopen(url, timeout=30) as response:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm.wrapattr(response, "read", size, desc=path.name, **BAR) as body:
                    shutil.copyfileobj(body, file)
            if file.tell() < size:
                raise Refused(f"only {file.tell()} of {size} bytes came")

    if not path.exists():
        atomic_write(path, fetch)
    return path


def weights_digest(net):
    """8 hex digits of a network's weights."""
    weights = b"".join(w.cpu().numpy().tobytes() for w in net.state_dict().values())
    return hashlib.sha256(weights).hexdigest()[:8]


def read_npz(path, names, most):
    """Arrays of numbers of an .npz, of any byte order. Raises Refused and other errors.

    A few kilobytes can unpack to any size: together the entries may say at most `most` bytes.
    """
    file_size(path)
    with np.load(path, allow_pickle=False) as file:
        entries = [file.zip.getinfo(f"{name}.npy") for name in names]
        known = all(entry.compress_type in PACKINGS for entry in entries)
        if not known or sum(entry.file_size for entry in entries) > most:
            raise Refused(f"an unknown compression, or more than {most:,} bytes of numbers")
        arrays = [file[name] for name in names]
    if any(array.dtype.kind not in "biuf" for array in arrays):
        raise Refused("no numbers")
    return arrays


def pretrained(load, option, instead):
    """load(), which imports a package or downloads weights; one line where that fails."""
    place = f"{torch.hub.get_dir()}/checkpoints"
    hint = f"; install it, put its weights into {place} by hand, or {instead}"
    with refusing(f"--{option}: cannot be loaded", hint):
        return load()
