"""Timings and memory, as ratios measured side by side; never part of a test's pass or fail.

    python tests/bench.py          # about four minutes on 2 CPU cores; on a GPU the first table is measured there
"""
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.diffusion import sigma_grid  # noqa: E402
from common.solvers import SOLVERS, steps_for  # noqa: E402
from common.teacher import load_teacher  # noqa: E402
from common.training import noise_from_seeds, pick_device  # noqa: E402


def seconds(function, repeats=8):
    """Median time of a call; the first is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return sorted(times[1:])[repeats // 2]


def precision_and_layout(device):
    """One training step's forward and backward pass of the digits teacher, batch 128."""
    x = noise_from_seeds(range(128), (1, 8, 8), device).float()
    times = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        teacher = load_teacher(None, "digits", device).to(memory_format=layout).requires_grad_(True)
        for dtype in (torch.float32, torch.bfloat16):
            def step(teacher=teacher, dtype=dtype):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    teacher(x, 1.0).square().mean().backward()
            times[f"{str(dtype)[6:]}, {str(layout)[6:]}"] = seconds(step)
    first = next(iter(times.values()))
    print(f"forward + backward, digits teacher, batch 128, {device} ({torch.get_num_threads()} threads)")
    for name, value in times.items():
        print(f"  {name:30s} {1000 * value:8.1f} ms   {value / first:5.2f}x")


def solver_overhead(device):
    """A solver's own arithmetic beside its network evaluations: 10 evaluations on a grid against 10 bare calls."""
    teacher, x = load_teacher(None, "digits", device), 80 * noise_from_seeds(range(128), (1, 8, 8), device)
    with torch.no_grad():
        bare = seconds(lambda: [teacher(x, 1.0) for _ in range(10)], 4)
        print("10 network evaluations, batch 128: a solver's time over that of bare calls")
        for name, solver in SOLVERS.items():
            sigmas = sigma_grid("edm", steps_for(name, 10))
            print(f"  {name:30s} {seconds(lambda solver=solver, sigmas=sigmas: solver(teacher, x, sigmas), 4) / bare:5.2f}x")


def ld3_memory():
    """Peak memory of a few LD3 updates (batch 128, CPU), each in its own process."""
    print("peak memory of LD3 above that of loading everything, batch 128, CPU")
    program = ("import resource, sys, torch, ld3\n"
               "c = ld3.Config(nfe=int(sys.argv[1]), checkpoint=sys.argv[2] == '1', solver='dpmpp', train_n=128, valid_n=1, batch_size=128,"
               "steps=int(sys.argv[3]), device='cpu', out=sys.argv[4])\n"
               "ld3.train(c)\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for checkpoint in "01":
        for nfe in "4", "8", "16":
            commands = ([sys.executable, "-c", program, nfe, checkpoint, steps, "/tmp/fewstep-bench"] for steps in ("0", "2"))
            outputs = (subprocess.run(c, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout for c in commands)
            before, peak = (float(output.split()[-1]) for output in outputs)
            print(f"  {'--checkpoint' if checkpoint == '1' else 'plain':14s} nfe {nfe:>2s}: {peak - before:6.0f} MiB")


def gdd_freezing():
    """Time and peak memory of one step of the generator, all of it trained and with frozen convolutions, each in its own process."""
    print("GDD-I / GDD, CPU: one update of the generator (forward, backward, Adam); memory above that of the teacher")
    program = ("import resource, statistics, sys, time, torch, distributional as m\n"
               "from common import unet\nfrom common.diffusion import Denoiser\nfrom common.teacher import load_teacher\n"
               "net, batch, freeze = sys.argv[1], int(sys.argv[2]), sys.argv[3]\n"
               "teacher = load_teacher(None, 'digits', 'cpu') if net == 'digits' else Denoiser(unet.ncsnpp(32, 3))\n"
               "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024\n"
               "before, times = peak(), []\n"
               "generator = m.make_generator(teacher, freeze).to(memory_format=torch.channels_last)\n"
               "player = m.Player(generator, 1e-4)\n"
               "for step in range(4):\n"
               "    start = time.perf_counter()\n"
               "    player.update(generator(80 * torch.randn(batch, *teacher.net.img_shape), 80.0).square().mean(), step)\n"
               "    times.append(time.perf_counter() - start)\n"
               "trained = sum(p.numel() for p in player.trained.values())\n"
               "print(statistics.median(times[1:]), peak() - before, trained)")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    for net, batch in (("digits", "512"), ("NCSN++ of CIFAR-10", "2")):
        rows = []
        for freeze in ("none", "conv"):
            command = [sys.executable, "-c", program, net, batch, freeze]
            output = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True).stdout
            rows.append([float(value) for value in output.split()])
            time_, memory, trained = rows[-1]
            print(f"  {net:20s} batch {batch:>3s} --freeze {freeze:5s} {time_:7.3f} s  {memory:6.0f} MiB  {trained:12,.0f} trained")
        time_, memory, trained = (ours / all_ for ours, all_ in zip(rows[1], rows[0]))
        print(f"  {'':20s} {'ratios':26s} {time_:7.2f}    {memory:6.2f}      {trained:12.2f}")


if __name__ == "__main__":
    device, why = pick_device()
    print(why)
    precision_and_layout(device)
    solver_overhead(device)
    ld3_memory()
    gdd_freezing()
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
