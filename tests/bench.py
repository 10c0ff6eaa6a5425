"""Timings and memory, as ratios measured side by side; never part of a test's pass or fail.

    python tests/bench.py               # about four minutes on 2 CPU cores; on a GPU the first table is measured there, and then:
    python tests/bench.py step fit      # on a GPU alone: training steps, LD3 and D-ODE with the full-size network of CIFAR-10
    python tests/bench.py tiny          # the same two on any device with a tiny network: shows that they run, not how fast
"""
import functools
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import dode  # noqa: E402
import ld3  # noqa: E402
from common import unet  # noqa: E402
from common.diffusion import Denoiser, sigma_grid  # noqa: E402
from common.solvers import SOLVERS, steps_for  # noqa: E402
from common.teacher import edm_loss, load_teacher  # noqa: E402
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


# ------------------------------------------------------------------------------------------- what only a GPU shows at full size

FULL = functools.partial(unet.ddpmpp, 32, 3)  # CIFAR-10's DDPM++: 55.7 M parameters
TINY = functools.partial(unet.ddpmpp, 16, 3, model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])


def random_denoiser(make, device):
    torch.manual_seed(0)
    return Denoiser(make()).to(device, memory_format=torch.channels_last)


def matmul_peak(device, n):
    """FLOP/s of a bfloat16 product of two n x n matrices: the most that this chip does in practice."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / seconds(lambda: a @ b, 20)


def flops_per_image(make):
    """Of forward and backward pass of a training step: counted on shapes alone, attention as the two matrix products that it is."""
    denoiser = random_denoiser(make, "meta")
    x = torch.zeros(2, *denoiser.net.img_shape, device="meta")
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        edm_loss(denoiser, x, x, torch.ones(2, device="meta")).backward()
    return counter.get_total_flops() / 2


def peak_memory(device):
    """MiB allocated at most since the last call (a GPU's; of a CPU nothing is known)."""
    if device.type != "cuda":
        return float("nan")
    peak = torch.cuda.max_memory_allocated(device) / 2**20
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return peak


def training_steps(device, make=FULL, batches=(128, 256, 512), n=8192, repeats=10):
    """Images per second of a training step as in common.teacher, without its average: EDM's loss, forward and backward, and Adam."""
    flops, peak = flops_per_image(make), matmul_peak(device, n)
    print(f"training step, {sum(p.numel() for p in make().parameters()):,} parameters, {flops / 1e9:.2f} GFLOP per image forward and "
          f"backward; a bfloat16 product of {n} x {n} matrices: {peak / 1e12:.4g} TFLOP/s")
    for name, dtype, compiled in (("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False), ("bfloat16, compiled",
                                                                                                        torch.bfloat16, True)):
        for batch in batches:
            torch._dynamo.reset()
            denoiser = random_denoiser(make, device).train()
            optimizer = torch.optim.Adam(denoiser.parameters(), 1e-4, fused=True)
            x0, noise = torch.randn(2, batch, *denoiser.net.img_shape, device=device)
            sigma = torch.randn(batch, device=device).mul(1.2).sub(1.2).exp()
            if compiled:
                denoiser.compile(dynamic=False)

            def step(denoiser=denoiser, optimizer=optimizer, x0=x0, noise=noise, sigma=sigma, dtype=dtype):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = edm_loss(denoiser, x0, noise, sigma)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

            peak_memory(device)
            try:
                start = time.perf_counter()
                step()
                step()
                first = time.perf_counter() - start
                rate = batch / seconds(step, repeats)
                said = (f"{rate:9,.0f} images/s  {rate * flops / 1e12:8.4g} TFLOP/s  {100 * rate * flops / peak:5.1f} % of that product  "
                        f"{peak_memory(device):7,.0f} MiB  first two steps {first:.1f} s")
            except torch.cuda.OutOfMemoryError:
                said = "out of memory"
            except Exception as error:  # no compiler for what torch.compile writes
                if not compiled:
                    raise
                said = f"not run: {' '.join(str(error).split())[:120]}"
            print(f"  {name:20s} batch {batch:4d} {said}", flush=True)
            del step, denoiser, optimizer
    torch._dynamo.reset()


def ld3_fits(device, make=FULL, budgets=(4, 6, 8, 10), **options):
    """An LD3 update at the preset of CIFAR-10, and the whole fit that follows from it; the distance is l2, LPIPS comes on top."""
    teacher = random_denoiser(make, device).eval().requires_grad_(False)
    for checkpoint in (False, True):
        for nfe in budgets:
            times = {}
            with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
                for steps in (5, 5, 15):  # the first is a warm-up; a validation every 5 updates is counted in
                    config = ld3.Config(dataset="cifar10", nfe=nfe, steps=steps, checkpoint=checkpoint, distance="l2", out=out,
                                        device=str(device), **options)
                    peak_memory(device)
                    start = time.perf_counter()
                    ld3.train(config, teacher=teacher)
                    times[steps] = time.perf_counter() - start
            update = (times[15] - times[5]) / 10
            name, minutes = "--checkpoint" if checkpoint else "plain", (times[5] + 170 * update) / 60
            print(f"  ld3 {name:12s} nfe {nfe:2d}: {update:7.3f} s per update; {peak_memory(device):7,.0f} MiB; {minutes:6.2f} minutes for "
                  "175 updates and the teacher's samples", flush=True)


def dode_fits(device, make=FULL, budgets=(4, 6, 8, 10), **options):
    """D-ODE's fit, all six solvers, at the preset of CIFAR-10."""
    teacher = random_denoiser(make, device).eval().requires_grad_(False)
    for nfe in budgets:
        with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
            config = dode.Config(dataset="cifar10", nfe=(nfe,), out=out, device=str(device), **options)
            peak_memory(device)
            fitted = dode.fit(config, teacher=teacher)
        times = {solver: entry["fit_seconds"] for (solver, _), entry in fitted.items()}
        print(f"  dode nfe {nfe:2d}: {sum(times.values()):7.2f} s for all ({', '.join(f'{s} {t:.2f}' for s, t in times.items())}); "
              f"{peak_memory(device):7,.0f} MiB", flush=True)


if __name__ == "__main__":
    sections = sys.argv[1:] or ["cpu", "step", "fit"]
    device, why = pick_device()
    print(why)
    if "cpu" in sections:
        precision_and_layout(device)
        solver_overhead(device)
        ld3_memory()
        gdd_freezing()
    if "tiny" in sections:
        training_steps(device, TINY, (4, 8), 256, 2)
        ld3_fits(device, TINY, (4,), train_n=4, valid_n=2, teacher_nfe=4)
        dode_fits(device, TINY, (4,), fit_n=8, fit_batch=4, scale=2)
    elif device.type != "cuda":
        print("full-size network of CIFAR-10: no GPU: skipped")
    else:
        if "step" in sections:
            training_steps(device)
        if "fit" in sections:
            ld3_fits(device)
            dode_fits(device)
    print(f"peak memory of this process {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB")
