"""Teachers: EDM denoisers (Karras et al. 2022, arXiv 2206.00364), shipped, or trained here and cached.

    python -m common.teacher --dataset digits                  # 2 CPU cores
    python -m common.teacher --dataset mnist                   # one GPU
    python -m common.teacher --dataset folder --data-dir DIR   # any folder of square images

Loss: E || D(x0 + sigma noise, sigma) - x0 ||^2 (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, log sigma ~ N(-1.2, 1.2^2) (Eq. 2,
Table 1). Not EDM's: the learning rate falls linearly to 0 (theirs stays constant; a decay suits short runs), no augmentation.
"""
import copy
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from common import unet
from common.datasets import Stream, fingerprint, load_dataset, locked, shape_of
from common.diffusion import Denoiser, expand, sigma_grid, with_labels
from common.edm_pickle import NAMES, PUBLIC, read_edm_pickle
from common.fid import make_judge, measure
from common.plots import save_rows
from common.solvers import heun
from common.training import (SCORES, Run, TrainingOptions, UsageError, accumulate, autocast, average_gradients, cache_dir, cli, download,
                             ema_decay, ema_update, fill_from_presets, load_checkpoint, option, parse_config, prepare, require,
                             save_checkpoint, save_json, table)

ARCHS = {"ddpmpp": unet.ddpmpp, "ncsnpp": unet.ncsnpp, "adm": unet.adm}
SHIPPED = {"digits": Path(__file__).parent / "assets" / "digits-teacher.pt"}
DEFAULT = {"cifar10": "edm-cifar10-32x32-uncond-vp", "imagenet64": "edm-imagenet-64x64-cond-adm"}  # where none was trained here


# --------------------------------------------------------------------------------------------------------------- reading and writing

def save_teacher(path, denoiser, arch, kwargs, dataset, half=False):
    """Write a teacher that `load_teacher` reads: the constructor's arguments and the weights, in float16 if `half`."""
    weights = {k: v.half() if half and v.is_floating_point() else v for k, v in denoiser.state_dict().items()}
    save_checkpoint(path, "teacher", {"arch": arch, "kwargs": kwargs, "sigma_data": denoiser.sigma_data, "dataset": dataset,
                                      "weights": weights})


def read_teacher(path):
    """A file written by `save_teacher` -> Denoiser on the CPU. Raises UsageError if it is anything else."""
    state = load_checkpoint(path)
    if state["fewstep"] != "teacher":
        raise UsageError(f"--teacher {path}: this is a {state['fewstep']} checkpoint, not a teacher")
    return _denoiser(state, path)


def _denoiser(state, path):
    """{"arch", "kwargs", "sigma_data", "weights"} -> Denoiser, every name and shape as it must be."""
    try:
        denoiser = Denoiser(ARCHS[state["arch"]](**state["kwargs"]), state["sigma_data"])
        denoiser.load_state_dict(state["weights"])
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise UsageError(f"--teacher {path}: its weights do not fit its architecture ({' '.join(str(error).split())[:200]})") from None
    denoiser.arch, denoiser.kwargs = state["arch"], state["kwargs"]  # what `save_teacher` needs to write a student of the same shape
    return denoiser


def read_edm(spec):
    """A public EDM checkpoint (short name, URL or path of a .pkl) -> Denoiser on the CPU; kept in the cache in our own format.

    A downloaded file's size and SHA-256 are recorded beside it, and checked whenever it is read again. Raises UsageError.
    """
    url = f"{PUBLIC}{spec}.pkl" if spec in NAMES else spec if "://" in spec else None
    path = cache_dir() / Path(url).name if url else Path(spec)
    with locked(cache_dir() / path.name):
        fresh = url and not path.exists()
        if url:
            download(url, path, f"--teacher {spec}")
        try:
            data = path.read_bytes()
        except OSError as error:
            raise UsageError(f"--teacher {path}: {error.strerror}") from None
        found, record = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}, path.with_name(path.name + ".json")
        if fresh:
            save_json(record, found)
        elif url and record.exists() and json.loads(record.read_text()) != found:
            raise UsageError(f"--teacher {spec}: {path} is no longer the file that was downloaded ({record.name}); delete it")
        converted = cache_dir() / f"{path.stem}-{found['sha256'][:8]}.pt"
        if not converted.exists():
            with torch.random.fork_rng([]):  # a network's first weights are drawn, but on this rank and this time alone
                state = read_edm_pickle(path)
                save_teacher(converted, _denoiser(state, path), state["arch"], state["kwargs"], dataset=None)
    return read_teacher(converted)


