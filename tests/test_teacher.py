"""common/teacher.py: the loss, training that resumes bitwise, files, the shipped teacher."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

import cud
import progressive
from common import UsageError, teacher
from common.datasets import load_dataset, to_float
from common.diffusion import Denoiser, GaussianMixture, noise_from_seeds, sigma_grid
from common.machinery import public_teachers
from common.machinery.files import load_checkpoint, load_weights, save_weights
from common.machinery.run import Run
from common.solvers import heun
from common.unet import ddpmpp
from scripts import differences, watch

ROOT = Path(__file__).parent.parent
TINY = dict(
    model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,), batch_size=16,
    warmup=2, eval_n=16, device="cpu",
)


# ------------------------------------------------------------------------- the loss and the EMA


def test_edm_loss_is_the_weighted_error_of_the_denoiser():
    """For one Gaussian and its exact denoiser the error is known, here times EDM's weight.

    E |D - x0|^2 = s^2 sigma^2 / (s^2 + sigma^2) per pixel.
    """
    s, sigma_data = 0.3, 0.5
    exact = GaussianMixture(torch.full((1, 1, 8, 8), 0.1), torch.tensor([s]))
    denoiser = lambda x, sigma, labels: exact(x, sigma)
    denoiser.sigma_data = sigma_data
    generator = torch.Generator().manual_seed(0)
    x0 = exact.sample(4000, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for sigma in (0.05, 0.4, 3.0):
        error = s**2 * sigma**2 / (s**2 + sigma**2)
        weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
        got = teacher.edm_loss(denoiser, x0, noise, torch.full((4000,), sigma, dtype=torch.float64))
        assert got.item() == pytest.approx(error * weight, rel=0.01)


def test_ema_update_is_its_formula():
    ema, net = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    with torch.no_grad():
        for k, p in enumerate([*ema.parameters(), *net.parameters()]):
            p.copy_(torch.arange(3.0) + k)
        net.running_mean.fill_(4.0)
        net.num_batches_tracked.fill_(9)
    before = [p.detach().clone() for p in ema.parameters()]
    teacher.ema_update(ema, net, 0.75)
    for new, old, now in zip(ema.parameters(), before, net.parameters()):
        assert torch.allclose(new, 0.75 * old + 0.25 * now, rtol=0, atol=1e-6)
        assert not torch.equal(old, now)
    assert torch.equal(ema.running_mean, net.running_mean) and ema.num_batches_tracked == 9
    assert all(p.requires_grad and p.grad is None for p in ema.parameters())
    teacher.ema_update(ema, net, 0.0)
    assert all(torch.equal(a, b) for a, b in zip(ema.parameters(), net.parameters()))


def test_ema_decay():
    decay = teacher.ema_decay
    assert decay(0, 64, 1000) == 0  # nothing seen: the EMA is the network
    assert decay(10**9, 1000, 1000) == 0.5  # a batch of one half-life
    # After `halflife` images half is forgotten.
    assert abs(decay(10**9, 64, 500_000) ** (500_000 / 64) - 0.5) < 1e-9
    # At the start: 5 % of the images seen.
    assert abs(decay(2000, 64, 500_000) - 0.5 ** (64 / 100)) < 1e-12
    assert abs(decay(2000, 64, 500_000, ramp=0.5) - 0.5 ** (64 / 1000)) < 1e-12


# ------------------------------------------------------------------------------------- training


def train(out, **options):
    return teacher.train(
        teacher.Config(out=str(out), save=str(out / "teacher.safetensors"), **{**TINY, **options})
    )


def test_noise_levels_are_log_normal_and_noise_is_unit_gaussian(tmp_path, monkeypatch):
    """EDM, Table 1: log sigma ~ N(-1.2, 1.2^2), independent of image and noise."""
    seen = watch(monkeypatch, teacher, "edm_loss")
    train(tmp_path, steps=12, batch_size=128)
    x0, noise, sigma = (torch.cat(parts) for parts in list(zip(*seen))[1:4])
    x0, noise, log_sigma, n = x0.flatten(1), noise.flatten(1), sigma.log(), len(sigma)
    assert n == 12 * 128
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=5 * 1.2 / n**0.5)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=5 * 1.2 / (2 * n) ** 0.5)
    noise_n = noise.numel()
    assert noise.mean().item() == pytest.approx(0, abs=5 / noise_n**0.5)
    assert noise.std().item() == pytest.approx(1, abs=5 / (2 * noise_n) ** 0.5)
    correlations = torch.corrcoef(torch.stack([log_sigma, x0.mean(1), noise.mean(1)]))
    assert correlations.fill_diagonal_(0).abs().max() < 5 / n**0.5
    images = load_dataset("digits").images.flatten(1)
    found = {tuple(row.tolist()) for row in to_float(images)}
    assert all(tuple(row.tolist()) in found for row in x0)  # clean images of the data set


def test_the_rate_rises_linearly_then_falls_to_0(tmp_path, monkeypatch):
    rates, step = [], torch.optim.Adam.step

    def spy(self, *arguments):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", spy)
    train(tmp_path, steps=10, warmup=4, lr=1.0)
    expected = [min((k + 1) / 4, 1 - k / 10) for k in range(10)]
    assert rates == pytest.approx(expected) and max(rates) == pytest.approx(0.75)


def test_resumed_training_equals_an_uninterrupted_one_bitwise(tmp_path, monkeypatch):
    train(tmp_path / "whole", steps=12)
    monkeypatch.setattr(teacher, "Run", lambda *a: Run(*a, checkpoint_seconds=0))
    watch(monkeypatch, teacher, "edm_loss", fails_at=8)
    with pytest.raises(ZeroDivisionError):
        train(tmp_path / "cut", steps=12)
    torch.manual_seed(123)  # what the process did in between must not matter
    assert load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == 7
    train(tmp_path / "cut", steps=12, resume=True)
    paths = (tmp_path / name / "checkpoint.pt" for name in ("whole", "cut"))
    whole, cut = (load_checkpoint(path)["parts"] for path in paths)
    assert not differences(whole, cut) and whole["stream"] == {"position": 12 * 16}
    files = (load_file(tmp_path / d / "teacher.safetensors") for d in ("whole", "cut"))
    assert not differences(*files)


def test_training_lowers_the_loss_and_the_ema_follows(tmp_path):
    train(tmp_path / "first", steps=1)
    path, run = train(tmp_path / "all", steps=120, lr=3e-3)
    _, losses = run.logged("loss")
    assert losses[-1] < 0.75 * losses[0]
    paths = (tmp_path / name / "checkpoint.pt" for name in ("first", "all"))
    start, end = (load_checkpoint(path)["parts"] for path in paths)
    key = "model.enc.8x8_conv.weight"
    behind, way = ((end["net"][key] - other[key]).norm() for other in (end["ema"], start["net"]))
    assert 0 < behind < 0.3 * way  # the average lags behind the weights, not at their start
    torch.testing.assert_close(load_file(path)[key], end["ema"][key])  # and is what is kept


def test_saved_teacher_reads_back_in_both_precisions(tmp_path):
    torch.manual_seed(0)
    kwargs = dict(img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1])
    kwargs.update(num_blocks=1, attn_resolutions=[])
    denoiser = Denoiser(ddpmpp(**kwargs), sigma_data=0.7).eval()
    x = noise_from_seeds(range(2), (1, 8, 8))
    for half, tolerance in ((False, 0), (True, 2e-3)):
        teacher.save_teacher(tmp_path / "t.pt", denoiser, "ddpmpp", kwargs, "digits", half)
        read = teacher.load_teacher(tmp_path / "t.pt", "digits", torch.device("cpu"))
        assert read.sigma_data == 0.7 and not read.training
        assert not any(p.requires_grad for p in read.parameters())
        torch.testing.assert_close(read(x, 1.3), denoiser(x, 1.3), rtol=0, atol=tolerance or 1e-6)
    assert load_file(tmp_path / "t.pt")["model.enc.8x8_conv.weight"].dtype == torch.float16


@pytest.mark.parametrize("options", [dict(shakedrop=True, phi=0.2, conditional=True), {}])
def test_the_velocity_of_cud_is_a_teacher(tmp_path, options):
    """As D = z - t v(z, t), with z = x / (1 + sigma), t = sigma / (1 + sigma)."""
    given = dict(TINY, independent=True, distill_steps=1, distill_n=8, steps=1, out=str(tmp_path))
    config = cud.Config(**given, rk="23", **options)
    nets = cud.train(config)
    path, generator = tmp_path / "velocity.safetensors", torch.Generator().manual_seed(0)
    assert path.exists()
    for weights in nets["cud"].parameters():  # not as small as at the start
        weights += 0.1 * torch.randn(weights.shape, generator=generator)
    teacher.save_velocity(path, nets["cud"], config)
    denoiser = teacher.load_teacher(path, "digits", torch.device("cpu"))
    assert denoiser.net.label_dim == 10 * config.conditional
    x, labels = noise_from_seeds(range(4), (1, 8, 8)), torch.tensor([3, 1, 4, 1])
    x, sigma = 3 * x, torch.tensor([0.01, 0.5, 3.0, 80.0], dtype=torch.float64)
    s = sigma.view(-1, 1, 1, 1)
    with torch.no_grad():
        v = nets["cud"](x / (1 + s), sigma / (1 + sigma), labels=labels)[0]
        expected = x / (1 + s) - s / (1 + s) * v
        torch.testing.assert_close(denoiser(x, sigma, labels), expected, rtol=0, atol=1e-5)
        one = denoiser(x[2:3], 3.0, labels[2:3])
        torch.testing.assert_close(one, expected[2:3], rtol=0, atol=1e-5)

        # Its students are flows as well.
        student = progressive.make_student(denoiser)
        file = tmp_path / "student.pt"
        teacher.save_teacher(file, student, denoiser.arch, denoiser.kwargs, "digits")
        read = teacher.load_teacher(file, "digits", torch.device("cpu"))
        torch.testing.assert_close(read(x, sigma, labels), expected, rtol=0, atol=1e-5)
    with pytest.raises(UsageError, match="--prediction v: this teacher is a flow"):
        progressive.make_student(denoiser, "v")


def test_a_cpu_takes_the_shipped_teacher_and_a_gpu_the_public_one(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path))
    teacher.say_once.cache_clear()
    shipped = str(teacher.SHIPPED["cifar10"])
    assert teacher.choose_teacher("cifar10", torch.device("cpu")) == shipped
    assert "cifar10-teacher.safetensors" in capsys.readouterr().out
    for device in ("cuda", torch.device("cuda", 1)):
        assert teacher.choose_teacher("cifar10", device) == "edm-cifar10-32x32-uncond-vp"
        assert teacher.choose_teacher("imagenet64", device) == "edm-imagenet-64x64-cond-adm"
        assert teacher.choose_teacher("mnist", device) == str(teacher.SHIPPED["mnist"])
    own = teacher.teacher_path("cifar10")
    own.write_bytes(b"")
    assert teacher.choose_teacher("cifar10", torch.device("cuda")) == str(own)
    assert teacher.choose_teacher("cifar10", torch.device("cpu")) == shipped


def test_what_is_no_teacher_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(teacher, "SHIPPED", {})
    save_weights(tmp_path / "classifier.pt", "classifier", {})
    (tmp_path / "junk.pt").write_bytes(b"junk")
    for spec, names in (
        (tmp_path / "classifier.pt", ["classifier"]),
        (tmp_path / "junk.pt", ["junk.pt"]),
        ("gone.pt", ["gone.pt"]),
        (None, ["mnist", "python -m common.teacher --dataset mnist", str(tmp_path / "cache")]),
    ):
        with pytest.raises(UsageError) as error:
            teacher.load_teacher(spec, "mnist", torch.device("cpu"))
        assert all(name in str(error.value) for name in names) and "\n" not in str(error.value)


def test_network_that_cannot_be_built_is_one_line(tmp_path):
    with pytest.raises(UsageError, match="halved 4 times.*; try --channel-mult 1$"):
        train(tmp_path, steps=1, channel_mult=(1, 1, 1, 1, 1))
    folder = tmp_path / "set"
    folder.mkdir()
    Image.fromarray(np.zeros((30, 30), np.uint8)).save(folder / "a.png")
    options = dict(dataset="folder", data_dir=str(folder), device="cpu", out=str(tmp_path / "run"))
    with pytest.raises(UsageError, match="halved 2 times.*; try --channel-mult 1 2$"):
        teacher.train(teacher.Config(**options, channel_mult=(2, 2, 2)))
    config = teacher.Config(**options)  # without the flag the levels fit
    assert (config.channel_mult, config.attn_resolutions) == ((1, 2), (15,))


@pytest.mark.parametrize(
    "size, mult, attention",
    [(8, (1,), (8,)), (15, (1,), (15,)), (28, (1, 2, 4), (7,)), (32, (1, 2, 4), (8,)),
     (50, (1, 2), ()), (64, (1, 2, 4, 4), (8,)), (96, (1, 2, 4, 4, 4), (6,))],
)
def test_the_levels_of_a_small_network_fit_the_images(size, mult, attention):
    assert teacher.levels_for(size) == (mult, attention)
    kwargs = dict(channel_mult=list(mult), attn_resolutions=list(attention))
    net = ddpmpp(size, 3, model_channels=16, num_blocks=1, **kwargs)  # can be built
    assert net.img_shape == (3, size, size)


def test_shipped_teacher_makes_digits():
    """Small enough to ship, and good: samples are about as far from the training set as digits are.

    It denoises unseen digits better than two denoisers that are known: the training set as a
    mixture ("one of the training digits") and one Gaussian (plain shrinkage).
    """
    assert teacher.SHIPPED["digits"].stat().st_size <= 2 * 2**20
    denoiser = teacher.load_teacher(None, "digits", torch.device("cpu"))
    data = to_float(load_dataset("digits", "train").images).double()
    x0 = to_float(load_dataset("digits", "test").images[:200]).double()
    noise = noise_from_seeds(range(200), (1, 8, 8))
    exact = GaussianMixture(data, torch.full((1500,), 0.05))
    shrink = GaussianMixture(data.mean(0, keepdim=True), torch.tensor([0.6]))

    def error(d, sigma):
        return (d(x0 + sigma * noise, sigma) - x0).square().mean().item()

    def nearest(x):
        return torch.cdist(x.flatten(1), data.flatten(1)).min(1).values.mean()

    with torch.no_grad():
        for sigma in (0.2, 1.0, 5.0):
            assert error(denoiser, sigma) < error(shrink, sigma)
            assert error(denoiser, sigma) < 1.05 * error(exact, sigma)
        sigmas = torch.cat([sigma_grid("edm", 17), torch.zeros(1, dtype=torch.float64)])
        x = heun(denoiser, 80 * noise[:64], sigmas)
    unseen = nearest(x0[:64])
    assert 0.3 * unseen < nearest(x) < 1.2 * unseen  # neither noise nor copies


def test_a_teacher_must_fit_the_images_of_a_folder(tmp_path):
    for size in (8, 16):
        (tmp_path / str(size)).mkdir()
        Image.fromarray(np.zeros((size, size), np.uint8)).save(tmp_path / str(size) / "a.png")

    def load(size):
        shipped = str(teacher.SHIPPED["digits"])
        folder = str(tmp_path / str(size))
        return teacher.load_teacher(shipped, "folder", torch.device("cpu"), folder)

    assert load(8).net.img_shape == (1, 8, 8)
    pattern = r"--teacher .*makes images of \(1, 8, 8\), folder has \(1, 16, 16\)"
    with pytest.raises(UsageError, match=pattern):
        load(16)


def test_converting_a_public_teacher_draws_nothing(tmp_path, monkeypatch):
    """One rank converts, the others find it done: afterwards all draw the same."""
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    about, weights = load_weights(teacher.SHIPPED["digits"], "teacher")
    state = {name: about[name] for name in ("arch", "kwargs", "sigma_data")}
    state["weights"] = weights
    monkeypatch.setattr(public_teachers, "read_edm_pickle", lambda data, path: state)
    (tmp_path / "x.pkl").write_bytes(b"\x80x")
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        teacher.load_teacher(str(tmp_path / "x.pkl"), "digits", "cpu")
        draws.append(torch.rand(()))
    assert draws[0] == draws[1]
