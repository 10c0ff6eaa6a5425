"""Timings and memory, as ratios measured side by side; no number decides about a test.

python tests/bench.py           # about four minutes on 2 CPU cores
python tests/bench.py step fit  # on a GPU: the network of CIFAR-10 at full size
python tests/bench.py tiny      # every part with tiny networks: shows that they run

Sections: cpu (precision, layout, solvers, memory of LD3, GDD's frozen convolutions), step (a
training step), fit (LD3 and D-ODE). Without a section: all that the device allows.
"""

import functools
import os
import resource
import statistics
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

import distributional  # noqa: E402
import dode  # noqa: E402
import ld3  # noqa: E402
from common import unet  # noqa: E402
from common.diffusion import Denoiser, noise_from_seeds, sigma_grid  # noqa: E402
from common.machinery.run import Run, pick_device  # noqa: E402
from common.solvers import SOLVERS, steps_for  # noqa: E402
from common.teacher import edm_loss, load_teacher  # noqa: E402

FULL = functools.partial(unet.ddpmpp, 32, 3)  # CIFAR-10's DDPM++: 55.7 M parameters
SMALL = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
TINY = functools.partial(unet.ddpmpp, 16, 3, **SMALL)
NETWORKS = {
    "NCSN++ of CIFAR-10": functools.partial(unet.ncsnpp, 32, 3),
    "tiny": functools.partial(unet.ncsnpp, 16, 3, **SMALL),
}


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


def memory_of_process():
    """MiB that this process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(function, *arguments):
    """The numbers that a function of this file prints, called in a process of its own."""
    command = [sys.executable, __file__, function.__name__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


# ------------------------------------------------------------------------------ on any device


def precision_and_layout(device, batch=128, repeats=8):
    """One training step's forward and backward pass of the digits teacher."""
    x = noise_from_seeds(range(batch), (1, 8, 8), device).float()
    times = {}
    for layout in (torch.contiguous_format, torch.channels_last):
        teacher = load_teacher(None, "digits", device).to(memory_format=layout).requires_grad_(True)
        for dtype in (torch.float32, torch.bfloat16):

            def step(teacher=teacher, dtype=dtype):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    teacher(x, 1.0).square().mean().backward()

            times[f"{str(dtype)[6:]}, {str(layout)[6:]}"] = seconds(step, repeats)
    first = next(iter(times.values()))
    threads = torch.get_num_threads()
    print(f"forward + backward, digits teacher, batch {batch}, {device} ({threads} threads)")
    for name, value in times.items():
        print(f"  {name:30s} {1000 * value:8.1f} ms   {value / first:5.2f}x")


def solver_overhead(device, batch=128, repeats=4):
    """A solver's own arithmetic: 10 evaluations on a grid against 10 bare calls of the network."""
    teacher = load_teacher(None, "digits", device)
    x = 80 * noise_from_seeds(range(batch), (1, 8, 8), device)
    print(f"10 network evaluations, batch {batch}: a solver's time over that of bare calls")
    with torch.no_grad():
        bare = seconds(lambda: [teacher(x, 1.0) for _ in range(10)], repeats)
        for name, solver in SOLVERS.items():
            sigmas = sigma_grid("edm", steps_for(name, 10))
            sample = functools.partial(solver, teacher, x, sigmas)
            print(f"  {name:30s} {seconds(sample, repeats) / bare:5.2f}x")


# -------------------------------------------------------------- memory, in processes of their own


def fit_grid(config, teacher):
    """`ld3.train` as ld3.py calls it."""
    run = Run("ld3", config)
    return ld3.train(config, run, teacher, ld3.make_distance(config, run.device))


def ld3_process(nfe, checkpoint, steps, batch):
    """Prints the peak memory of some LD3 updates."""
    with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
        config = ld3.Config(
            nfe=int(nfe),
            checkpoint=checkpoint == "True",
            solver="dpmpp",
            train_n=int(batch),
            valid_n=1,
            batch_size=int(batch),
            steps=int(steps),
            device="cpu",
            out=out,
        )
        fit_grid(config, load_teacher(None, "digits", torch.device("cpu")))
    print(memory_of_process())


