"""`--dataset cifar10` and `imagenet64`: a GPU's presets are the papers', and every script runs so.

The runs see small stand-ins: some random coloured images where the real files would lie, and
networks of the same kind with few channels.
"""

import importlib
import io
import json
import math
import socket
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from common.diffusion import GRIDS, Denoiser
from common.machinery import options
from common.teacher import ARCHS, save_teacher
from scripts import results, take_few_of_cifar10, write_cifar10
from test_house import SCRIPTS

DATASETS = ("cifar10", "imagenet64")

DDPMPP = dict(
    arch="ddpmpp", model_channels=128, channel_mult=(2, 2, 2), num_blocks=4,
    attn_resolutions=(16,), dropout=0.13,
)
ADM = dict(
    arch="adm", model_channels=192, channel_mult=(1, 2, 3, 4), num_blocks=3,
    attn_resolutions=(32, 16, 8), dropout=0.1,
)
PD = dict(clip=1.0, weight="truncated", to_steps=1, updates=50_000, flip=True)
CFD = dict(
    from_steps=1024, cfd_from=8, updates=10_000, clip=1.0, tau=0.9, beta=0.0, gamma=0.75,
    to_steps=1, flip=True,
)
CUD = dict(
    steps=500_000, warmup=5000, kl_weight=20.0, phi=0.75, shakedrop=True, independent=False,
    tn=16, adaptive_weight=False, distill_steps=40_000,
)
GDD = dict(
    r1_every=16, freeze="conv", sigma_max=80.0, features="imagenet", width=64
)
LD3 = dict(
    solver="unipc", order=3, train_n=50, valid_n=50, batch_size=2, steps=7 * 25,
    theta1_steps=2 * 25, lr1=5e-3, lr2=0.1, lr_latent=12.0, radius=0.001, mode="lambda",
    teacher_nfe=20, sigma_min=0.002, sigma_max=80.0, objective="soft", times="decoupled",
)
DODE = dict(
    scale=10, fit_n=100, sigma_min=0.002, sigma_max=80.0, grid="edm", output="x0",
    solver=("ddim", "ipndm", "dpm2", "deis2", "deis3", "heun"),
)
# Typed from PAPERS.md, not from the scripts; its section stands above each.
PUBLISHED = {
    # 1b
    ("progressive", "cifar10"): dict(PD, from_steps=8192, batch_size=128, lr=5e-5),
    ("progressive", "imagenet64"): dict(PD, from_steps=1024, batch_size=2048, lr=1e-4),
    # 2b: with DenseNet201 on CIFAR-10. No settings for ImageNet: batch and learning rate of 1b.
    ("cfd", "cifar10"): dict(CFD, batch_size=128, lr=5e-5),
    ("cfd", "imagenet64"): dict(CFD, batch_size=2048, lr=1e-4),
    # 3b
    ("cud", "cifar10"): dict(
        CUD, **DDPMPP, batch_size=128, lr=2e-4, encoder_channels=32, flip=True, conditional=False
    ),
    # and section 10: classes, z1 = noise, no warm-up
    ("cud", "imagenet64"): dict(
        CUD | ADM, batch_size=1024, lr=4e-4, warmup=0, independent=True, flip=True,
        conditional=True,
    ),
    # 4b
    ("dode", "cifar10"): DODE,
    ("dode", "imagenet64"): DODE,
    # 5b
    ("distributional", "cifar10"): dict(
        GDD, batch_size=256, lr=1e-4, lr_d=1e-4, images=5_000_000, ema_images=5e5,
        r1_gamma=1e-4 / 16,  # "Scale" of 5a: their losses are sums over 64 images a GPU
    ),
    ("distributional", "imagenet64"): dict(
        GDD, batch_size=512, lr=8e-6, lr_d=4e-5, images=10_000_000, ema_images=5e7,
        r1_gamma=1e-4 / 32,
    ),
    # 6b: the settings of its pixel models; its only ImageNet run is in a latent space.
    ("ld3", "cifar10"): LD3,
    ("ld3", "imagenet64"): LD3,
    # Karras et al. 2022, appendix F.2, table 7: 200 and 2500 million images, 10 of warm-up.
    ("common.teacher", "cifar10"): dict(
        DDPMPP, batch_size=512, lr=1e-3, ema_images=5e5, flip=True
    ),
    ("common.teacher", "imagenet64"): dict(
        ADM, batch_size=4096, lr=1e-4, ema_images=5e7, flip=False
    ),
}


