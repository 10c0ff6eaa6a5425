"""One run in one folder: device, random numbers, progress, exact resume, metrics.json.

    run = Run("ld3", config)                      # device, folder, log
    run.resume(net=net, optimizer=optimizer)      # what a checkpoint holds; with --resume: read it
    for step in run.steps(1000):                  # progress bar, checkpoints, Ctrl-C
        noise = run.randn(config.batch_size, 3, 32, 32)       # this rank's share of the batch
        run.loss = run.backward(optimizer, loss_fn, x0, noise)  # gradients of the global batch
        optimizer.step()
    run.finish(rows)                              # metrics.json and the table
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from tqdm import tqdm

from common import UsageError
from common.machinery.files import BAR, load_checkpoint, save_checkpoint, save_json
from common.machinery.foreign import refusing
from common.machinery.options import DATASETS, cli, print_no_more
from common.machinery.ranks import (
    average_gradients, masks_of_this_rank, rank_and_world, share_of, sum_over_ranks,
)
from common.precision import autocast, chosen_precision

METRICS = ("fid", "kid", "fid_unseen", "fd", "inception_score", "precision", "recall")
SHARED = {  # metrics whose feature space is kept under another's name
    "kid": "fid", "precision": "precision_recall", "recall": "precision_recall",
}
EXPLAINED = {  # how names in a table begin that a paper does not explain
    "ddim-edm": "DDIM on EDM's time grid; ddim: on the students' own",
    "d-": "d-X is the solver X with the learned lambdas",
    "ab2": "Adams-Bashforth of order 2 on the same grid, which is iPNDM of order 2",
    "dpmpp2m": "DPM-Solver++(2M) on the same grid",
    "rectified-flow": "the same network without the catch-up loss, as many iterations",
    "rectified-flow-equal-compute": "the same, trained until it has cost as much as cud",
    "cud-1step": "cud, distilled into one step",
    "fid_unseen": "FID in the features of a second classifier, which no loss has seen",
    "teacher": "sampled by UniPC of order 3 in ld3.py, by Heun's method elsewhere",
}


def pick_device(name="auto"):
    """'auto' | 'cpu' | 'cuda[:i]' -> (torch.device, one line that says what was taken and why).

    float32 convolutions and matmuls stay float32 (no TF32), as in EDM. Raises UsageError for a
    device that is not there, or that has no float64 (mps): solvers need it.
    """
    why = "as asked, "
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        why = "" if name == "cuda" else "no CUDA device found, "
    with refusing(f"--device {name}: not available here", "; try --device cpu"):
        device = torch.device(name)
        if device.type == "cuda":
            if device.index is None:
                device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(device)
        torch.empty(1, device=device, dtype=torch.float64)
    if device.type != "cuda":
        processor = platform.processor() or platform.machine()
        return device, f"device {device} ({why}{processor}, {torch.get_num_threads()} threads)"
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return device, f"device {device} ({why}{torch.cuda.get_device_name(device)})"


def name_of_data(config):
    """The data set's name; for a folder of images its own, as in `runs/ld3-cats`."""
    if config.dataset != "folder" or not config.data_dir:
        return config.dataset
    name = Path(config.data_dir).resolve().name.removesuffix(".zip")
    return f"folder-{name}" if name in DATASETS else name