def ld3_memory(batch=128, budgets=(4, 8, 16)):
    """Peak memory of a few LD3 updates on the CPU."""
    print(f"peak memory of LD3 above that of loading everything, batch {batch}, CPU")
    for checkpoint in (False, True):
        for nfe in budgets:
            before, peak = (in_a_process(ld3_process, nfe, checkpoint, k, batch)[0] for k in (0, 2))
            name = "--checkpoint" if checkpoint else "plain"
            print(f"  {name:14s} nfe {nfe:2d}: {peak - before:6.0f} MiB")


def gdd_process(network, batch, freeze):
    """Prints seconds of a generator step, its memory above the teacher's, trained parameters."""
    if network == "digits":
        teacher = load_teacher(None, "digits", torch.device("cpu"))
    else:
        teacher = Denoiser(NETWORKS[network]())
    before, times = memory_of_process(), []
    generator = distributional.make_generator(teacher, freeze)
    generator = generator.to(memory_format=torch.channels_last)
    trained = [p for p in generator.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, 1e-4, (0.0, 0.99), fused=True)
    for _ in range(4):
        start = time.perf_counter()
        noise = torch.randn(int(batch), *teacher.net.img_shape)
        optimizer.zero_grad()
        generator(80 * noise, 80.0).square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    count = sum(p.numel() for p in trained)
    print(statistics.median(times[1:]), memory_of_process() - before, count)


def gdd_freezing(networks=(("digits", 512), ("NCSN++ of CIFAR-10", 2))):
    """One step of the generator: all of it trained, and with frozen convolutions."""
    print("GDD-I / GDD, CPU: one update of the generator (forward, backward, Adam)")
    print("memory: above that of the teacher")
    for network, batch in networks:
        rows = []
        for freeze in ("none", "conv"):
            rows.append(in_a_process(gdd_process, network, batch, freeze))
            took, memory, trained = rows[-1]
            print(f"  {network:20s} batch {batch:3d} --freeze {freeze:5s} {took:7.3f} s", end="")
            print(f"  {memory:6.0f} MiB  {trained:12,.0f} trained")
        took, memory, trained = (frozen / whole for whole, frozen in zip(*rows))
        print(f"  {'':20s} {'ratios':26s} {took:7.2f}    {memory:6.2f}      {trained:12.2f}")


# --------------------------------------------------------------- what only a GPU does at full size


def random_denoiser(make, device):
    torch.manual_seed(0)
    return Denoiser(make()).to(device, memory_format=torch.channels_last)


def matmul_peak(device, n):
    """FLOP/s of a bfloat16 product of two n x n matrices: the most that a chip does in practice."""
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / seconds(lambda: a @ b, 20)


def flops_per_image(make):
    """Of a training step's forward and backward pass, counted on shapes alone.

    Attention counts as the two matrix products that it is.
    """
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


def training_steps(
    device, make=FULL, batches=(128, 256, 512), n=8192, repeats=10, backend="inductor"
):
    """Images per second of a training step: EDM's loss, forward and backward, and Adam.

    As in common.teacher, without the moving average.
    """
    flops, peak = flops_per_image(make), matmul_peak(device, n)
    parameters = sum(p.numel() for p in make().parameters())
    print(f"training step, {parameters:,} parameters, {flops / 1e9:.2f} GFLOP per image")
    print(f"a bfloat16 product of {n} x {n} matrices: {peak / 1e12:.4g} TFLOP/s")
    kinds = [("float32", torch.float32, False), ("bfloat16", torch.bfloat16, False)]
    for name, dtype, compiled in [*kinds, ("bfloat16, compiled", torch.bfloat16, True)]:
        for batch in batches:
            torch._dynamo.reset()
            denoiser = random_denoiser(make, device).train()
            optimizer = torch.optim.Adam(denoiser.parameters(), 1e-4, fused=True)
            x0, noise = torch.randn(2, batch, *denoiser.net.img_shape, device=device)
            sigma = torch.randn(batch, device=device).mul(1.2).sub(1.2).exp()
            if compiled:
                denoiser.compile(dynamic=False, backend=backend)
            loss_fn = functools.partial(edm_loss, denoiser, x0, noise, sigma)

            def step(loss_fn=loss_fn, optimizer=optimizer, dtype=dtype):
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss = loss_fn()
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
                found = f"{rate:9,.0f} images/s  {rate * flops / 1e12:8.4g} TFLOP/s"
                found += f"  {100 * rate * flops / peak:5.1f} % of that product"
                found += f"  {peak_memory(device):7,.0f} MiB  first two steps {first:.1f} s"
            except torch.cuda.OutOfMemoryError:
                found = "out of memory"
            except Exception as error:  # no compiler for what torch.compile writes
                if not compiled:
                    raise
                found = f"not run: {' '.join(str(error).split())[:120]}"
            print(f"  {name:20s} batch {batch:4d} {found}", flush=True)
            del step, loss_fn, denoiser, optimizer
    torch._dynamo.reset()