def teacher_path(dataset, data_dir=None):
    """Where the teacher trained here on `dataset` is cached; a folder's teacher carries the folder's name and path."""
    return cache_dir() / f"{dataset}{fingerprint(dataset, data_dir)}-teacher.pt"


def load_teacher(spec, dataset, device, data_dir=None):
    """One call gives a teacher: a frozen `Denoiser` on `device`, in eval mode.

    spec: None (the shipped teacher of `dataset`, or the one trained and cached here, or the public EDM one) | path to a checkpoint of
    `common.teacher` | path, URL or short name of a public EDM .pkl (`common.edm_pickle.NAMES`), which is never executed.
    Raises UsageError when there is none, saying how to get it, or when it makes images of another shape than the data set's.
    """
    if spec is None:
        trained = SHIPPED.get(dataset, teacher_path(dataset, data_dir))
        spec = str(trained) if trained.exists() else DEFAULT.get(dataset)
        if spec is None:
            where = f" --data-dir {data_dir}" if data_dir else ""
            raise UsageError(f"--teacher: no teacher for {dataset} yet (looked for {trained}); train one with "
                             f"`python -m common.teacher --dataset {dataset}{where}`, or give --teacher PATH")
    denoiser = read_edm(spec) if spec in NAMES or "://" in str(spec) or str(spec).endswith(".pkl") else read_teacher(spec)
    right = tuple(shape_of(dataset, data_dir)) if dataset != "folder" or data_dir else denoiser.net.img_shape
    require(denoiser.net.img_shape == right, "teacher", spec, f"makes images of {denoiser.net.img_shape}, {dataset} has {right}")
    return denoiser.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)


def check_classes(config, teacher, data):
    """UsageError unless a teacher's labels are the data set's."""
    require(teacher.net.label_dim in (0, data.num_classes), "teacher", config.teacher,
            f"has {teacher.net.label_dim} classes, the data {data.num_classes}")


# ------------------------------------------------------------------------------------------------------------------------- training

@dataclass
class NetworkOptions(TrainingOptions):
    """Those of a script that trains a network from scratch."""
    arch: str | None = option(None, "network: a setting of common.unet", choices=tuple(ARCHS))
    model_channels: int | None = option(None, "width of the network")
    channel_mult: tuple[int, ...] | None = option(None, "width per resolution, in multiples of --model-channels")
    num_blocks: int | None = option(None, "residual blocks per resolution")
    attn_resolutions: tuple[int, ...] | None = option(None, "resolutions with self-attention")
    dropout: float | None = option(None, "dropout (EDM: 0.13 on CIFAR-10)")
    conditional: bool = option(False, "condition on the class labels")
    flip: bool | None = option(None, "random horizontal flips")
    steps: int | None = option(None, "optimizer steps")
    batch_size: int | None = option(None, "images per step, over all ranks")
    lr: float | None = option(None, "Adam's learning rate at its highest")
    warmup: int | None = option(None, "steps of linear warm-up")


def new_network(config, data, **changes):
    """A U-Net as NetworkOptions say, for a Dataset, and the arguments it was made with; `changes` come first. Raises UsageError."""
    require(not config.conditional or data.num_classes, "conditional", config.conditional, f"{config.dataset} has no classes here")
    kwargs = dict(img_resolution=data.resolution, img_channels=data.channels, label_dim=data.num_classes if config.conditional else 0,
                  model_channels=config.model_channels, channel_mult=list(config.channel_mult), num_blocks=config.num_blocks,
                  attn_resolutions=list(config.attn_resolutions), dropout=config.dropout) | changes
    try:
        return ARCHS[config.arch](**kwargs), kwargs
    except ValueError as error:
        raise UsageError(f"--dataset {config.dataset} with --arch {config.arch}: {error}") from None