class Run:
    """One run of a script. `config` needs `dataset data_dir seed device out resume smoke`.

    Raises UsageError when the folder cannot be written or another process runs there, when --resume
    finds no checkpoint, or one that was made with other options; and when a new run would replace
    an unfinished one. A script's run is unfinished until its metrics.json is written.
    """

    # Options that a continued run may change: where it is, its memory, how results are measured.
    MAY_CHANGE = (
        "out", "resume", "device", "data_dir", "batch_per_gpu", "checkpoint", "compile",
        "eval_n", "eval_batch", "inception", "reference", "recall", "sampler", "fd", "save_images",
    )

    def __init__(self, method, config, checkpoint_seconds=60):
        self.method, self.config = method, config
        self.checkpoint_seconds = checkpoint_seconds
        self.out = Path(config.out) if config.out else self._default_folder()
        self.device, self.about_device = pick_device(config.device)
        self.rank, self.world = rank_and_world(self.device)
        self.loss = None  # set in the training loop: a tensor, or {name: tensor}
        self.parts, self.done, self.planned = {}, 0, 0  # steps done, and planned by `steps` so far
        self.calls = 0  # of `backward` in this step
        self.references = {}  # see `common.fid.measure`
        self._enter()
        self.restored = self._checkpoint() if config.resume else self._nothing_is_lost()
        self.bf16 = self.restored and self.restored.get("bf16")  # chosen in `backward`
        self.log_mode = "a" if config.resume else "w"  # the first line replaces an old log
        self.earlier_seconds = self.restored["seconds"] if self.restored else 0.0
        self._sweep()
        self.wait()  # no rank may write a new checkpoint while another reads the old one
        torch.manual_seed(config.seed)
        self.start = time.perf_counter()
        data, device = name_of_data(config), self.about_device
        self.say(f"{method} on {data}: {device}, seed {config.seed}, out {self.out}")

    def _default_folder(self):
        """runs/METHOD-DATASET; with -2, -3, ... where a run with other options lies there."""
        base = f"runs/{self.method}-{name_of_data(self.config)}"
        for number in count(1):
            out = Path(base if number == 1 else f"{base}-{number}")
            try:
                saved = load_checkpoint(out / "checkpoint.pt")["config"]
            except (UsageError, KeyError):
                return Path(base) if self.config.resume else out
            if saved == self._options() or saved.get("smoke"):
                return out

    def _enter(self):
        """Make --out, and keep other processes out of it. Raises UsageError."""
        with refusing(f"--out {self.out}: cannot be written", "; choose another folder"):
            self.out.mkdir(parents=True, exist_ok=True)
            with open(self.out / "log.jsonl", "ab+") as log:  # a line cut short ends here
                if log.tell() and log.seek(-1, os.SEEK_END) >= 0 and log.read() != b"\n":
                    log.write(b"\n")
        name = hashlib.sha256(str(self.out.resolve()).encode()).hexdigest()[:16]
        path = Path(tempfile.gettempdir()) / f"fewstep-{name}.lock"
        self.lock = FileLock(path, thread_local=False, is_singleton=True)  # held while this lives
        if self.rank == 0:
            with contextlib.suppress(OSError):  # the lock may be of another user
                try:
                    self.lock.acquire(timeout=0)
                except Timeout:
                    message = "another process runs there; wait for it, or give another --out"
                    raise UsageError(f"--out {self.out}: {message}") from None

    def _sweep(self):
        """Delete what a killed run has left half written, under the names that we give."""
        for part in self.out.glob("*.part"):
            if re.fullmatch(r".+\.(pt|safetensors|json|png|npz)\.\d+\.part", part.name):
                part.unlink(missing_ok=True)

    def say(self, line):
        """Print on rank 0, above any progress bar."""
        if self.rank == 0:
            try:
                tqdm.write(line, file=sys.stdout)
                sys.stdout.flush()
            except BrokenPipeError:  # as in `| head -1`: the run goes on
                print_no_more()

    def seconds(self):
        return self.earlier_seconds + time.perf_counter() - self.start

    # ------------------------------------------------------------------------- random numbers
    # The global generators are the same on every rank, which draws the whole batch of n and takes
    # its share: the numbers do not depend on how many ranks there are.

    def randn(self, n, *shape):
        """This rank's rows of unit Gaussian numbers (n, *shape)."""
        return torch.randn(n, *shape, device=self.device)[share_of(n)]

    def rand(self, n):
        """This rank's rows of numbers (n,), uniform in [0, 1)."""
        return torch.rand(n, device=self.device)[share_of(n)]

    def randint(self, high, n):
        """This rank's rows of integers (n,), uniform in 0 ... high - 1."""
        return torch.randint(high, (n,), device=self.device)[share_of(n)]

    # ------------------------------------------------------------------------------- training

    def prepare(self, *networks):
        """--checkpoint and --compile for U-Nets, or for modules that hold one as `net`."""
        if self.config.compile:
            check_compiler(self.device)
        for module in networks:
            getattr(module, "net", module).checkpoint = self.config.checkpoint
            if self.config.compile:
                module.compile()

    def backward(self, optimizer, loss_fn, *batch, mixed_precision=True):
        """New gradients for the optimizer's parameters; returns the mean loss of this rank's rows.

        loss_fn(*batch) is a mean over the rows of `batch`: tensors (B, ...), or None. It runs in
        parts of --batch-per-gpu rows, in bfloat16 if --precision says so and the loss allows it
        (mixed_precision), and gradients are averaged over the ranks. Where a gradient is not
        finite, so is the result.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        rows = len(batch[0])
        at_most = self.config.batch_per_gpu or rows
        if mixed_precision and self.bf16 is None:
            first = [None if b is None else b[:at_most] for b in batch]
            passes = lambda: loss_fn(*first).backward(inputs=parameters)
            bf16, why = chosen_precision(self.config, self.device, passes)
            self.bf16 = bool(max(self._agree(bf16)))  # one for all ranks; resumed: the same
            self.say(f"precision: {why}")
        optimizer.zero_grad(set_to_none=False)
        cast = autocast(self.device, mixed_precision and self.bf16)
        total = 0
        self.calls += 1
        with masks_of_this_rank(self.device, self.config.seed, self.done, self.calls):
            for start in range(0, rows, at_most):
                part = [None if b is None else b[start : start + at_most] for b in batch]
                with cast:
                    loss = loss_fn(*part) * (len(part[0]) / rows)
                loss.backward(inputs=parameters)
                total = total + loss.detach()
        average_gradients(parameters)
        norms = torch._foreach_norm([p.grad for p in parameters if p.grad is not None], math.inf)
        return torch.where(torch.stack(norms).isfinite().all(), total, math.nan)

    def resume(self, **parts):
        """Name what a checkpoint holds: anything with a state_dict. With --resume: read it."""
        self.parts = parts
        if self.restored:
            saved = self.restored.pop("parts")  # not kept in memory
            for name, part in parts.items():  # of another version of this project, perhaps
                what = f"--resume: the {name} in {self.out / 'checkpoint.pt'} does not fit"
                with refusing(what, "; to start anew, delete it"):
                    part.load_state_dict(saved[name])
            rng = self.restored["rng"]
            torch.set_rng_state(rng["cpu"])
            if "cuda" in rng and self.device.type == "cuda":
                torch.cuda.set_rng_state(rng["cuda"])
            self.done = self.restored["step"]

    def steps(self, count, what="training"):
        """Yield 0 ... count - 1, less the steps that a resumed run has done; a run may have phases.

        Behind a progress bar that shows `run.loss` about once a second (read only then: the device
        never waits). Checkpoints every `checkpoint_seconds`, less often if that would take more
        than a twentieth of the time, and at the end. SIGINT or SIGTERM on any rank: all finish the
        step, save and exit with code 130; a second Ctrl-C stops at once. A loss that is not finite
        stops the run.
        """
        begin, self.planned = self.planned, self.planned + count
        last, stop = self.planned, []
        first = min(max(begin, self.done), last)

        def interrupt(number, frame):
            if number == signal.SIGINT and number in stop:  # torchrun adds a SIGTERM to Ctrl-C
                raise KeyboardInterrupt
            stop.append(number)
            self.say("\nstopping after this step; Ctrl-C again: at once, without saving it")

        in_main = threading.current_thread() is threading.main_thread()  # others get no signals
        numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
        handlers = {number: signal.signal(number, interrupt) for number in numbers}
        bar = tqdm(
            total=count, initial=first - begin, desc=what, disable=self.rank > 0, file=sys.stderr,
            **BAR,
        )
        self.loss, shown, saved, cost = None, time.perf_counter(), time.perf_counter(), 0
        try:
            for step in range(first, last):
                self.calls = 0
                yield step - begin
                bar.update()
                self.done = step + 1
                now = time.perf_counter()
                pause = self.checkpoint_seconds and max(self.checkpoint_seconds, 20 * cost)
                due = self.rank == 0 and now - saved > pause or step == last - 1
                show = now - shown > 1 or step == first
                stopping, due, show = self._agree(bool(stop), due, show)
                due |= stopping
                if self.loss is not None and (due or show):  # before every save
                    shown = now
                    self._show(bar, what, step)
                if due:
                    self._save()
                    saved = time.perf_counter()
                    cost = saved - now
                if stopping:
                    self.say(
                        f"\nstopped after step {step + 1 - begin} of {count}; "
                        "the same command with --resume goes on from here"
                    )
                    sys.exit(130)
            self.wait()  # for the last checkpoint, and for what rank 0 wrote in the loop
        finally:
            bar.close()
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _show(self, bar, what, step):
        """Put the loss, the mean over the ranks, on the bar and into log.jsonl."""
        named = self.loss if isinstance(self.loss, dict) else {"loss": self.loss}
        values = torch.stack([v.detach().double() for v in named.values()])
        values = dict(zip(named, (sum_over_ranks(values) / self.world).tolist()))
        bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        self.log(step=step, what=what, **values)
        for name, value in values.items():
            if not math.isfinite(value):
                raise UsageError(
                    f"{what}: the {name}, or its gradient, is {value} at step {step}; "
                    "the last checkpoint is kept, try a smaller --lr"
                )

    def wait(self):
        """Until all ranks are here; then they see each other's files in --out."""
        self._agree()

    def _agree(self, *flags):
        """Each flag as soon as any rank has it. The ranks wait here, but not for their GPUs."""
        if self.world == 1:
            return flags
        together = torch.tensor([0, *flags], dtype=torch.int32)  # on the CPU: by gloo
        dist.all_reduce(together, dist.ReduceOp.MAX)
        return together[1:].bool().tolist()

    # ---------------------------------------------------------------- checkpoint, log, metrics

    def _options(self):
        config = dataclasses.asdict(self.config)
        return {k: v for k, v in config.items() if k not in self.MAY_CHANGE}

    def _checkpoint(self):
        path = self.out / "checkpoint.pt"
        state = load_checkpoint(path)
        if state["fewstep"] != self.method:
            raise UsageError(f"--resume: {path} belongs to {state['fewstep']}, not {self.method}")
        kinds = dict(config=dict, parts=dict, rng=dict, seconds=float, step=int, bf16=bool | None)
        for name, kind in kinds.items():
            if not isinstance(state.get(name), kind):
                raise UsageError(f"--resume: {path} has no usable {name!r}")
        for name, value in self._options().items():
            saved = state["config"].get(name)
            if saved != value:
                flag = name.replace("_", "-")
                raise UsageError(f"--{flag} {value}: the checkpoint to resume has {saved}")
        return state

    def _nothing_is_lost(self):
        """UsageError if --out holds what a new run would replace: one that was stopped half way, or
        a finished one of other options."""
        try:
            state = load_checkpoint(self.out / "checkpoint.pt")
        except UsageError:  # nothing there, or nothing of ours
            return
        finished, saved = (self.out / "metrics.json").exists(), state.get("config")
        if finished and saved != self._options() and not saved.get("smoke"):
            raise UsageError(
                f"--out {self.out}: the finished run of {state['fewstep']} there has other "
                "options; give another --out, or delete it"
            )
        if state.get("half_way") and not finished:
            raise UsageError(
                f"--out {self.out}: a run of {state['fewstep']} was stopped here after step "
                f"{state['step']}; go on with --resume, give another --out, or delete it"
            )

    def _save(self):
        """Write checkpoint.pt (rank 0): parts, random generators, options, steps done."""
        if self.rank == 0:
            rng = {"cpu": torch.get_rng_state()}
            if self.device.type == "cuda":
                rng["cuda"] = torch.cuda.get_rng_state()
            state = {name: part.state_dict() for name, part in self.parts.items()}
            half_way = (self.done < self.planned or cli.running) and not self.config.smoke
            (self.out / "metrics.json").unlink(missing_ok=True)  # of another run, as of now
            save_checkpoint(
                self.out / "checkpoint.pt",
                self.method,
                {
                    "config": self._options(), "seconds": self.seconds(), "step": self.done,
                    "rng": rng, "parts": state, "half_way": half_way, "bf16": self.bf16,
                },
            )

    def log(self, **values):
        """Append one line to log.jsonl (rank 0)."""
        if self.rank == 0:
            path = self.out / "log.jsonl"
            line = json.dumps({"seconds": round(self.seconds(), 3), **values})
            with refusing(f"cannot write {path}", "; the last checkpoint is kept"):
                with open(path, self.log_mode) as file:
                    self.log_mode = "a"
                    file.write(line + "\n")

    def logged(self, name):
        """(steps, values) of everything in log.jsonl that has `name` (rank 0)."""
        if self.rank > 0:
            return [], []
        points = []
        for line in (self.out / "log.jsonl").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):  # a line that a full disk has cut short
                if name in (line := json.loads(line)):
                    points.append((line["step"], line[name]))
        return [step for step, _ in points], [value for _, value in points]

    def finish(self, results, **more):
        """Write metrics.json: rows `results`, what was run, for how long, `more`. Print a table."""
        if self.rank > 0:
            return
        data = self.config.dataset
        save_json(
            self.out / "metrics.json",
            {
                "method": self.method,
                "dataset": data,
                "teacher": getattr(self.config, "teacher", "none") or f"{data} (shipped or cached)",
                "seed": self.config.seed,
                "command": command_line(),
                "commit": commit(),
                "device": self.about_device.removeprefix("device "),
                "bf16": bool(self.bf16),
                "versions": {"python": platform.python_version(), "torch": torch.__version__},
                "config": dataclasses.asdict(self.config),
                "seconds": round(self.seconds(), 2),
                "peak_memory_mb": peak_memory_mb(self.device),
                "results": results,
                **({"references": self.references} if self.references else {}),
                **more,
            },
        )
        self.lock.release(force=True)
        columns = ["name", "nfe", "rmse_to_teacher", *METRICS]
        self.say(table(results, columns, self.references))
        shown = [str(name) for row in results for name in (row["name"], *row)]
        for beginning, text in EXPLAINED.items():
            if any(name.startswith(beginning) for name in shown):
                self.say(f"{beginning}: {text}")
        if self.config.smoke:
            self.say("--smoke tries the path only: these numbers mean nothing")
        files = sorted(f"{file.name}{'/' * file.is_dir()}" for file in self.out.iterdir())
        self.say(f"{self.seconds():.0f} s; in {self.out}: {', '.join(files)}")