@pytest.mark.parametrize("script,dataset", PUBLISHED)
def test_a_preset_is_what_the_paper_did(script, dataset):
    config = importlib.import_module(script).Config(dataset=dataset, device="cuda")
    ours = {name: getattr(config, name) for name in PUBLISHED[script, dataset]}
    assert ours == PUBLISHED[script, dataset]
    assert config.eval_n == 50_000  # the FID of all these papers
    if script == "common.teacher":
        images, warm_up = {"cifar10": (200e6, 10e6), "imagenet64": (2500e6, 10e6)}[dataset]
        assert config.steps * config.batch_size == pytest.approx(images, rel=0.03)
        assert config.warmup * config.batch_size == pytest.approx(warm_up, rel=0.03)


# -------------------------------------------------------------------- the small stand-ins

SMALL = {
    "cifar10": dict(model_channels=8, channel_mult=[2, 2, 2], num_blocks=1, attn_resolutions=[16]),
    # One head at 8 x 8.
    "imagenet64": dict(
        model_channels=8, channel_mult=[1, 2, 3, 8], num_blocks=1, attn_resolutions=[32, 16, 8]
    ),
}


def colours(n, size, seed):
    """n images (n, size, size, 3) with large, random patches of colour: their features differ."""
    patches = np.random.default_rng(seed).integers(0, 256, (n, 4, 4, 3), np.uint8)
    return patches.repeat(size // 4, 1).repeat(size // 4, 2)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """data set -> the folder or zip with its files.

    CIFAR-10's own pickles, and a zip as EDM's dataset_tool writes it.
    """
    folder = tmp_path_factory.mktemp("data")
    train, test = (colours(64, 32, seed).transpose(0, 3, 1, 2) for seed in (0, 1))
    labels = [i % 10 for i in range(64)]
    write_cifar10(folder, (train, labels), (test, labels))
    with zipfile.ZipFile(folder / "imagenet-64x64.zip", "w") as archive:
        names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(32)]
        for name, pixels in zip(names, colours(32, 64, 2)):
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "png")
            archive.writestr(name, png.getvalue())
        labels = [[name, i % 5] for i, name in enumerate(names)]
        archive.writestr("dataset.json", json.dumps({"labels": labels}))
    return {"cifar10": folder, "imagenet64": folder / "imagenet-64x64.zip"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """data set -> a small teacher as the public one is.

    CIFAR-10's DDPM++ without classes, ImageNet's ADM with them.
    """
    paths, kinds = {}, [("cifar10", "ddpmpp", 32, 0), ("imagenet64", "adm", 64, 5)]
    for dataset, arch, size, classes in kinds:
        torch.manual_seed(0)
        kwargs = dict(img_resolution=size, img_channels=3, label_dim=classes, dropout=0.1)
        kwargs.update(SMALL[dataset])
        net = ARCHS[arch](**kwargs)
        with torch.no_grad():
            for parameter in net.parameters():  # or ADM's output is 0 everywhere
                parameter.add_(0.02 * torch.randn_like(parameter))
        paths[dataset] = tmp_path_factory.mktemp("teacher") / f"{dataset}.pt"
        save_teacher(paths[dataset], Denoiser(net), arch, kwargs, dataset)
    return paths


@pytest.fixture(autouse=True)
def files_of_cifar10(monkeypatch):
    take_few_of_cifar10(monkeypatch)


ROWS = {
    "ld3": {*GRIDS, "ld3", "teacher"},
    "dode": {
        *DODE["solver"], *(f"d-{s}" for s in DODE["solver"]), "ab2", "dpmpp2m", "untrained",
        "teacher",
    },
    "progressive": {"ddim", "ddim-edm", "untrained", "pd", "teacher"},
    "cfd": {"ddim", "ddim-edm", "untrained", "pd", "cfd", "teacher"},
    "cud": {"cud", "cud-1step"},
    "distributional": {"ddim", "untrained", "gdd-i", "teacher"},
    "common.teacher": {"teacher"},
}
FILES = {
    "ld3": ["grids.png", "schedule.json"],
    "dode": ["lambdas.png", "lambdas.json"],
    "progressive": ["fid.png", "student-1.safetensors"],
    "cfd": ["fid.png", "student-1.safetensors"],
    "cud": ["fid.png"],
    "distributional": ["losses.png", "generator.safetensors"],
    "common.teacher": ["teacher.safetensors"],
}


@pytest.mark.slow
@pytest.mark.parametrize("dataset", DATASETS)
@pytest.mark.parametrize("script", [*SCRIPTS, "common.teacher"])
def test_a_preset_runs_from_end_to_end(script, dataset, places, teachers, tmp_path, monkeypatch):
    module = importlib.import_module(script)
    flags = {"data_dir": places[dataset]}
    if script in ("cud", "common.teacher"):  # from scratch
        flags.update(SMALL[dataset], **{"cud": {"encoder_channels": 8}}.get(script, {}))
    else:
        flags["teacher"] = teachers[dataset]
    if script == "common.teacher" and dataset == "imagenet64":
        flags["conditional"] = True
    if script == "ld3":
        flags["distance"] = "features"  # LPIPS, where it is installed, wants a download
    words = ["--dataset", dataset, "--smoke", "--device", "cpu", "--out", str(tmp_path)]
    for name, value in flags.items():
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += ["--" + name.replace("_", "-"), *map(str, values)]
    without, forward = set(), Denoiser.forward

    def spy(self, x, sigma, labels=None):
        without.add(bool(self.net.label_dim) and labels is None)
        return forward(self, x, sigma, labels)

    monkeypatch.setattr(options, "takes_gpu", lambda device: True)  # of the preset alone
    monkeypatch.setattr(Denoiser, "forward", spy)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    module.main()
    # A network with classes is never evaluated without one.
    assert without == ({False} if script != "cud" else set())

    metrics = json.loads((tmp_path / "metrics.json").read_text())
    rows, recorded = metrics["results"], metrics["config"]
    names = {row["name"].partition(" (")[0] for row in rows}  # untrained (solver, grid)
    assert names == ROWS[script] and metrics["dataset"] == dataset
    for row in rows:
        numbers = [value for value in row.values() if isinstance(value, (int, float))]
        assert row["fid"] > 0 and all(map(math.isfinite, numbers)), row
        assert row["fid_features"].startswith(f"{dataset}-classifier")
        assert row["fid_n"] == recorded["eval_n"]
    assert script != "common.teacher" or rows[0]["nfe"] == 35
    for name in ["samples.png", *(name for name in FILES[script] if name.endswith(".png"))]:
        with Image.open(tmp_path / name) as picture:
            colours_there = picture.convert("RGB").getcolors(2**24)
            assert min(picture.size) > 30 and len(colours_there) > 10, name
    for name in [*FILES[script], "log.jsonl", "checkpoint.pt"]:
        assert (tmp_path / name).stat().st_size > 0, name
    # What --smoke and the flags leave alone is the paper's.
    published = PUBLISHED[script, dataset]
    kept = {k: v for k, v in published.items() if k not in flags and k not in module.SMOKE}
    smoked = {k: v for k, v in module.SMOKE.items() if k not in flags}
    assert len(kept) >= 2
    for expected in (kept, smoked):
        assert {k: recorded[k] for k in expected} == json.loads(json.dumps(expected))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_cifar10_on_a_cpu_is_a_laptops(script, places, tmp_path, monkeypatch):
    """And what needs no training images needs no data: neither a download nor a folder."""
    module = importlib.import_module(script)
    assert module.PRESETS["cifar10"] != module.PRESETS["cifar10-gpu"]
    data = [] if script in ("ld3", "dode") else ["--data-dir", str(places["cifar10"])]
    words = ["--dataset", "cifar10", "--smoke", "--device", "cpu", "--out", str(tmp_path), *data]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    monkeypatch.setattr(socket.socket, "connect", lambda *args: pytest.fail("a download"))
    module.main()
    rows = results(tmp_path)
    assert {row["fid_features"] for row in rows} == {"cifar10-classifier"}