@dataclass
class Config(NetworkOptions):
    ema_images: float | None = option(None, "half-life of the EMA in images (EDM: 5e5), at most 0.05 of the images seen")
    half: bool = option(False, "store the weights in float16")
    save: str | None = option(None, "where the teacher goes (default: the cache, where the methods find it; --smoke: --out)")

    def __post_init__(self):
        fill_from_presets(self, PRESETS, SMOKE)
        for name in ("steps", "batch_size", "lr", "model_channels", "num_blocks"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")


# CIFAR-10 and ImageNet-64: EDM's table of hyper-parameters (Karras et al. 2022, appendix F.2); the rest was chosen here.
_CIFAR10 = dict(arch="ddpmpp", model_channels=128, channel_mult=(2, 2, 2), num_blocks=4, attn_resolutions=(16,), dropout=0.13, flip=True,
                steps=400_000, batch_size=512, lr=1e-3, warmup=20_000, ema_images=5e5, eval_n=50_000, eval_batch=256)
PRESETS = {
    "digits": dict(arch="ddpmpp", model_channels=32, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), dropout=0.05, flip=False,
                   steps=8_000, batch_size=128, lr=2e-3, warmup=200, ema_images=5e4, eval_n=2048, eval_batch=256),
    "mnist": dict(arch="ddpmpp", model_channels=32, channel_mult=(2, 2, 2), num_blocks=2, attn_resolutions=(14,), dropout=0.1, flip=False,
                  steps=50_000, batch_size=256, lr=1e-3, warmup=1000, ema_images=5e5, eval_n=10_000, eval_batch=256),
    "cifar10": _CIFAR10,
    "imagenet64": dict(arch="adm", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3, attn_resolutions=(32, 16, 8), dropout=0.1,
                       flip=False, steps=610_000, batch_size=4096, lr=1e-4, warmup=2500, ema_images=5e7, eval_n=50_000, eval_batch=256),
    "folder": _CIFAR10,
}
SMOKE = dict(steps=3, batch_size=8, eval_n=16, eval_batch=16, warmup=1)


def edm_loss(denoiser, x0, noise, sigma, labels=None):
    """EDM's loss (Eq. 2 with Table 1's weight), averaged over batch and pixels. x0, noise (B, C, H, W); sigma (B,)."""
    s = expand(sigma, x0)
    weight = (s**2 + denoiser.sigma_data**2) / (s * denoiser.sigma_data) ** 2
    return (weight * (denoiser(x0 + s * noise, sigma, labels) - x0).square()).mean()


def train(config):
    """Train, cache and measure a teacher; return its path and the row of metrics.json."""
    run = Run("teacher", config)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    per_rank, mine = run.rows(config.batch_size)
    net, kwargs = new_network(config, data)
    denoiser = Denoiser(net).to(run.device, memory_format=torch.channels_last)
    ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
    optimizer = torch.optim.Adam(denoiser.parameters(), lr=config.lr, fused=True)
    stream = Stream(data, per_rank, config.seed, config.flip, run.rank, run.world)
    prepare(config, denoiser.net)

    def loss_of(*batch):
        with autocast(run.device):
            return edm_loss(denoiser, *batch)

    run.say(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(data.images):,} images")

    parts = {"net": denoiser, "ema": ema, "optimizer": optimizer, "stream": stream}
    first = run.restore(parts)
    for step in run.steps(first, config.steps, parts):
        lr = config.lr * min((step + 1) / max(1, config.warmup), 1 - step / config.steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x0, labels = stream.next()
        sigma = torch.randn(config.batch_size, device=run.device)[mine].mul(1.2).sub(1.2).exp()  # (B,)
        noise = torch.randn(config.batch_size, *x0.shape[1:], device=run.device)[mine]
        optimizer.zero_grad()
        run.loss = accumulate(loss_of, (x0, noise, sigma, labels if config.conditional else None), config.batch_per_gpu)
        average_gradients(denoiser.parameters())
        optimizer.step()
        ema_update(ema, denoiser, ema_decay(step * config.batch_size, config.batch_size, config.ema_images))

    path = Path(config.save or (run.out / "teacher.pt" if config.smoke else teacher_path(config.dataset, config.data_dir)))
    if run.rank == 0:
        save_teacher(path, ema, config.arch, kwargs, config.dataset, config.half)
        run.say(f"teacher saved to {path}")
    run.wait()
    return path, run


def evaluate(config, path, run):
    """EDM's own sampler, Heun with 18 steps (35 evaluations), against the training images: one row, and a picture."""
    denoiser = load_teacher(path, config.dataset, run.device)
    judge = make_judge(config, run.device)
    sigmas = torch.cat([sigma_grid("edm", 17), torch.zeros(1, dtype=torch.float64)])

    def sampler(noise, labels):
        return heun(with_labels(denoiser, labels), sigmas[0].item() * noise, sigmas)

    rows, pictures = measure({("teacher", 35): sampler}, config, denoiser.net.img_shape, run.device, judge, denoiser.net.label_dim)
    if run.rank == 0:
        save_rows(run.out / "samples.png", pictures)
    return rows


def main():
    config = parse_config(Config, PRESETS, __doc__)
    path, run = train(config)
    results = evaluate(config, path, run)
    run.metrics(results, teacher=str(path))
    run.say(table(results, ["name", "nfe", *SCORES]))


if __name__ == "__main__":
    cli(main)