def command_line():
    """What was typed after `python`, fit to be pasted."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    module = spec is not None and spec.origin == sys.argv[0]  # python -m common.teacher
    program = ["-m", spec.name] if module else [Path(sys.argv[0]).name]
    return shlex.join([*program, *sys.argv[1:]])


def check_compiler(device):
    """UsageError unless torch.compile works here: it needs a compiler of C++, on a GPU Triton."""
    with refusing("--compile: not possible here"):  # torch._inductor raises anything
        torch.compile(lambda x: (x + 1).sin())(torch.ones(8, device=device))


def commit():
    """The commit of this code, "-dirty" where it was changed since; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def peak_memory_mb(device):
    """Most memory that this process has had: of the GPU, else of the machine; None on Windows."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20, 1)
    with contextlib.suppress(ImportError):
        import resource

        unit = 2**20 if sys.platform == "darwin" else 2**10  # bytes there, kilobytes elsewhere
        return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1)


def table(results, columns, references=None):
    """Rows as aligned text, at most 100 columns wide; what was not run says so.

    Above it stands for each metric its feature space and n and, of `references` {metric: {...}},
    what real images and noise have. A column that no row has is left out.
    """
    columns = [c for c in columns if any(row.get(c) is not None for row in results)]
    spaces = {}  # feature space -> its metrics
    for column in columns:
        row = next(row for row in results if row.get(column) is not None)
        features = f"{SHARED.get(column, column)}_features"
        if features in row:
            spaces.setdefault(f"[{row[features]}, n={row['fid_n']}]", []).append(column)
    above = []
    for space, metrics in spaces.items():
        about = {metric: (references or {}).get(metric, {}) for metric in metrics}
        known = []
        for what, words in (("real", "real test images have"), ("noise", "noise")):
            values = [_number(metric, a[what]) for metric, a in about.items() if what in a]
            if values:
                n = f" (n={about[metrics[0]]['real_n']})" if what == "real" else ""
                known.append(f"{words} {', '.join(values)}{n}")
        above.append(f"{', '.join(metrics)} {space}{': ' * bool(known)}{', '.join(known)}")
    lines = [columns] + [[_cell(row, c) for c in columns] for row in results]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = []
    for name, *cells in lines:
        numbers = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        padded.append("  ".join([name.ljust(widths[0]), *numbers]))
    return "\n".join([*above, *padded])


def _number(column, value):
    """Four digits; of a kid, which is known less well, three."""
    if isinstance(value, float):
        return f"{value:.{3 if column.startswith('kid') else 4}g}"
    return "not run" if value is None else str(value)


def _cell(row, column):
    """A value; behind "±" its standard error, if the row has it as rmse_se or kid_se."""
    error = row.get(f"{column.partition('_')[0]}_se")
    shown = error is not None and column in ("rmse_to_teacher", "kid")
    return _number(column, row.get(column)) + (f"±{error:.1g}" if shown else "")


class State(types.SimpleNamespace):
    """Numbers, tensors and dicts of them that a checkpoint should hold: `run.resume(state=...)`."""

    def state_dict(self):
        return dict(vars(self))

    def load_state_dict(self, state):
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                value = value.to(getattr(self, name).device)
            setattr(self, name, value)
