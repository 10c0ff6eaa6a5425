"""Teachers: EDM denoisers (Karras et al. 2022, arXiv:2206.00364), shipped, or trained here.

    python -m common.teacher --dataset digits                  # 2 CPU cores
    python -m common.teacher --dataset mnist                   # 2 CPU cores, an hour
    python -m common.teacher --dataset cifar10                 # 2 CPU cores, an hour; a GPU: EDM's
    python -m common.teacher --dataset folder --data-dir DIR   # square images: 10 minutes there

With a GPU, take a larger network for MNIST: --model-channels 32 --channel-mult 2 2 2 --dropout 0.1
--attn-resolutions 14 --steps 50000 --batch-size 256 --lr 1e-3 --warmup 1000 --ema-images 5e5.

Loss (Eq. 2, Table 1), sigma and x0 of the data range [-1, 1], log sigma ~ N(-1.2, 1.2^2):
    E || D(x0 + sigma noise, sigma) - x0 ||^2 (sigma^2 + sigma_data^2) / (sigma sigma_data)^2
Not EDM's: the learning rate falls linearly to 0 (theirs is constant), no augmentation.
"""
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import torch

from common import UsageError, unet
from common.datasets import ASSETS, Stream, fingerprint, load_dataset, say_once, shape_of
from common.diffusion import Denoiser, FlowDenoiser, expand, sigma_grid, with_labels
from common.fid import make_evaluator, measure
from common.machinery.diffusers_teachers import is_diffusers, load_diffusers
from common.machinery.files import cache_dir, load_weights, save_weights
from common.machinery.foreign import check_network, refusing
from common.machinery.options import (
    TrainingOptions, cli, complete, option, parse_config, require, takes_gpu,
)
from common.machinery.plots import save_rows
from common.machinery.public_teachers import convert_public, is_public
from common.machinery.run import Run
from common.solvers import heun

ARCHS = {"ddpmpp": unet.ddpmpp, "ncsnpp": unet.ncsnpp, "adm": unet.adm}
SHIPPED = {
    name: ASSETS / f"{name}-teacher.safetensors" for name in ("digits", "mnist", "cifar10")
}
PUBLIC = {  # on a GPU, and where none is shipped, unless one was trained here
    "cifar10": "edm-cifar10-32x32-uncond-vp",
    "imagenet64": "edm-imagenet-64x64-cond-adm",
}

# ---------------------------------------------------------------------------- reading and writing


def save_teacher(path, denoiser, arch, kwargs, dataset, half=False):
    """Write what `load_teacher` reads, in safetensors: weights (`half`: fp16), how to build it.

    A student of the same shape as its teacher is written with `teacher.arch, teacher.kwargs`; a
    model of diffusers into a folder, of that name without its suffix. Where the denoiser has
    `one_step_sigma`, the file says that it was trained at that noise level alone.
    """
    if arch == "diffusers":
        return denoiser.save(path)
    weights = denoiser.state_dict()
    if half:
        weights = {k: v.half() if v.is_floating_point() else v for k, v in weights.items()}
    about = {"arch": arch, "kwargs": kwargs, "sigma_data": denoiser.sigma_data}
    if isinstance(denoiser, FlowDenoiser):
        about["flow"] = {"phi": denoiser.phi}
    if hasattr(denoiser, "one_step_sigma"):
        about["one_step_sigma"] = denoiser.one_step_sigma
    save_weights(path, "teacher", weights, **about, dataset=dataset)


def save_velocity(path, velocity, config):
    """Write cud.py's network, its head 1, as a teacher."""
    flow = FlowDenoiser(velocity.net, velocity.phi)
    save_teacher(path, flow, config.arch, flow.net.kwargs, config.dataset)


def read_teacher(path):
    """A file of `save_teacher` -> Denoiser on the CPU. Raises UsageError."""
    about, weights = load_weights(path, "teacher")
    return _build({**about, "weights": weights}, path)


