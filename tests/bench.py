"""Timings and memory, as ratios measured side by side; no number decides about a test.

python tests/bench.py           # about six minutes on 2 CPU cores
python tests/bench.py frechet   # one part
python tests/bench.py step fit  # on a GPU: the network of CIFAR-10 at full size
python tests/bench.py tiny      # every part with tiny networks: shows that they run

One table: each row is a ratio of two times, taken alternately in this run, and its minimum,
median and maximum; below 1 ours is faster. `limit`: what the hardware allows, measured here.
notebooks/results/bench-cpu/bench.txt is its output on two idle cores (2> /dev/null: no bars).
Parts: unet, solver, frechet (beside diffusers and scipy), data (beside a DataLoader), method (a
training step over the bare network passes in it), layout, memory (of LD3), freeze (GDD's frozen
convolutions); on a GPU: step (a training step), fit (LD3 and D-ODE). Without a part: all that
the device allows.
"""

import contextlib
import copy
import functools
import itertools
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import cfd  # noqa: E402
import cud  # noqa: E402
import distributional  # noqa: E402
import dode  # noqa: E402
import ld3  # noqa: E402
import progressive  # noqa: E402
from common import teacher as teacher_script  # noqa: E402
from common import unet  # noqa: E402
from common.datasets import Stream, load_dataset, to_float  # noqa: E402
from common.diffusion import Denoiser, noise_from_seeds, sigma_grid  # noqa: E402
from common.fid import frechet_distance  # noqa: E402
from common.machinery.run import Run, pick_device  # noqa: E402
from common.precision import autocast, has_bf16  # noqa: E402
from common.solvers import SOLVERS, TWO_EVALUATIONS, steps_for  # noqa: E402
from common.teacher import edm_loss, load_teacher  # noqa: E402

