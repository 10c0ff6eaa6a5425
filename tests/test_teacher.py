"""common/teacher.py: the loss, training that resumes bitwise, files that read back, and the shipped teacher."""
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import teacher
from common.diffusion import Denoiser, GaussianMixture, sigma_grid
from common.solvers import heun
from common.training import Run, UsageError, load_checkpoint, noise_from_seeds, save_checkpoint
from common.unet import ddpmpp

ROOT = Path(__file__).parent.parent
TINY = dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), batch_size=16, warmup=2, eval_n=16, device="cpu")


def test_edm_loss_is_the_weighted_error_of_the_denoiser():
    """For one Gaussian and its exact denoiser, E |D - x0|^2 = s^2 sigma^2 / (s^2 + sigma^2) per pixel, times EDM's weight."""
    s, sigma_data = 0.3, 0.5
    exact = GaussianMixture(torch.full((1, 1, 8, 8), 0.1), torch.tensor([s]))
    denoiser = lambda x, sigma, labels: exact(x, sigma)
    denoiser.sigma_data = sigma_data
    generator = torch.Generator().manual_seed(0)
    x0 = exact.sample(4000, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for sigma in (0.05, 0.4, 3.0):
        expected = s**2 * sigma**2 / (s**2 + sigma**2) * (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        got = teacher.edm_loss(denoiser, x0, noise, torch.full((4000,), sigma, dtype=torch.float64))
        assert got.item() == pytest.approx(expected, rel=0.01)


def train(out, **options):
    return teacher.train(teacher.Config(out=str(out), save=str(out / "teacher.pt"), **{**TINY, **options}))


def weights(path):
    return load_checkpoint(path)["weights"]


def test_resumed_training_equals_an_uninterrupted_one_bitwise(tmp_path, monkeypatch):
    train(tmp_path / "whole", steps=12)
    monkeypatch.setattr(teacher, "Run", lambda *a: Run(*a, checkpoint_seconds=0))
    original, calls = teacher.edm_loss, []
    monkeypatch.setattr(teacher, "edm_loss", lambda *a: calls.append(1) or (original(*a) if len(calls) < 8 else 1 / 0))
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", steps=12)
    monkeypatch.setattr(teacher, "edm_loss", original)
    torch.manual_seed(123)  # what the process did in between must not matter
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 7
    train(tmp_path / "cut", steps=12, resume=True)
    whole, cut = (load_checkpoint(tmp_path / d / "checkpoint.pt")["parts"] for d in ("whole", "cut"))
    for part in ("net", "ema"):
        assert all(torch.equal(whole[part][k], cut[part][k]) for k in whole[part])
    for a, b in zip(whole["optimizer"]["state"].values(), cut["optimizer"]["state"].values()):
        assert torch.equal(a["exp_avg_sq"], b["exp_avg_sq"])
    assert whole["stream"] == cut["stream"] == {"position": 12 * 16}
    whole, cut = (weights(tmp_path / d / "teacher.pt") for d in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


def test_training_lowers_the_loss_and_the_ema_follows(tmp_path):
    train(tmp_path / "first", steps=1)
    path, run = train(tmp_path / "all", steps=120, lr=3e-3)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "all" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.75 * losses[0]
    start, end = (load_checkpoint(tmp_path / d / "checkpoint.pt")["parts"] for d in ("first", "all"))
    key = "model.enc.8x8_conv.weight"
    behind, way = ((end["net"][key] - other[key]).norm() for other in (end["ema"], start["net"]))
    assert 0 < behind < 0.3 * way  # the average lags behind the weights, not at their start
    torch.testing.assert_close(weights(path)[key], end["ema"][key])  # and is what is kept


def test_saved_teacher_reads_back_in_both_precisions(tmp_path):
    torch.manual_seed(0)
    kwargs = dict(img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])
    denoiser = Denoiser(ddpmpp(**kwargs), sigma_data=0.7).eval()
    x = noise_from_seeds(range(2), (1, 8, 8))
    for half, tolerance in ((False, 0), (True, 2e-3)):
        teacher.save_teacher(tmp_path / "t.pt", denoiser, "ddpmpp", kwargs, "digits", half)
        read = teacher.load_teacher(tmp_path / "t.pt", "digits", torch.device("cpu"))
        assert read.sigma_data == 0.7 and not read.training and not any(p.requires_grad for p in read.parameters())
        torch.testing.assert_close(read(x, 1.3), denoiser(x, 1.3), rtol=0, atol=tolerance or 1e-6)
    assert weights(tmp_path / "t.pt")["model.enc.8x8_conv.weight"].dtype == torch.float16


def test_what_is_no_teacher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    save_checkpoint(tmp_path / "classifier.pt", "classifier", {})
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for spec, names in ((tmp_path / "classifier.pt", ["classifier"]), (tmp_path / "junk.pt", ["junk.pt"]), ("gone.pt", ["gone.pt"]),
                        (None, ["mnist", "python -m common.teacher --dataset mnist", str(tmp_path / "cache")])):
        with pytest.raises(UsageError) as error:
            teacher.load_teacher(spec, "mnist", torch.device("cpu"))
        assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_network_that_cannot_be_built_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="halved 4 times"):
        train(tmp_path, steps=1, channel_mult=(1, 1, 1, 1, 1))


def test_shipped_teacher_makes_digits():
    """Small enough to ship, and good: its samples' nearest training digits are close, and its score is right where it is known."""
    path = teacher.SHIPPED["digits"]
    assert path.stat().st_size <= 2 * 2**20
    denoiser = teacher.load_teacher(None, "digits", torch.device("cpu"))
    data = teacher.load_dataset("digits", "train")
    x0 = teacher.load_dataset("digits", "test").images[:200].double() / 127.5 - 1
    noise = noise_from_seeds(range(200), (1, 8, 8))
    exact = GaussianMixture(data.images.double() / 127.5 - 1, torch.full((1500,), 0.05))  # the training set itself, as a mixture
    with torch.no_grad():
        for sigma in (0.2, 1.0, 5.0):  # unseen digits: must beat "one of the training digits", and plain shrinkage, everywhere
            error = lambda d, sigma=sigma: (d(x0 + sigma * noise, sigma) - x0).square().mean().item()
            shrink = GaussianMixture(data.images.double().mean(0, keepdim=True) / 127.5 - 1, torch.tensor([0.6]))
            assert error(denoiser) < error(shrink) and error(denoiser) < 1.05 * error(exact)
        sigmas = torch.cat([sigma_grid("edm", 17), torch.zeros(1, dtype=torch.float64)])
        x = heun(denoiser, 80 * noise[:64], sigmas)
    distance = torch.cdist(x.flatten(1), (data.images.double() / 127.5 - 1).flatten(1)).min(1).values.mean()
    random = torch.cdist(x0.flatten(1)[:64], (data.images.double() / 127.5 - 1).flatten(1)).min(1).values.mean()
    assert 0.3 * random < distance < 1.2 * random  # as far from the training digits as unseen digits are: neither noise nor copies


def test_a_teacher_must_fit_the_images_of_a_folder(tmp_path):
    for size in (8, 16):
        (tmp_path / str(size)).mkdir()
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / str(size) / "a.png")
    shipped = str(teacher.SHIPPED["digits"])
    assert teacher.load_teacher(shipped, "folder", torch.device("cpu"), str(tmp_path / "8")).net.img_shape == (1, 8, 8)
    with pytest.raises(UsageError, match=r"--teacher .*makes images of \(1, 8, 8\), folder has \(1, 16, 16\)"):
        teacher.load_teacher(shipped, "folder", torch.device("cpu"), str(tmp_path / "16"))