def _check(state, path):
    """UsageError unless {"arch", "kwargs", "sigma_data", "weights"} fit, by name, shape, value.

    A flow has {"flow": {"phi": a share or None}} as well, a generator {"one_step_sigma": sigma}.
    """
    with refusing(f"--teacher {path}: not a usable teacher"):
        if type(state.get("arch")) is not str or state["arch"] not in ARCHS:
            raise ValueError(f"its network is none of {', '.join(ARCHS)}")
        phi = state["flow"]["phi"] if "flow" in state else None
        if phi is not None and not (type(phi) in (int, float) and 0 <= phi <= 1):
            raise ValueError("its phi is not a number from 0 to 1")
        sigma = state.get("one_step_sigma", 1.0)
        if not (type(sigma) in (int, float) and 0 < sigma < math.inf):
            raise ValueError("its one_step_sigma is no noise level")
        check_network(lambda **kwargs: Denoiser(ARCHS[state["arch"]](**kwargs)), state)


def _build(state, path):
    """What `_check` takes -> Denoiser."""
    _check(state, path)
    net = ARCHS[state["arch"]](**state["kwargs"])
    if "flow" in state:
        denoiser = FlowDenoiser(net, state["flow"]["phi"])
    else:
        denoiser = Denoiser(net, state["sigma_data"])
    denoiser.load_state_dict(state["weights"])
    denoiser.arch, denoiser.kwargs = state["arch"], state["kwargs"]
    if "one_step_sigma" in state:
        denoiser.one_step_sigma = state["one_step_sigma"]
        denoiser.register_forward_pre_hook(_at_its_own_level)
    return denoiser


def _at_its_own_level(generator, inputs):
    """UsageError where a one-step generator is evaluated at another sigma than it was trained at.

    It is no denoiser there, and the images of a sampler of several steps would be meaningless.
    """
    for sigma in torch.as_tensor(inputs[1]).flatten().tolist():
        if not math.isclose(sigma, generator.one_step_sigma, rel_tol=1e-5):
            raise UsageError(
                f"--teacher: a one-step generator, trained at sigma = {generator.one_step_sigma:g} "
                f"alone, was evaluated at sigma = {sigma:.3g}; give a diffusion model"
            )


def load_student(path, student, kind="teacher"):
    """`student` with the weights that `save_teacher` wrote to `path`, frozen.

    Raises UsageError: no such file, another `kind` of file, weights of another network.
    """
    if getattr(student, "arch", None) == "diffusers":
        student.load(path)
    else:
        with refusing(f"{path}: the weights of a student of another teacher"):
            student.load_state_dict(load_weights(path, kind)[1])
    return student.requires_grad_(False)


def teacher_path(dataset, data_dir=None):
    """Where the teacher trained here on `dataset` is cached."""
    return cache_dir() / f"{dataset}{fingerprint(dataset, data_dir)}-teacher.safetensors"


def load_teacher(spec, dataset, device, data_dir=None):
    """One call gives a teacher: a frozen `Denoiser` on `device`, in eval mode.

    spec: a .safetensors of `common.teacher`, of a student or of cud.py's velocity; or path, URL or
    short name of a public EDM .pkl, which is never executed; or a folder or a hub name of a model
    of diffusers; or None: see `choose_teacher`. Raises UsageError when there is none, saying
    how to get it, or when its images have another shape than the data set's.
    """
    if spec is None:
        spec = choose_teacher(dataset, device, data_dir)
    if is_public(spec):
        spec = _converted(spec, dataset)
    denoiser = load_diffusers(spec) if is_diffusers(spec) else read_teacher(spec)
    shape = denoiser.net.img_shape
    if dataset != "folder" or data_dir:
        needed = tuple(shape_of(dataset, data_dir))
        message = f"makes images of {shape}, {dataset} has {needed}"
        require(shape == needed, "teacher", spec, message)
    return denoiser.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def takes_shipped(dataset, device):
    """Whether a data set's teacher is the shipped one: a GPU takes the public one, if there is."""
    return dataset in SHIPPED and not (dataset in PUBLIC and takes_gpu(device))