def ld3_fits(device, make=FULL, budgets=(4, 6, 8, 10), **options):
    """An LD3 update at the preset of CIFAR-10, and the whole fit that follows from it.

    The distance is l2; LPIPS comes on top. A validation every 5 updates is counted in.
    """
    teacher = random_denoiser(make, device).eval().requires_grad_(False)
    given = dict(dataset="cifar10", distance="l2", device=str(device), **options)
    for checkpoint in (False, True):
        for nfe in budgets:
            times = {}
            with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
                for steps in (5, 5, 15):  # the first is a warm-up
                    config = ld3.Config(
                        nfe=nfe, steps=steps, checkpoint=checkpoint, out=out, **given
                    )
                    peak_memory(device)
                    start = time.perf_counter()
                    fit_grid(config, teacher)
                    times[steps] = time.perf_counter() - start
            update = (times[15] - times[5]) / 10
            name = "--checkpoint" if checkpoint else "plain"
            minutes = (times[5] + 170 * update) / 60
            print(f"  ld3 {name:12s} nfe {nfe:2d}: {update:7.3f} s per update", end="")
            print(f"; {peak_memory(device):7,.0f} MiB; {minutes:6.2f} minutes", end="")
            print(" for 175 updates and the teacher's samples", flush=True)


def dode_fits(device, make=FULL, budgets=(4, 6, 8, 10), **options):
    """D-ODE's fit, all six solvers, at the preset of CIFAR-10."""
    teacher = random_denoiser(make, device).eval().requires_grad_(False)
    for nfe in budgets:
        with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
            given = dict(dataset="cifar10", out=out, device=str(device), **options)
            peak_memory(device)
            fitted = dode.fit(dode.Config(nfe=(nfe,), **given), teacher=teacher)
        times = {solver: entry["fit_seconds"] for (solver, _), entry in fitted.items()}
        each = ", ".join(f"{solver} {took:.2f}" for solver, took in times.items())
        print(f"  dode nfe {nfe:2d}: {sum(times.values()):7.2f} s for all ({each})", end="")
        print(f"; {peak_memory(device):7,.0f} MiB", flush=True)


def main():
    sections = sys.argv[1:] or ["cpu", "step", "fit"]
    device, why = pick_device()
    print(why)
    if "cpu" in sections:
        precision_and_layout(device)
        solver_overhead(device)
        ld3_memory()
        gdd_freezing()
    if "tiny" in sections:
        precision_and_layout(device, 4, 2)
        solver_overhead(device, 4, 2)
        ld3_memory(4, (4,))
        gdd_freezing([("digits", 4), ("tiny", 2)])
        training_steps(device, TINY, (4,), 256, 2, "aot_eager")  # no C++ compiler
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
    print(f"peak memory of this process {memory_of_process():.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["ld3_process"]:
        ld3_process(*sys.argv[2:])
    elif sys.argv[1:2] == ["gdd_process"]:
        gdd_process(*sys.argv[2:])
    else:
        main()