FULL = functools.partial(unet.ddpmpp, 32, 3)  # CIFAR-10's DDPM++: 55.7 M parameters
SMALL = dict(model_channels=8, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
TINY = functools.partial(unet.ddpmpp, 16, 3, **SMALL)
LAYOUTS = {  # batches of the part `layout`
    "digits": 128, "mnist": 64, "cifar10": 64, "64 channels at 16x16": 64, "DDPM++ of CIFAR-10": 4,
}
WIDE = {
    "64 channels at 16x16": functools.partial(
        unet.ddpmpp, 16, 12, model_channels=64, channel_mult=[1, 2], num_blocks=1,
        attn_resolutions=[8],
    ),
    "DDPM++ of CIFAR-10": FULL,
}
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
    """MiB that this process has had at most (Linux). getrusage's begins with its parent's."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 1024


def in_a_process(function, *arguments):
    """The numbers that a function of this file prints, called in a process of its own."""
    command = [sys.executable, __file__, function.__name__, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return [float(number) for number in done.stdout.splitlines()[-1].split()]


# --------------------------------------------------------------------------- the table


def timed(function):
    start = time.perf_counter()
    function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def show(name, ratios, limit=""):
    low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
    print(f"  {name:46s} {low:7.2f} {middle:7.2f} {high:7.2f}   {limit}", flush=True)


def head(title):
    print(f"{title:48s} {'min':>7s} {'median':>7s} {'max':>7s}   limit", flush=True)


def compare(ours, theirs, repeats, scale=1.0):
    """[scale x time of ours / time of theirs], the calls alternating; our median time."""
    pairs = [(timed(ours), timed(theirs)) for _ in range(repeats + 1)][1:]
    return [scale * a / b for a, b in pairs], statistics.median(a for a, _ in pairs)


def matmul_rate(dtype, device, n):
    """FLOP/s of a product of two n x n matrices: the most that a chip does in practice."""
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    return 2 * n**3 / min(timed(lambda: a @ b) for _ in range(40))


# ----------------------------------------------------------------------- beside other code


def diffusers_unet(channels, size, widths, blocks, attention):
    """UNet2DModel with our widths; `attention`: at these resolutions."""
    from diffusers import UNet2DModel

    kinds = ["Attn" * (size >> i in attention) for i in range(len(widths))]
    return UNet2DModel(
        size, channels, channels, block_out_channels=widths, layers_per_block=blocks,
        norm_num_groups=min(32, widths[0] // 4), attention_head_dim=None,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in kinds[::-1]],
    )


def flops(make, shape):
    """Of a forward pass for one image, counted on shapes alone."""
    with torch.device("meta"):
        net, x, t = make(), torch.zeros(1, *shape), torch.zeros(1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        net(x, t)
    return counter.get_total_flops()


UNETS = {  # channels, size, widths, blocks, resolutions with attention; batch
    "digits": (1, 8, (32, 64), 1, (4,), 128),
    "mnist": (1, 28, (16, 32, 64), 2, (7,), 32),
    "cifar10": (3, 32, (256, 256, 256), 4, (16,), 2),
}
PRECISIONS = [  # whether ours, and theirs, runs under bfloat16 autocast
    ("", False, False), (", both bf16", True, True), (", bf16 / fp32", True, False),
]


def unets(device, names=tuple(UNETS), repeats=9):
    """Forward, and forward and backward, beside diffusers' UNet2DModel: time per FLOP."""
    head("U-Net / diffusers, time per FLOP")
    precisions = PRECISIONS if has_bf16(device) else PRECISIONS[:1]
    for name in names:
        channels, size, widths, blocks, attention, batch = UNETS[name]
        shape, base = (channels, size, size), min(widths[0], 128)
        ours = functools.partial(
            unet.ddpmpp, size, channels, model_channels=base, dropout=0.0, num_blocks=blocks,
            channel_mult=[w // base for w in widths], attn_resolutions=attention,
        )
        theirs = functools.partial(diffusers_unet, *UNETS[name][:5])
        costs = [flops(make, shape) for make in (ours, theirs)]
        nets = [make().to(device).to(memory_format=torch.channels_last) for make in (ours, theirs)]
        counts = [sum(p.numel() for p in net.parameters()) / 1e6 for net in nets]
        about = [f"{n:.2f} M parameters, {c / 1e9:.3f} GFLOP" for n, c in zip(counts, costs)]
        print(f"  {name}: {about[0]} an image; diffusers {about[1]}")
        x, t = torch.randn(batch, *shape, device=device), torch.ones(batch, device=device)

        def forward(net, bf16, x=x, t=t):
            with torch.no_grad(), autocast(device, bf16):
                net(x, t)

        def backward(net, bf16, x=x, t=t):
            with autocast(device, bf16):
                out = net(x, t)
            getattr(out, "sample", out).float().square().mean().backward()

        kinds = (("forward", forward, 1), ("+ backward", backward, 3))
        for (what, *bf16), (kind, run, passes) in itertools.product(precisions, kinds):
            calls = [functools.partial(run, net, low) for net, low in zip(nets, bf16)]
            ratios, took = compare(*calls, repeats, costs[1] / costs[0])
            dtype = torch.bfloat16 if bf16[0] else torch.float32
            rate = matmul_rate(dtype, device, 1024)  # now: it drifts
            share = passes * batch * costs[0] / took / rate
            limit = f"{100 * share:.0f} % of a product's {rate / 1e9:.0f} GFLOP/s"
            show(f"{name}, batch {batch}, {kind}{what}", ratios, limit)


SCHEDULERS = [
    ("euler", {}, "EulerDiscreteScheduler", {}),
    ("heun", {}, "HeunDiscreteScheduler", {}),
    ("dpm2", {}, "KDPM2DiscreteScheduler", {}),
    ("ipndm", {}, "IPNDMScheduler", {}),
    ("deis", {"order": 2}, "DEISMultistepScheduler", {"solver_order": 3}),
    ("dpmpp", {"order": 2}, "DPMSolverMultistepScheduler", {"solver_order": 2}),
    ("dpmpp", {"order": 3}, "DPMSolverMultistepScheduler", {"solver_order": 3}),
    ("unipc", {"order": 3}, "UniPCMultistepScheduler", {"solver_order": 3}),
]


def run_scheduler(scheduler, output, steps):
    """As many steps as its set_timesteps makes of `steps`, always with the same output."""
    scheduler.set_timesteps(steps)
    scheduler.is_scale_input_called = True  # else a warning
    x = output
    for t in scheduler.timesteps:
        x = scheduler.step(output, t, x, return_dict=False)[0]


def solvers(device, batches=(1, 256), repeats=15, nfe=9):
    """The arithmetic of an evaluation's step beside diffusers', whose state is float32."""
    import diffusers

    warnings.simplefilter("ignore")  # of diffusers, about its own options
    for batch in batches:
        output = torch.randn(batch, 3, 32, 32, device=device)
        state = output.double()
        copy = seconds(state.clone, 20)
        head(f"solver step / diffusers, ({batch}, 3, 32, 32)")
        for name, options, scheduler, given in SCHEDULERS:
            evaluations = nfe + (name in TWO_EVALUATIONS)
            sigmas = sigma_grid("edm", steps_for(name, evaluations))
            scheduler = getattr(diffusers, scheduler)(**given)
            theirs = functools.partial(run_scheduler, scheduler, output, len(sigmas) - 1)
            theirs()

            def ours(solver=SOLVERS[name], options=options, sigmas=sigmas, state=state):
                solver(lambda x, sigma: state, state, sigmas, **options)

            per_evaluation = len(scheduler.timesteps) / evaluations
            with torch.no_grad():
                ratios, took = compare(ours, theirs, repeats, per_evaluation)
            limit = f"{took / evaluations / copy:.1f} copies of the state"
            order = "".join(str(k) for k in options.values())
            show(f"{name}{order}", ratios, limit)


def frechet(sizes=(64, 512, 2048), repeats=3):
    """Beside |mu1 - mu2|^2 + tr(cov1 + cov2 - 2 sqrtm(cov1 cov2)) with scipy's sqrtm."""
    from scipy import linalg

    head("Frechet distance / scipy.linalg.sqrtm")
    for n in sizes:
        rng = np.random.default_rng(0)
        rows = [rng.normal(size=(3 * n, n)) * np.linspace(a, 1.01 - a, n) for a in (1, 0.01)]
        moments = [(x.mean(0), np.cov(x, rowvar=False)) for x in rows]
        (mu1, cov1), (mu2, cov2) = moments
        found = []

        def ours(moments=moments, found=found):
            found.append(frechet_distance(*moments[0], *moments[1]))

        def theirs(mu1=mu1, cov1=cov1, mu2=mu2, cov2=cov2, found=found):
            cross = linalg.sqrtm(cov1 @ cov2).real
            found.append(((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * cross))

        ratios, took = compare(ours, theirs, repeats)
        product = 2 * n**3 / matmul_rate(torch.float64, "cpu", n)
        difference = abs(found[0] / found[1] - 1)
        limit = f"{took / product:.1f} such products; differs by {difference:.0e}"
        show(f"{n} features", ratios, limit)


def streams(batch=128, size=32, images=10_000, repeats=9, batches=20):
    """Our stream of images in memory beside a DataLoader with torchvision's transforms."""
    from torchvision.transforms import v2

    head(f"data stream / DataLoader, batch {batch}")
    data = load_dataset("digits")
    pixels = torch.randint(256, (images, 3, size, size), dtype=torch.uint8)
    data.images, data.labels = pixels, torch.zeros(images, dtype=torch.long)
    steps = [v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True),
             v2.Normalize([0.5] * 3, [0.5] * 3)]
    change = v2.Compose(steps)

    class Transformed(torch.utils.data.Dataset):
        def __len__(self):
            return images

        def __getitem__(self, i):
            return change(pixels[i]), 0

    loader = iter(torch.utils.data.DataLoader(Transformed(), batch, shuffle=True))
    stream, rows = Stream(data, batch, 0, flip=True), torch.arange(batch)
    copy = seconds(lambda: to_float(pixels[rows]), 20)
    batches = min(batches, (images // batch - 1) // (repeats + 1))
    ratios, took = compare(
        lambda: [stream.next() for _ in range(batches)],
        lambda: [next(loader) for _ in range(batches)], repeats,
    )
    show(f"(3, {size}, {size}), flips", ratios, f"{took / batches / copy:.1f} times index and cast")


# ------------------------------------------------- a training step over its network passes


class Passes:
    """Keeps the outermost calls of networks while it is entered; `again` makes them alone.

    Where a call took part in a backward pass, that follows: of the sum of its outputs.
    """

    def __enter__(self):
        self.calls, self.depth, self.plain = [], 0, nn.Module.__call__

        def call(module, *args, **kwargs):
            if not self.depth:
                self.calls.append((module, args, kwargs, torch.is_grad_enabled()))
            self.depth += 1
            try:
                return self.plain(module, *args, **kwargs)
            finally:
                self.depth -= 1

        nn.Module.__call__ = call
        return self

    def __exit__(self, *error):
        nn.Module.__call__ = self.plain
        keep = lambda x: x.detach().requires_grad_(x.requires_grad) if torch.is_tensor(x) else x
        for k, (module, args, kwargs, grad) in enumerate(self.calls):
            kwargs = {name: keep(x) for name, x in kwargs.items()}
            self.calls[k] = module, [keep(x) for x in args], kwargs, grad

    def again(self):
        for module, args, kwargs, grad in self.calls:
            with torch.set_grad_enabled(grad):
                out = module(*args, **kwargs)
            outputs = [out] if torch.is_tensor(out) else list(out)
            if outputs[0].requires_grad:
                torch.autograd.backward([x.sum() for x in outputs])


def step_over_passes(train):
    """[time of a step of `train` / time of the network passes in it], the first left out."""
    ratios, plain = [], Run.steps

    def steps(self, count, what="training"):
        for step in plain(self, count, what):
            start = time.perf_counter()
            with Passes() as passes:
                yield step
            ratios.append((time.perf_counter() - start) / timed(passes.again))

    Run.steps = steps
    try:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            train()
    finally:
        Run.steps = plain
    return ratios[1:]


def methods(device, updates=12, budgets=(4, 6, 8, 10), **options):
    """All on digits. dode: its six solvers. Checkpoints are not counted."""
    head("training step / its bare network passes, digits")
    r1 = updates + 1  # a second derivative: not among the passes
    given = {
        "teacher": (teacher_script, dict(steps=updates)),
        "progressive": (progressive, dict(from_steps=4, to_steps=2, updates=updates // 2)),
        "cfd": (cfd, dict(from_steps=4, to_steps=2, cfd_from=4, updates=updates // 2)),
        "cud": (cud, dict(steps=updates, distill_steps=0)),
        "distributional": (distributional, dict(r1_every=r1)),
        **{f"ld3, nfe {n}": (ld3, dict(nfe=n, steps=updates, distance="l2")) for n in budgets},
        "dode, nfe 5": (dode, dict(nfe=(5,), fit_n=128)),
    }
    cache = os.environ.get("FEWSTEP_CACHE")
    for name, (script, chosen) in given.items():
        with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
            os.environ["FEWSTEP_CACHE"] = out  # where the teacher lands
            chosen = dict(chosen, device=str(device), out=out, **options.get(script.__name__, {}))
            config = script.Config(dataset="digits", **chosen)
            if script is distributional:
                config.images = updates * config.batch_size
                config.smoke = True  # a short training of the classifier

            def train(script=script, config=config):
                if script is ld3:
                    return fit_grid(config, load_teacher(None, "digits", device))
                return script.fit(config) if script is dode else script.train(config)

            show(name, step_over_passes(train))
    os.environ.pop("FEWSTEP_CACHE")
    if cache:
        os.environ["FEWSTEP_CACHE"] = cache


def layouts(device, batches=None, repeats=9):
    """Forward and backward pass of each shipped teacher, at the batch size of its training.

    As trained: float32, channels_last. And of CIFAR-10's network at full size, of 64 channels.
    """
    for name, batch in (batches or LAYOUTS).items():
        head(f"forward + backward / float32, channels_last; {name}, batch {batch}")
        wide = name in WIDE
        net = random_denoiser(WIDE[name], device) if wide else load_teacher(None, name, device)
        x = noise_from_seeds(range(batch), net.net.img_shape, device).float()
        labels = torch.arange(batch, device=device) % 10 if net.net.label_dim else None

        def step(teacher, dtype, x=x, labels=labels):
            with autocast(device, dtype == torch.bfloat16):
                out = teacher(x, 1.0, labels)
            out.float().square().mean().backward()

        base = None
        for dtype in (torch.float32, torch.bfloat16):
            for layout in (torch.channels_last, torch.contiguous_format):
                other = copy.deepcopy(net).to(memory_format=layout).requires_grad_(True)
                call = functools.partial(step, other, dtype)
                base = base or call
                ratios, took = compare(call, base, repeats)
                show(f"{str(dtype)[6:]}, {str(layout)[6:]}", ratios, f"{1000 * took:.1f} ms")


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
            start="logsnr",
            batch_size=int(batch),
            steps=int(steps),
            device="cpu",
            out=out,
        )
        fit_grid(config, load_teacher(None, "digits", torch.device("cpu")))
    print(memory_of_process())


def ld3_memory(batch=128, budgets=(4, 6, 8, 10)):
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
        # A tiny network may need no memory beyond what the process has.
        took, memory, trained = (frozen / whole if whole else 1 for whole, frozen in zip(*rows))
        print(f"  {'':20s} {'ratios':26s} {took:7.2f}    {memory:6.2f}      {trained:12.2f}")


# --------------------------------------------------------------- what only a GPU does at full size


def random_denoiser(make, device):
    torch.manual_seed(0)
    return Denoiser(make()).to(device, memory_format=torch.channels_last)


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
    flop, peak = flops_per_image(make), matmul_rate(torch.bfloat16, device, n)
    parameters = sum(p.numel() for p in make().parameters())
    print(f"training step, {parameters:,} parameters, {flop / 1e9:.2f} GFLOP per image")
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
                with autocast(device, dtype == torch.bfloat16):
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
                found = f"{rate:9,.0f} images/s  {rate * flop / 1e12:8.4g} TFLOP/s"
                found += f"  {100 * rate * flop / peak:5.1f} % of that product"
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
    """An LD3 update at a GPU's preset of CIFAR-10, and the whole fit that follows from it.

    The distance is l2; LPIPS comes on top. A validation every 5 updates is counted in.
    """
    teacher = random_denoiser(make, device).eval().requires_grad_(False)
    given = {**ld3.PRESETS["cifar10-gpu"], **options, "distance": "l2"}
    given.update(dataset="cifar10", device=str(device))
    for checkpoint in (False, True):
        for nfe in budgets:
            times = {}
            with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
                for steps in (5, 5, 15):  # the first is a warm-up
                    given.update(nfe=nfe, steps=steps, checkpoint=checkpoint, out=out)
                    config = ld3.Config(**given)
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
    """D-ODE's fit, all six solvers, at a GPU's preset of CIFAR-10."""
    teacher = random_denoiser(make, device).eval().requires_grad_(False)
    given = {**dode.PRESETS["cifar10-gpu"], **options}
    given.update(dataset="cifar10", device=str(device))
    for nfe in budgets:
        with tempfile.TemporaryDirectory(prefix="fewstep-") as out:
            peak_memory(device)
            fitted = dode.fit(dode.Config(nfe=(nfe,), out=out, **given), teacher=teacher)
        times = {solver: entry["fit_seconds"] for (solver, _), entry in fitted.items()}
        each = ", ".join(f"{solver} {took:.2f}" for solver, took in times.items())
        print(f"  dode nfe {nfe:2d}: {sum(times.values()):7.2f} s for all ({each})", end="")
        print(f"; {peak_memory(device):7,.0f} MiB", flush=True)


PARTS = {
    "unet": unets, "solver": solvers, "frechet": lambda device: frechet(),
    "data": lambda device: streams(), "method": methods, "layout": layouts,
    "memory": lambda device: ld3_memory(), "freeze": lambda device: gdd_freezing(),
    "step": training_steps, "fit": lambda device: (ld3_fits(device), dode_fits(device)),
}


def tiny(device):
    unets(device, ["digits"], 2)
    solvers(device, (1,), 2)
    frechet((16,), 2)
    streams(4, 8, 100, 2)
    few = dict(fit_n=8, fit_batch=8, reference_nfe=10)
    methods(device, 4, (4,), ld3=dict(batch_size=10, train_n=10, valid_n=2), dode=few)
    layouts(device, {"digits": 4}, 2)
    ld3_memory(4, (4,))
    gdd_freezing([("digits", 4), ("tiny", 2)])
    training_steps(device, TINY, (4,), 256, 2, "aot_eager")  # no C++ compiler
    ld3_fits(device, TINY, (4,), train_n=4, valid_n=2, teacher_nfe=4)
    dode_fits(device, TINY, (4,), fit_n=8, fit_batch=4, reference_nfe=10, scale=2)


def main():
    device, why = pick_device()
    print(why)
    for part in sys.argv[1:] or PARTS:
        if part == "tiny":
            tiny(device)
        elif part in ("step", "fit") and device.type != "cuda":
            print(f"{part}: full-size network of CIFAR-10: no GPU: skipped")
        else:
            PARTS[part](device)
    print(f"peak memory of this process {memory_of_process():.0f} MiB")


if __name__ == "__main__":
    if sys.argv[1:2] == ["ld3_process"]:
        ld3_process(*sys.argv[2:])
    elif sys.argv[1:2] == ["gdd_process"]:
        gdd_process(*sys.argv[2:])
    else:
        main()