def choose_teacher(dataset, device, data_dir=None):
    """The teacher of a data set when none is named: a `spec` for `load_teacher`.

    The shipped one if `takes_shipped`; else the one trained and cached here, else the public one.
    Raises UsageError when there is none.
    """
    public, shipped = PUBLIC.get(dataset), SHIPPED.get(dataset)
    if takes_shipped(dataset, device):
        if public:
            say_once(f"teacher: {shipped.name}, the small one that is shipped, for a CPU; on a "
                     f"GPU it is {public}; --teacher chooses")
        return str(shipped)
    trained = teacher_path(dataset, data_dir)
    spec = str(trained) if trained.exists() else public
    if spec is None:
        where = f" --data-dir {data_dir}" if data_dir else ""
        raise UsageError(
            f"--teacher: no teacher for {dataset} yet (looked for {trained}); train one with "
            f"`python -m common.teacher --dataset {dataset}{where}`, or give --teacher PATH"
        )
    if shipped:
        say_once(f"teacher: {spec}, for a GPU; --teacher {shipped} is the small, shipped one")
    return spec


def _converted(spec, dataset):
    """A public teacher in our own format: its path. A refusal says what needs no download."""
    try:
        return convert_public(spec, _check)
    except UsageError as error:
        if spec != PUBLIC.get(dataset):
            raise
        instead = (
            "train a small one on the images that you have: `python -m common.teacher "
            f"--dataset {dataset} --data-dir DIR --model-channels 32 --num-blocks 1 "
            "--batch-size 64 --steps 20000`"
        )
        if dataset in SHIPPED:
            instead = f"take the small one that is shipped: --teacher {SHIPPED[dataset]}"
        raise UsageError(f"{error}; or, without a network, {instead}") from None


def check_classes(config, teacher, data):
    """UsageError unless a teacher's labels are the data set's."""
    classes = teacher.net.label_dim
    wrong = f"has {classes} classes, the data {data.num_classes}"
    require(classes in (0, data.num_classes), "teacher", config.teacher, wrong)
    generator = hasattr(teacher, "one_step_sigma")
    require(not generator, "teacher", config.teacher, "is a one-step generator, not a teacher")


# --------------------------------------------------------------------------------------- training


@dataclass
class NetworkOptions(TrainingOptions):
    """Those of a script that trains a network from scratch."""

    arch: str | None = option(None, "network: a setting of common.unet", choices=tuple(ARCHS))
    model_channels: int | None = option(None, "width of the network", above=0)
    channel_mult: tuple[int, ...] | None = option(
        None, "width per resolution, in multiples of --model-channels (folder: by the size)",
        repeats=True,
    )
    num_blocks: int | None = option(None, "residual blocks per resolution", above=0)
    patch: int | None = option(
        None, "side of the squares of pixels that become channels (default: 1, as EDM)",
        low=1, high=8,
    )
    attn_resolutions: tuple[int, ...] | None = option(None, "resolutions with self-attention")
    dropout: float | None = option(None, "dropout (EDM: 0.13 on CIFAR-10)", low=0, high=1)
    conditional: bool | None = option(None, "condition on the class labels")
    flip: bool | None = option(None, "random horizontal flips")
    steps: int | None = option(None, "optimizer steps", above=0)
    batch_size: int | None = option(None, "images per step, over all ranks", above=0)
    lr: float | None = option(None, "Adam's learning rate at its highest", above=0)
    warmup: int | None = option(None, "steps of linear warm-up", low=0)

    def fit_network(self):
        """Levels by the images' size, where neither a flag nor a preset gives them."""
        if self.channel_mult is None or self.attn_resolutions is None:
            mult, attention = levels_for(shape_of(self.dataset, self.data_dir)[-1])
            self.channel_mult = self.channel_mult or mult
            if self.attn_resolutions is None:
                self.attn_resolutions = attention