def test_converting_a_public_teacher_draws_nothing(tmp_path, monkeypatch):
    """One rank converts, the others find it done: afterwards all draw the same."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    state = load_checkpoint(teacher.SHIPPED["digits"])
    monkeypatch.setattr(teacher, "read_edm_pickle", lambda path: state)
    (tmp_path / "x.pkl").write_bytes(b"x")
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        teacher.read_edm(str(tmp_path / "x.pkl"))
        draws.append(torch.rand(()))
    assert draws[0] == draws[1]


@pytest.mark.slow
def test_command_line_trains_evaluates_and_survives_a_signal(tmp_path):
    """The documented command: SIGINT leaves a checkpoint, --resume finishes, and equals a run that was left alone."""
    command = [sys.executable, "-m", "common.teacher", "--device", "cpu", "--steps", "300", "--batch-size", "16", "--model-channels", "8",
               "--eval-n", "32"]
    environment = {**os.environ, "FEWSTEP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    cut = [*command, "--out", str(tmp_path / "cut"), "--save", str(tmp_path / "cut.pt")]
    process = subprocess.Popen(cut, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    for line in iter(lambda: process.stderr.read(80), ""):
        if "/300" in line and " 0/300" not in line:
            process.send_signal(2)
            break
    process.stderr.read()
    assert process.wait() == 130
    step = load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"]
    assert 0 < step < 300
    subprocess.run([*cut, "--resume"], cwd=ROOT, env=environment, check=True)
    whole = [*command, "--out", str(tmp_path / "whole"), "--save", str(tmp_path / "whole.pt")]
    subprocess.run(whole, cwd=ROOT, env=environment, check=True)
    whole, cut = (weights(tmp_path / f"{name}.pt") for name in ("whole", "cut"))
    assert all(torch.equal(whole[k], cut[k]) for k in whole)
    metrics = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert metrics["results"][0]["nfe"] == 35 and metrics["results"][0]["fid_n"] == 32 and (tmp_path / "whole" / "samples.png").exists()


@pytest.mark.slow
def test_two_ranks_train_as_one(tmp_path):
    """torchrun with two gloo ranks and the same global batch: the same weights to float tolerance (dropout off)."""
    options = ["--device", "cpu", "--steps", "6", "--batch-size", "16", "--model-channels", "8", "--dropout", "0", "--eval-n", "16"]
    environment = {**os.environ, "FEWSTEP_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    for k in (1, 2):
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={k}"] if k > 1 else []
        subprocess.run([sys.executable, *launcher, "-m", "common.teacher", *options, "--out", str(tmp_path / f"run{k}"), "--save",
                        str(tmp_path / f"{k}.pt")], cwd=ROOT, env=environment, check=True, capture_output=True)
    for a, b in zip(weights(tmp_path / "1.pt").values(), weights(tmp_path / "2.pt").values()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=2e-5)
