"""torchrun: two ranks do what one does, in every script; a signal to any stops all at one step."""

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import dode
from common.machinery import ranks
from common.machinery.files import load_checkpoint
from scripts import results as rows_of
from toy import five_blobs

ROOT = Path(__file__).parent.parent

# ------------------------------------------------------------------------------- in one process


def test_one_rank_needs_no_process_group(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    net = nn.Linear(2, 1)
    net(torch.ones(1, 2)).sum().backward()
    before = [p.grad.clone() for p in net.parameters()]
    ranks.average_gradients(net.parameters())
    assert ranks.rank_and_world() == (0, 1)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), before))


def test_one_rank_has_all_rows_and_sums(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    rows = torch.arange(6.0).view(3, 2)
    assert ranks.share_of(7) == slice(0, 7) and torch.equal(ranks.gather_rows(rows), rows)
    assert torch.equal(ranks.sum_over_ranks(rows.clone()), rows)
    assert torch.equal(ranks.from_first_rank(rows.clone()), rows)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_shares_are_even_and_whole(monkeypatch, world):
    for n in range(12):
        slices = []
        for rank in range(world):
            monkeypatch.setattr(ranks, "rank_and_world", lambda r=rank: (r, world))
            slices.append(ranks.share_of(n))
        rows = [list(range(n))[s] for s in slices]
        assert sum(rows, []) == list(range(n))
        sizes = [len(r) for r in rows]
        assert sizes[0] == max(sizes) <= min(sizes) + 1


def masks(monkeypatch, rank, device, steps=3):
    """The masks of one rank of two in some steps, and the next number that all ranks share.

    Nothing else is drawn on the CPU in between, as where a GPU draws the noise.
    """
    monkeypatch.setattr(ranks, "rank_and_world", lambda: (rank, 2))
    torch.manual_seed(0)
    drawn = []
    for step in range(steps):
        with ranks.masks_of_this_rank(torch.device(device), 7, step):
            drawn.append(tuple(torch.rand(9).tolist()))
    return drawn, torch.rand(()).item()


def test_masks_differ_from_step_to_step_and_from_rank_to_rank(monkeypatch):
    """And the generators that the ranks share do not move: noise is as on one rank."""
    (first, after), (second, after_second) = (masks(monkeypatch, r, "cpu") for r in range(2))
    assert len({*first, *second}) == 6
    torch.manual_seed(0)
    assert after == after_second == torch.rand(()).item()
    assert masks(monkeypatch, 0, "cpu")[0] == first  # the same when a run is resumed


def test_masks_on_a_gpu_leave_its_generator_alone(monkeypatch):
    """Simulated: the fork names the GPU."""
    forks, fork = [], torch.random.fork_rng

    @contextlib.contextmanager
    def fork_rng(devices, enabled):
        forks.append(list(devices))
        with fork([], enabled=enabled):
            yield

    monkeypatch.setattr(torch.random, "fork_rng", fork_rng)
    drawn, _ = masks(monkeypatch, 1, "cuda:1")
    assert forks == [[torch.device("cuda:1")]] * 3 and len(set(drawn)) == 3


# -------------------------------------------------------------------------------- every script

COMMANDS = {  # dropout 0: every rank has its own masks
    "ld3": "ld3.py --steps 6 --theta1-steps 2 --train-n 8 --valid-n 5 --batch-size 4",
    "ld3, uneven shares": "ld3.py --steps 4 --train-n 3 --valid-n 1 --batch-size 1",
    "dode": "dode.py --fit-n 8 --fit-batch 2 --nfe 3 4",
    "progressive": "progressive.py --from-steps 4 --updates 3 --batch-size 8",
    "cfd": "cfd.py --from-steps 4 --cfd-from 2 --updates 3 --batch-size 8 --beta 0.5 --gamma 0.2",
    "cud": "cud.py --steps 4 --batch-size 8 --distill-steps 1 --distill-n 9 --baseline --rk 23"
    " --conditional --no-independent",
    "distributional": "distributional.py --images 40 --batch-size 8 --r1-every 2",
    "teacher": "-m common.teacher --steps 4 --batch-size 8 --dropout 0 --conditional",
}


def environment(cache, **more):
    ours = {"OMP_NUM_THREADS": "1", "FEWSTEP_CACHE": str(cache), "PYTHONPATH": str(ROOT)}
    return {**os.environ, **ours, **more}


def launch(k, *command):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={k}"]
    return [sys.executable, *(launcher if k > 1 else []), *map(str, command)]


def numbers(value, path=""):
    """(path, number) of every number in nested results or states."""
    if isinstance(value, dict):
        return [pair for key, part in value.items() for pair in numbers(part, f"{path}/{key}")]
    if isinstance(value, list | tuple):
        return [pair for key, part in enumerate(value) for pair in numbers(part, f"{path}/{key}")]
    if isinstance(value, torch.Tensor):
        return [(path, value.double())]
    return [(path, torch.tensor(float(value)).double())] if isinstance(value, int | float) else []


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_ranks_do_what_one_does(tmp_path, tmp_path_factory, name):
    """The whole script, evaluation on an uneven share of seeds included.

    The same losses, parameters and rows to float tolerance.
    """
    cache = tmp_path_factory.getbasetemp() / "ranks-cache"
    shared = "--smoke --device cpu --eval-n 45 --eval-batch 16 --recall --out".split()
    results, states, losses = [], [], []
    for k in (1, 2):
        out = tmp_path / str(k)
        command = launch(k, *COMMANDS[name].split(), *shared, out)
        done = subprocess.run(
            command, cwd=ROOT, env=environment(cache), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        results.append(rows_of(out))
        states.append(load_checkpoint(out / "checkpoint.pt")["parts"])
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses.append({(line.get("what"), line["step"]): line for line in lines if "step" in line})
    assert all(row["fid_n"] == 45 and "recall" in row for row in results[0] if "fid" in row)
    both = losses[0].keys() & losses[1].keys()
    assert len(both) >= 2
    for key in both:
        one, two = (dict(numbers({**lines[key], "seconds": None})) for lines in losses)
        assert one.keys() == two.keys() and len(one) > 1
        assert all(two[k].item() == pytest.approx(one[k].item(), rel=1e-3, abs=1e-6) for k in one)
    for one, two in ((results[0], results[1]), (states[0], states[1])):
        one, two = ([pair for pair in numbers(x) if "seconds" not in pair[0]] for x in (one, two))
        assert [path for path, _ in one] == [path for path, _ in two] and len(one) > 4
        for (path, a), (_, b) in zip(one, two):
            if "optimizer" in path or "exp_avg" in path or a.isnan().all() and b.isnan().all():
                continue
            # A FID of 45 images is loose: one pixel may be rounded the other way.
            loose = any(word in path for word in ("fid", "precision", "recall"))
            weights = a.ndim and name in ("cud", "distributional", "teacher")
            rtol, atol = (1e-3, 2e-5) if weights else (2e-2, 1e-3) if loose else (2e-3, 5e-5)
            # Adam's first steps go a whole rate along the sign of a gradient, also where that is
            # rounding alone: one number in a thousand may differ.
            assert ((a - b).abs() > atol + rtol * a.abs()).double().mean() <= 1e-3, path


# --------------------------------------------------------------------------- what ranks share

DRIVER = """
import os, signal, sys, time, torch
sys.path.append("tests")
import ld3
from common.fid import Moments
from common.machinery.options import TrainingOptions, cli
from common.machinery.ranks import (
    average_gradients, from_first_rank, gather_rows, rank_and_world, share_of, sum_over_ranks,
)
from common.machinery.run import Run, State
from common.teacher import load_teacher
from test_ranks import fit

def options(out, **more):
    return TrainingOptions(out=out, device="cpu", **more)

def collectives(out):
    run = Run("ld3", ld3.Config(out=out, smoke=True, device="cpu"))
    slice_of_7 = torch.arange(7.0)[share_of(7)]
    assert len(slice_of_7) == (4, 3)[run.rank]
    assert torch.equal(gather_rows(slice_of_7[:, None])[:, 0], torch.arange(7.0))
    nothing_from_rank_0 = torch.arange(4)[: 4 * run.rank]
    assert torch.equal(gather_rows(nothing_from_rank_0), torch.arange(4))
    assert sum_over_ranks(torch.tensor([1.0, run.rank])).tolist() == [2, 1]
    assert from_first_rank(torch.tensor([3.0 + run.rank])).tolist() == [3]
    x = torch.randn(9, 3, generator=torch.Generator().manual_seed(0))
    moments = [Moments(3), Moments(3), Moments(3)]
    moments[0].add(x)
    moments[1].add(x[:2] if run.rank else x[2:])
    if run.rank:
        moments[2].add(x)
    for some in moments[1:]:
        for a, b in zip(some.of_all_ranks().mean_cov(), moments[0].mean_cov()):
            torch.testing.assert_close(a, b)
    config = ld3.Config(out=out, smoke=True, device="cpu", train_n=6, batch_size=3)
    teacher = load_teacher(None, "digits", run.device)
    sigmas = ld3.train(config, run, teacher, ld3.make_distance(config, run.device))
    torch.save((sigmas, fit(f"{out}/dode")), f"{out}/rank{run.rank}.pt")

def gradients(out):
    rank, world = rank_and_world(torch.device("cpu"))
    assert world == 2 and rank_and_world() == (rank, 2)
    a, frozen, b = (torch.nn.Parameter(torch.zeros(*shape)) for shape in ((2, 3), (4,), (5,)))
    a.grad = torch.arange(6.0).view(2, 3) * (rank + 1)
    b.grad = torch.full((5,), 10.0 * rank - 3)
    average_gradients([a, frozen, b])
    assert torch.equal(a.grad, torch.arange(6.0).view(2, 3) * 1.5)
    assert torch.equal(b.grad, torch.full((5,), 2.0)) and frozen.grad is None
    run = Run("method", options(out, batch_per_gpu=2))
    assert (run.rank, run.world) == (rank, 2)
    net = torch.nn.Linear(3, 1)
    x = torch.randn(10, 3, generator=torch.Generator().manual_seed(0))
    loss_fn = lambda x: net(x).square().mean()
    expected = torch.autograd.grad(loss_fn(x), list(net.parameters()))
    optimizer = torch.optim.SGD(net.parameters(), lr=1)
    run.resume(net=net)
    for step in run.steps(3):
        loss = run.backward(optimizer, loss_fn, x[share_of(10)])  # in parts of 2, 2, 1
        torch.testing.assert_close(sum_over_ranks(loss) / 2, loss_fn(x).detach())
        for parameter, gradient in zip(net.parameters(), expected):
            torch.testing.assert_close(parameter.grad, gradient)
        run.loss = torch.tensor(float(rank))
    one_is_nan = run.backward(optimizer, lambda x: loss_fn(x * (float("nan") if rank else 1)), x)
    assert one_is_nan.isnan()  # on both
    run.finish([{"name": rank, "nfe": 1}])
    print("good", rank)

def stopped(out):
    again = "resume" in sys.argv
    run = Run("method", options(out, resume=again), checkpoint_seconds=1000)
    state = State(done=0)
    run.resume(state=state)
    for step in run.steps(40 if again else 10**6):
        time.sleep(0.002 * (1 + run.rank))
        run.loss = sum_over_ranks(torch.ones(()))
        state.done += 1
        if step == 30 and run.rank == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGTERM)
    print("rank", run.rank, "did", state.done)

def broken(out):
    run = Run("method", options(out), checkpoint_seconds=1000)
    for step in run.steps(100):
        run.loss = torch.tensor(float("nan") if run.rank == 1 else 1.0)

cli(lambda: globals()[sys.argv[1]](sys.argv[2]))
"""


def fit(out):
    """The scalars of D-ODE for an exact denoiser in float64."""
    options = dict(fit_n=256, fit_batch=256, scale=4, nfe=4, grid="auto")
    fitted = dode.fit(dode.Config(device="cpu", out=str(out), **options), teacher=five_blobs(0.2))
    return [torch.tensor(entry["lambdas"], dtype=torch.float64) for entry in fitted.values()]


def two_ranks(tmp_path, *arguments):
    """Two processes as torchrun starts them, with their own exit codes: [(code, output)]."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = dict(WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DRIVER, *map(str, arguments)],
            cwd=ROOT,
            env=environment(tmp_path / "cache", RANK=str(r), LOCAL_RANK=str(r), **shared),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=600)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, output) for process, output in zip(processes, outputs)]


@pytest.mark.slow
def test_sums_rows_and_moments_of_two_ranks_and_one_grid_for_both(tmp_path):
    results = two_ranks(tmp_path, "collectives", tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    first, second = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
    for a, b in zip(first[0], second[0]):
        assert torch.equal(a, b) and (a.diff() < 0).all()
    for got in (first[1], second[1]):
        torch.testing.assert_close(got, fit(tmp_path / "one"), rtol=1e-10, atol=1e-10)


@pytest.mark.slow
def test_gradients_are_averaged_over_two_ranks_and_rank_0_alone_writes(tmp_path):
    results = two_ranks(tmp_path, "gradients", tmp_path)
    assert [code for code, _ in results] == [0, 0], results
    outputs = [output for _, output in results]
    assert "good 0" in outputs[0] and "good 1" in outputs[1]
    assert "method on digits" in outputs[0] and "method on digits" not in outputs[1]
    assert rows_of(tmp_path) == [{"name": 0, "nfe": 1}]
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    assert lines and all(json.loads(line)["loss"] == 0.5 for line in lines)
    assert load_checkpoint(tmp_path / "checkpoint.pt")["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_signal_to_one_rank_stops_all_after_the_same_step(tmp_path, rank):
    start = time.time()
    results = two_ranks(tmp_path, "stopped", tmp_path, rank)
    assert [code for code, _ in results] == [130, 130] and time.time() - start < 500, results
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == state["parts"]["state"]["done"] == 31
    results = two_ranks(tmp_path, "stopped", tmp_path, rank, "resume")
    assert [code for code, _ in results] == [0, 0], results
    assert all(f"rank {r} did 40" in output for r, (_, output) in enumerate(results))


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_both(tmp_path):
    results = two_ranks(tmp_path, "broken", tmp_path)
    assert [code for code, _ in results] == [2, 2], results
    assert all("is nan at step 0" in output for _, output in results), results