def levels_for(resolution):
    """channel_mult, attn_resolutions of a small U-Net: halved while even and above 8 pixels."""
    sizes = [resolution]
    while sizes[-1] % 2 == 0 and sizes[-1] > 8:
        sizes.append(sizes[-1] // 2)
    mult = tuple(min(2**i, 4) for i in range(len(sizes)))
    return mult, tuple(size for size in sizes[-1:] if size <= 16)


def new_network(config, data, **changes):
    """A U-Net as NetworkOptions say, for a Dataset, and the arguments it was made with.

    `changes` to the arguments come first. Raises UsageError.
    """
    classes = data.num_classes if config.conditional else 0
    message = f"{config.dataset} has no classes here"
    require(classes or not config.conditional, "conditional", config.conditional, message)
    kwargs = {
        "img_resolution": data.resolution,
        "img_channels": data.channels,
        "label_dim": classes,
        "model_channels": config.model_channels,
        "channel_mult": list(config.channel_mult),
        "num_blocks": config.num_blocks,
        "attn_resolutions": list(config.attn_resolutions),
        "dropout": config.dropout,
        **({"patch": config.patch} if config.patch else {}),
        **changes,
    }
    try:
        net = ARCHS[config.arch](**kwargs)
        net.kwargs = kwargs
        return net, kwargs
    except ValueError as error:
        mult = " ".join(map(str, levels_for(data.resolution)[0]))
        advice = f"; try --channel-mult {mult}" if "cannot be halved" in str(error) else ""
        name = f"--dataset {config.dataset} with --arch {config.arch}"
        raise UsageError(f"{name}: {error}{advice}") from None


@torch.no_grad()
def ema_update(ema, net, decay):
    """ema <- decay * ema + (1 - decay) * net, for every parameter; buffers are copied."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
    for old, new in zip(ema.buffers(), net.buffers()):
        old.copy_(new)


def ema_decay(images_seen, batch_size, halflife, ramp=0.05):
    """EDM's decay per step: half-life in images, at most `ramp` of the images seen so far."""
    return 0.5 ** (batch_size / max(min(halflife, images_seen * ramp), 1e-8))


@dataclass
class Config(NetworkOptions):
    ema_images: float | None = option(
        None, "half-life of the EMA in images (EDM: 5e5), at most 0.05 of the images seen", above=0
    )
    half: bool = option(False, "store the weights in float16")
    save: str | None = option(
        None,
        "where the teacher goes (default: the cache, where methods find it if none ships; "
        "--smoke: --out)",
    )

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        self.fit_network()


# CIFAR-10, ImageNet-64: EDM's hyper-parameters (Karras et al. 2022, F.2); the rest: chosen here.
_CIFAR10 = dict(
    arch="ddpmpp", model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
    attn_resolutions=(16,), dropout=0.13, flip=True, steps=400_000, batch_size=512, lr=1e-3,
    warmup=20_000, ema_images=5e5, eval_n=50_000, eval_batch=256,
)
PRESETS = {
    "digits": dict(
        arch="ddpmpp", model_channels=32, channel_mult=(1, 2), num_blocks=1,
        attn_resolutions=(4,), dropout=0.05, flip=False, steps=8_000, batch_size=128, lr=2e-3,
        warmup=200, ema_images=5e4, eval_n=2048, eval_batch=256,
    ),
    "mnist": dict(
        arch="ddpmpp", model_channels=16, channel_mult=(1, 2, 4), num_blocks=2,
        attn_resolutions=(7,), dropout=0.0, flip=False, steps=6500, batch_size=64, lr=2e-3,
        warmup=200, ema_images=5e4, eval_n=1000, eval_batch=32,
    ),
    "cifar10": dict(
        arch="ddpmpp", model_channels=16, channel_mult=(1, 2, 4), num_blocks=2,
        attn_resolutions=(8,), dropout=0.0, conditional=True, flip=True, steps=6000, batch_size=64,
        lr=2e-3, warmup=200, ema_images=4e4, eval_n=1024, eval_batch=64,
    ),
    "cifar10-gpu": _CIFAR10,
    "imagenet64": dict(
        arch="adm", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
        attn_resolutions=(32, 16, 8), dropout=0.1, flip=False, steps=610_000, batch_size=4096,
        lr=1e-4, warmup=2500, ema_images=5e7, eval_n=50_000, eval_batch=256,
    ),
    "folder": dict(  # channel_mult, attn_resolutions: by the images' size
        arch="ddpmpp", model_channels=16, num_blocks=1, dropout=0.0, flip=True, steps=2000,
        batch_size=32, lr=2e-3, warmup=100, ema_images=5e4, eval_n=500, eval_batch=50,
    ),
    "folder-gpu": _CIFAR10,
}
SMOKE = dict(steps=3, batch_size=8, eval_n=16, eval_batch=16, warmup=1)


def edm_loss(denoiser, x0, noise, sigma, labels=None):
    """EDM's loss, averaged over batch and pixels. x0, noise (B, C, H, W); sigma (B,)."""
    s = expand(sigma, x0)
    weight = (s**2 + denoiser.sigma_data**2) / (s * denoiser.sigma_data) ** 2
    return (weight * (denoiser(x0 + s * noise, sigma, labels) - x0).square()).mean()


def train(config):
    """Train and cache a teacher; return its path and the Run."""
    run = Run("teacher", config)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    net, kwargs = new_network(config, data)
    denoiser = Denoiser(net).to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.lr, fused=True)
    stream = Stream(data, config.batch_size, config.seed, config.flip)
    run.prepare(denoiser.net)
    run.say(f"{len(data.images):,} images of {data.resolution}x{data.resolution}")

    def loss_fn(x0, noise, sigma, labels):
        return edm_loss(denoiser, x0, noise, sigma, labels)

    run.resume(net=denoiser, ema=ema, optimizer=optimizer, stream=stream)
    for step in run.steps(config.steps):
        for group in optimizer.param_groups:
            warmed_up = (step + 1) / max(1, config.warmup)
            group["lr"] = config.lr * min(warmed_up, 1 - step / config.steps)
        x0, labels = stream.next()  # (B, C, H, W), (B,)
        sigma = run.randn(config.batch_size).mul(1.2).sub(1.2).exp()  # (B,)
        noise = run.randn(config.batch_size, *x0.shape[1:])
        run.loss = run.backward(optimizer, loss_fn, x0, noise, sigma, labels)
        optimizer.step()
        seen = step * config.batch_size
        ema_update(ema, denoiser, ema_decay(seen, config.batch_size, config.ema_images))

    cached = teacher_path(config.dataset, config.data_dir)
    path = Path(config.save or (run.out / "teacher.safetensors" if config.smoke else cached))
    if run.rank == 0:
        save_teacher(path, ema, config.arch, kwargs, config.dataset, config.half)
        run.say(f"teacher saved to {path}")
    run.wait()
    return path, run


def main():
    config = parse_config(Config, PRESETS, __doc__)
    path, run = train(config)
    denoiser = load_teacher(path, config.dataset, run.device)
    sigmas = torch.cat([sigma_grid("edm", 17), torch.zeros(1, dtype=torch.float64)])

    def sampler(noise, labels):  # EDM's own: Heun with 18 steps, 35 evaluations
        return heun(with_labels(denoiser, labels), sigmas[0].item() * noise, sigmas)

    evaluator = make_evaluator(config, run.device)
    rows, pictures = measure(run, {("teacher", 35): sampler}, denoiser.net, evaluator)
    save_rows(run.out / "samples.png", pictures)
    run.finish(rows, teacher=str(path))


if __name__ == "__main__":
    cli(main)
