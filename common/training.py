"""What a long run needs: options, device, seeds, torchrun, EMA, atomic checkpoints with exact resume, progress, metrics.json.

The order of a run is always: parse and check every option (`UsageError` -> one line, exit code 2), then `Run(...)` (device, folder,
log), then the script's own flat loop over `run.steps(...)`, then `run.metrics(results)`.
"""
import argparse
import atexit
import contextlib
import dataclasses
import http.client
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import sys
import time
import typing
import urllib.request
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm


DATASETS = ("digits", "mnist", "cifar10", "imagenet64", "folder")


class UsageError(Exception):
    """Something the user can put right: one line that names the option, its value and what would be right."""


def cli(main):
    """Run `main()` as a program: `UsageError` -> one line on stderr and exit code 2; Ctrl-C outside a training loop -> 130."""
    try:
        main()
        leave_group()
    except UsageError as error:
        print(f"{Path(sys.argv[0]).name}: error: {error}", file=sys.stderr)
        sys.exit(2)
    except torch.cuda.OutOfMemoryError as error:
        print(f"{Path(sys.argv[0]).name}: error: {str(error).splitlines()[0]} Try a smaller --eval-batch or, where there is one, "
              "--batch-per-gpu or --checkpoint", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------------------------------------------------------- options

def option(default, help, **metadata):
    """A dataclass field that is also a command-line flag; `choices=` restricts it. A default of None is filled from the presets."""
    return dataclasses.field(default=default, metadata={"help": help, **metadata})


@dataclasses.dataclass
class Options:
    """The options that mean the same in every script; its own ones, and their presets, come after these."""
    dataset: str = option("digits", "data set; decides teacher and presets", choices=DATASETS)
    data_dir: str | None = option(None, "where the data lies (default: the cache; folder and imagenet64: required)")
    seed: int = option(0, "seed of all that is drawn in training: initialization, order, noise; evaluation has its own seeds 0, 1, 2, ...")
    out: str | None = option(None, "folder of the run (default: runs/METHOD-DATASET)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1")
    resume: bool = option(False, "go on from the checkpoint in --out")
    smoke: bool = option(False, "the whole path in seconds")
    eval_n: int | None = option(None, "images for RMSE and FID, of seeds 0, 1, 2, ...")
    eval_batch: int | None = option(None, "images per batch while sampling")
    inception: str | None = option(None, "FID weights of Inception (default: the cache, else a download, else the data set's classifier)")
    reference: str | None = option(None, "moments to compare with: an .npz like EDM's, or `train`: of the training images (default: "
                                         "EDM's where Inception judges cifar10 or imagenet64, else `train`)")
    recall: bool = option(False, "also precision and recall: keeps the features of all images")


@dataclasses.dataclass
class TrainingOptions(Options):
    """Those of a script that trains a network."""
    batch_per_gpu: int | None = option(None, "images at a time: larger batches are summed up in parts (default: the whole share of a GPU)")
    checkpoint: bool = option(False, "recompute the blocks of the network in the backward pass: less memory, a third more time")
    compile: bool = option(False, "torch.compile the networks")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(message)


def _flag_type(annotation):
    """The type of one value behind an annotation such as `int`, `int | None` or `tuple[int, ...]`."""
    if arguments := [a for a in typing.get_args(annotation) if a not in (type(None), Ellipsis)]:
        return _flag_type(arguments[0])
    return annotation


def parse_config(config_class, presets, description, argv=None):
    """Command line -> `config_class(**flags)`; flags not given keep the dataclass default (or, for None, the data set's preset)."""
    epilog = "Presets (a flag given on the command line wins):\n" + "\n".join(
        f"  {dataset:11s}" + "  ".join(f"{k}={v}" for k, v in values.items()) for dataset, values in presets.items())
    parser = _Parser(description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    hints, shared = typing.get_type_hints(config_class), [field.name for field in dataclasses.fields(TrainingOptions)][2:]
    for field in sorted(dataclasses.fields(config_class), key=lambda field: field.name in shared):  # the method's own come first
        default = "by data set, see below" if field.default is None and any(field.name in p for p in presets.values()) else field.default
        kind, meta = hints[field.name], field.metadata
        said = meta["help"] if "(default" in meta["help"] else f"{meta['help']} (default: {default})"
        how = {"help": said.replace("%", "%%"), "default": argparse.SUPPRESS}
        if _flag_type(kind) is bool:
            how["action"] = "store_true" if field.default is False else argparse.BooleanOptionalAction
        else:
            how.update(type=_flag_type(kind), choices=meta.get("choices"), metavar=field.name.upper() if "choices" not in meta else None)
            if tuple in map(typing.get_origin, (kind, *typing.get_args(kind))):
                how["nargs"] = "+"
        parser.add_argument("--" + field.name.replace("_", "-"), **how)
    return config_class(**{k: tuple(v) if isinstance(v, list) else v for k, v in vars(parser.parse_args(argv)).items()})


def fill_from_presets(config, presets, smoke):
    """Give every field that is still None the value of its data set's preset; under `config.smoke` the values of `smoke` come first.

    Then check the options that all scripts have. Raises UsageError.
    """
    if config.dataset not in presets:
        raise UsageError(f"--dataset {config.dataset}: unknown, choose one of {', '.join(presets)}")
    values = {**presets[config.dataset], **(smoke if config.smoke else {})}
    for name, value in values.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    least = 4 if getattr(config, "recall", False) else 2  # every image needs 3 neighbours; a covariance needs 2
    for name, low in ("eval_n", least), ("eval_batch", 1), ("batch_per_gpu", 1):
        value = getattr(config, name, None)
        require(value is None or value >= low, name, value, f"must be at least {low}")


def require(condition, option_name, value, right):
    """Raise `UsageError` naming the option, the value and what would be right, unless `condition` holds."""
    if not condition:
        raise UsageError(f"--{option_name.replace('_', '-')} {value}: {right}")


# ------------------------------------------------------------------------------------------------------- device and randomness

def pick_device(name="auto"):
    """'auto' | 'cpu' | 'cuda[:i]' -> (torch.device, one line that says what was taken and why).

    Raises UsageError for a device this machine does not have, or that has no float64 (mps): solvers need it.
    float32 convolutions and matmuls stay float32 (no TF32), as in EDM.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = "" if name == "cuda" else "no CUDA device found, "
    else:
        why = "as asked, "
    try:
        device = torch.device(name)
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if device.index is None else device
            torch.cuda.set_device(device)
        torch.empty(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UsageError(f"--device {name}: not available here ({str(error).splitlines()[0]}); try --device cpu") from None
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        half = torch.cuda.is_bf16_supported(including_emulation=False)
        precision = "float32; networks train under bfloat16 autocast" if half else "float32: this GPU has no bfloat16"
        return device, f"device {device} ({why}{torch.cuda.get_device_name(device)}), {precision}"
    return device, f"device {device} ({why}{torch.get_num_threads()} threads), float32: bfloat16 measured slower than float32 on CPUs"


def autocast(device):
    """bfloat16 autocast where the GPU has it, nothing elsewhere."""
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def noise_from_seeds(seeds, shape, device="cpu"):
    """Unit Gaussian noise (len(seeds), *shape), float64: image k depends on seeds[k] alone, whatever the batch, the device and the rank.

    The draw itself is float32 on the CPU, one generator per image (as in EDM's generate.py). Seeds count modulo 2^32.
    """
    rows = [torch.randn(shape, generator=torch.Generator().manual_seed(int(seed))) for seed in seeds]
    return torch.stack(rows).to(device, torch.float64)


# ---------------------------------------------------------------------------------------------------------------------- torchrun

def rank_and_world(device=None):
    """(rank, number of ranks). Under torchrun the first call, which must give the device, joins the process group (nccl and gloo)."""
    if "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        return 0, 1
    if not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
        if device.type != "cuda":  # also after an error; nccl would wait for the other ranks, which may be waiting for this one
            atexit.register(leave_group)
    return dist.get_rank(), dist.get_world_size()


def leave_group():
    if dist.is_initialized():
        dist.destroy_process_group()


def share_of(n):
    """The slice of 0 ... n - 1 that is this rank's; sizes differ by at most 1, the first ranks have the larger ones."""
    rank, world = rank_and_world()
    return slice(-(-n * rank // world), -(-n * (rank + 1) // world))


def sum_over_ranks(tensor):
    """The sum of every rank's `tensor`, in place."""
    if rank_and_world()[1] > 1:
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows):
    """All ranks' rows (n_r, ...), in the order of the ranks. The n_r may differ, the rest of the shape not."""
    if rank_and_world()[1] == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros(int(max(counts)), *rows.shape[1:])
    padded[:len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(parts, padded)
    return torch.cat([part[:int(n)] for part, n in zip(parts, counts)])


def average_gradients(parameters):
    """Replace every gradient by its mean over the ranks: one all-reduce of all of them, nothing on a single rank."""
    if rank_and_world()[1] > 1:
        grads = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([g.flatten() for g in grads])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        torch._foreach_copy_(grads, [part.view_as(g) for part, g in zip(flat.split([g.numel() for g in grads]), grads)])


# ------------------------------------------------------------------------------------------------------------- large networks

def prepare(config, *networks):
    """--checkpoint and --compile for U-Nets, or modules with one as `net`: in place, names stay. Copies made later are not compiled."""
    for module in networks:
        getattr(module, "net", module).checkpoint = config.checkpoint
        if config.compile:
            module.compile()


def accumulate(loss_of, batch, at_most=None, **backward):
    """Backward through a mean over the rows of `batch`, `at_most` of them at a time; return the mean, without its graph.

    batch: tensors (B, ...) or None; loss_of(*the same for some rows) -> the mean over these. `backward`: what Tensor.backward is given.
    """
    rows, total = len(batch[0]), 0
    with _draws_of_its_own(batch[0].device):
        for start in range(0, rows, at_most or rows):
            part = [None if tensor is None else tensor[start:start + (at_most or rows)] for tensor in batch]
            loss = loss_of(*part) * (len(part[0]) / rows)
            loss.backward(**backward)
            total = total + loss.detach()
    return total


@contextlib.contextmanager
def _draws_of_its_own(device):
    """Dropout masks that differ from rank to rank; afterwards the generators are where they were, together on all ranks."""
    rank, world = rank_and_world()
    if world == 1:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(int(torch.randint(2**62, ())) + rank)
        yield


# --------------------------------------------------------------------------------------------------------------------------- EMA

@torch.no_grad()
def ema_update(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net, for every parameter, in one fused call; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers()):
        old.copy_(new)


def ema_decay(images_seen, batch_size, halflife, ramp=0.05):
    """EDM's decay per step: a half-life in images that never exceeds `ramp` of the images seen so far (0 at the start)."""
    return 0.5 ** (batch_size / max(min(halflife, images_seen * ramp), 1e-8))


# ------------------------------------------------------------------------------------------------------------------------- files

def cache_dir():
    """Where trained teachers, classifiers, downloads and reference moments are kept: $FEWSTEP_CACHE or ~/.cache/fewstep."""
    return Path(os.environ.get("FEWSTEP_CACHE") or Path.home() / ".cache" / "fewstep")


def atomic_write(path, write):
    """Call `write(file)` on a temporary file beside `path`, then rename: a crash leaves the old file or the new one, never half."""
    path = Path(path)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if not isinstance(error, (OSError, RuntimeError)):  # torch.save turns a full disk into a RuntimeError
            raise
        said = error  # behind an error of torch.save stands what the operating system said
        while said.__context__ and not isinstance(said, OSError):
            said = said.__context__
        why = said.strerror if isinstance(said, OSError) and said.strerror else str(error).splitlines()[0]
        raise UsageError(f"cannot write {path} ({why}); what was saved there before is kept") from error


def save_json(path, value):
    """Write `value` as indented JSON, atomically."""
    atomic_write(path, lambda file: file.write((json.dumps(value, indent=1) + "\n").encode()))


def load_checkpoint(path):
    """Read a checkpoint written by this project, tensors and plain values only (nothing in it is executed).

    Raises UsageError when the file is missing, unreadable, or not ours.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UsageError(f"{path}: no such checkpoint") from None
    except Exception as error:  # torch.load raises anything from EOFError to UnpicklingError on a foreign file
        raise UsageError(f"{path}: not a checkpoint of this project ({type(error).__name__})") from None
    if not isinstance(state, dict) or "fewstep" not in state:
        raise UsageError(f"{path}: not a checkpoint of this project (no 'fewstep' entry)")
    return state


def save_checkpoint(path, kind, state):
    """Write `state` atomically, marked with its `kind` ('teacher', 'classifier', 'ld3', ...)."""
    atomic_write(path, lambda file: torch.save({"fewstep": kind, **state}, file))


def download(url, path, what):
    """Fetch `url` to `path` unless it is there already; return the path. Nothing is left there of a download that breaks off.

    Raises UsageError saying what was wanted, from where, and where to put it by hand.
    """
    path = Path(path)

    def chunks():
        try:
            with urllib.request.urlopen(url, timeout=30) as response:
                size = int(response.headers.get("Content-Length") or 0)
                with tqdm(total=size, desc=path.name, unit="B", unit_scale=True, dynamic_ncols=True, mininterval=0.5) as bar:
                    while chunk := response.read(2**20):
                        yield chunk
                        bar.update(len(chunk))
                    if bar.n < size:
                        raise ValueError(f"only {bar.n} of {size} bytes came")
        except (OSError, ValueError, http.client.HTTPException) as error:  # no connection, no such address, cut off half way
            raise UsageError(f"{what}: could not download {url} ({error}); fetch it by hand and put it at {path}") from None

    if not path.exists():
        atomic_write(path, lambda file: file.writelines(chunks()))
    return path


# --------------------------------------------------------------------------------------------------------------------------- run

class Run:
    """One run in one folder: device, log, checkpoints that resume exactly, progress, metrics.

    `config` is the script's dataclass; it needs `dataset seed device out resume`. Raises UsageError when the folder cannot be
    written, when --resume finds no checkpoint, or when the checkpoint was made with other options.
    """

    # Options that may differ between a run and its continuation: where it is, how its memory is used, how its results are measured.
    HOW = ("out", "resume", "device", "data_dir", "batch_per_gpu", "checkpoint", "compile", "eval_n", "eval_batch", "inception",
           "reference", "recall")

    def __init__(self, method, config, checkpoint_seconds=60):
        self.method, self.config, self.checkpoint_seconds = method, config, checkpoint_seconds
        self.out = Path(config.out or f"runs/{method}-{config.dataset}")
        self.device, why = pick_device(config.device)
        self.rank, self.world = rank_and_world(self.device)
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            with open(self.out / "log.jsonl", "a"):
                pass
        except OSError as error:
            raise UsageError(f"--out {self.out}: cannot be written ({error.strerror}); choose another folder") from None
        self.restored = self._restored() if config.resume else None
        self.log_mode = "a" if config.resume else "w"  # a new run's first line replaces an old log, not sooner
        self.earlier_seconds = self.restored["seconds"] if self.restored else 0.0
        for part in self.out.glob("*.part"):  # left by a run that was killed, under the names that we give
            if re.fullmatch(r".+\.(pt|json|png)\.\d+\.part|states-\w+\.part", part.name):
                shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        self.wait()  # no rank may write a new checkpoint while another still reads the old one
        torch.manual_seed(config.seed)  # all draws come from the global generators; ranks share them and take their rows
        self.start = time.perf_counter()
        self.say(f"{method} on {config.dataset}: {why}, seed {config.seed}, out {self.out}")

    def _options(self):
        return {k: v for k, v in dataclasses.asdict(self.config).items() if k not in self.HOW}

    def _restored(self):
        state = load_checkpoint(self.out / "checkpoint.pt")
        if state["fewstep"] != self.method:
            raise UsageError(f"--resume: {self.out / 'checkpoint.pt'} belongs to {state['fewstep']}, not to {self.method}")
        for name, value in self._options().items():
            if state["config"].get(name) != value:
                raise UsageError(f"--{name.replace('_', '-')} {value}: the checkpoint to resume has {state['config'].get(name)}")
        return state

    def wait(self):
        """Until all ranks are here; then they see each other's files, if --out is a folder that they share."""
        self._agree()

    def say(self, line):
        """Print on rank 0, above any progress bar."""
        if self.rank == 0:
            tqdm.write(line, file=sys.stdout)

    def rows(self, batch_size):
        """(n, which): how many rows of a batch drawn for all are this rank's own, and which. UsageError if it cannot be shared."""
        require(batch_size % self.world == 0, "batch_size", batch_size, f"must be a multiple of the {self.world} ranks")
        return batch_size // self.world, share_of(batch_size)

    def seconds(self):
        return self.earlier_seconds + time.perf_counter() - self.start

    def save(self, step, parts):
        """Write checkpoint.pt (rank 0): `step` steps are done; the state of every part, of the random generators, and the options."""
        if self.rank == 0:
            rng = {"cpu": torch.get_rng_state(), **({"cuda": torch.cuda.get_rng_state()} if self.device.type == "cuda" else {})}
            save_checkpoint(self.out / "checkpoint.pt", self.method,
                            {"config": self._options(), "seconds": self.seconds(), "step": step, "rng": rng,
                             "parts": {name: part.state_dict() for name, part in parts.items()}})

    def restore(self, parts):
        """The number of steps already done. Under --resume every part and the random generators get back their saved state."""
        if not self.restored:
            return 0
        saved = self.restored.pop("parts")  # not to be kept in memory
        for name, part in parts.items():
            part.load_state_dict(saved[name])
        torch.set_rng_state(self.restored["rng"]["cpu"])
        if "cuda" in self.restored["rng"] and self.device.type == "cuda":
            torch.cuda.set_rng_state(self.restored["rng"]["cuda"])
        return self.restored["step"]

    def log(self, **values):
        """Append one line to log.jsonl (rank 0)."""
        if self.rank == 0:
            try:
                with open(self.out / "log.jsonl", self.log_mode) as file:
                    self.log_mode = "a"
                    file.write(json.dumps({"seconds": round(self.seconds(), 3), **values}) + "\n")
            except OSError as error:
                raise UsageError(f"cannot write {self.out / 'log.jsonl'} ({error.strerror}); the last checkpoint is kept") from None

    def steps(self, first, last, parts, what="training"):
        """Yield first, ..., last - 1 behind a progress bar; `run.loss` (a tensor, set in the loop) is shown about once a second.

        Between steps it saves `parts` (name -> anything with a state_dict) every `checkpoint_seconds` (less often if that would take more
        than a twentieth of the time), and at the end. SIGINT or SIGTERM lets the step finish, saves and exits with code 130; whichever
        rank gets it, all stop after the same step. A loss (the mean over the ranks) that is not finite stops the run. The loss is read
        only when shown, so the device never waits.
        """
        stop = []
        handlers = {s: signal.signal(s, lambda number, frame: stop.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        bar = tqdm(total=last, initial=first, desc=what, disable=self.rank > 0, dynamic_ncols=True, mininterval=0.5, file=sys.stderr)
        self.loss, shown, saved, cost = None, time.perf_counter(), time.perf_counter(), 0
        try:
            for step in range(first, last):
                yield step
                bar.update()
                now = time.perf_counter()
                pause = self.checkpoint_seconds and max(self.checkpoint_seconds, 20 * cost)
                due = self.rank == 0 and now - saved > pause or step == last - 1
                stopping, due, looking = self._agree(bool(stop), due, now - shown > 1 or step == first)
                due |= stopping
                if self.loss is not None and (due or looking):  # looked at before every save
                    loss, shown = sum_over_ranks(self.loss.detach().to(torch.float64, copy=True)).item() / self.world, now
                    bar.set_postfix(loss=f"{loss:.4g}", refresh=False)
                    self.log(step=step, what=what, loss=loss)
                    if not math.isfinite(loss):
                        raise UsageError(f"{what}: the loss is {loss} at step {step}; the last checkpoint is kept, try a smaller --lr")
                if due:
                    self.save(step + 1, parts)
                    saved = time.perf_counter()
                    cost = saved - now
                if stopping:
                    self.say(f"\nstopped after step {step + 1} of {last}; the same command with --resume goes on from here")
                    sys.exit(130)
            self.wait()  # for the last checkpoint, and for what rank 0 wrote in the loop
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _agree(self, *flags):
        """Each flag as soon as any rank has it. The ranks wait for each other here, but not for their GPUs."""
        if self.world == 1:
            return flags
        together = torch.tensor([0, *flags], dtype=torch.int32)  # on the CPU: by gloo
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together[1:].bool().tolist()

    def metrics(self, results, teacher, **more):
        """Write metrics.json: what was run, on what, for how long, and the rows of `results`."""
        cuda = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated() / 2**20 if cuda else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        name = torch.cuda.get_device_name() if cuda else f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
        if self.rank == 0:
            save_json(self.out / "metrics.json", {
                "method": self.method, "dataset": self.config.dataset, "teacher": teacher, "seed": self.config.seed,
                "device": f"{self.device} ({name})", "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                                                  "numpy": np.__version__},
                "config": dataclasses.asdict(self.config), "seconds": round(self.seconds(), 2), "peak_memory_mb": round(peak, 1),
                "results": results, **more})


SCORES = ("fid", "fid_unseen", "inception_score", "precision", "recall")  # what common.fid can give


def table(results, columns):
    """Rows of `results` as aligned text; a FID column is headed by its n and feature space, a cell that was not run reads 'not run'.

    A column that no row has is left out.
    """
    columns, heads = [c for c in columns if any(r.get(c) is not None for r in results)], []
    for column in columns:
        first = next((r for r in results if r.get(column) is not None), {})
        space = first.get("precision_recall_features" if column in ("precision", "recall") else f"{column}_features")
        heads.append(f"{column} [{space}, n={first['fid_n']}]" if space else column)
    cells = [["not run" if r.get(c) is None else f"{r[c]:.4g}" if isinstance(r[c], float) else str(r[c]) for c in columns] for r in results]
    widths = [max(len(row[i]) for row in [heads, *cells]) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths)))
                     for row in [heads, *cells])
