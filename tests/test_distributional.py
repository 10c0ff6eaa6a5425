"""distributional.py against the official code (golden/README.md section 7) and closed forms.

Also against a training loop written apart, and from end to end.
"""

import copy
import json
import math
import urllib.error
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import distributional as gdd
from common import UsageError, unet
from common.baselines import best_untrained
from common.classifier import load_classifier
from common.datasets import Stream, load_dataset
from common.diffusion import Denoiser, GaussianMixture, noise_from_seeds, sigma_grid
from common.machinery.files import load_checkpoint
from common.machinery.run import Run
from common.solvers import euler
from common.teacher import ema_decay, load_teacher, save_teacher
from scripts import EVERYWHERE, assert_refused, differences, results, run_script, watch
from test_unet import golden_net

ROOT = Path(__file__).parent.parent
GOLDEN = {
    key: torch.from_numpy(value)
    for key, value in np.load(ROOT / "tests" / "golden" / "gdd.npz").items()
    if key != "config"
}
FROZEN = json.loads((ROOT / "tests" / "golden" / "gdd_frozen.json").read_text())
TINY = dict(
    img_resolution=8, img_channels=1, model_channels=8, channel_mult=[1, 2], num_blocks=1,
    attn_resolutions=[4], dropout=0.5,
)


def tiny_teacher(**options):
    """An untrained teacher. No weight is 0, and it has dropout, which no generator may use."""
    torch.manual_seed(5)
    teacher = Denoiser(unet.ddpmpp(**(TINY | options))).eval()
    for parameter in teacher.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    teacher.arch, teacher.kwargs = "ddpmpp", TINY | options
    return teacher.requires_grad_(False)


def tiny_config(folder, **options):
    small = dict(images=48, batch_size=8, width=4, lr=1e-3, lr_d=1e-3, r1_every=2, r1_gamma=0.1)
    return gdd.Config(smoke=True, device="cpu", out=str(folder), **(small | options))


class Recorder(Run):
    """A run that keeps the losses of every step."""

    def steps(self, count, what="training"):
        self.losses = []
        for step in super().steps(count, what):
            yield step
            self.losses.append([self.loss[k].item() for k in ("generator", "discriminator")])


def recorded(config, teacher):
    """The generator's EMA, and the losses (steps, 2) of generator and discriminator."""
    run = Recorder("distributional", config)
    return gdd.train(config, run, teacher), torch.tensor(run.losses)


# ------------------------------------------------------------------- the official numbers


@pytest.fixture
def golden():
    """The official toy generator and discriminator, as functions, and their weights."""
    w = {
        key: value.clone().requires_grad_(True)
        for key, value in GOLDEN.items()
        if key[:2] in ("g/", "d/")
    }

    def discriminator(x, labels=None):
        h = torch.tanh(x.flatten(1) @ w["d/W"] + w["d/b"])
        return [h @ w["d/h0"], h @ w["d/h1"], (h * h) @ w["d/h2"]]

    fake = torch.tanh(GOLDEN["g_input"].flatten(1) / 80 @ w["g/A"] + w["g/a"]).view_as(
        GOLDEN["images"]
    )
    torch.testing.assert_close(fake, GOLDEN["gen_images"])
    return w, discriminator, fake


def test_official_losses_and_gradients(golden):
    w, discriminator, fake = golden
    real = GOLDEN["images"]
    for phase, prefix, loss in (
        ("G", "g/", gdd.generator_loss(discriminator(fake))),
        ("D", "d/", gdd.discriminator_loss(discriminator(real), discriminator(fake.detach()))),
        ("R1", "d/", 16 * gdd.r1_penalty(discriminator, real)),
    ):
        torch.testing.assert_close(loss, GOLDEN[f"ns/{phase}_loss_times_gain"], rtol=1e-12, atol=0)
        names = [name for name in w if name.startswith(prefix)]
        for name, gradient in zip(names, torch.autograd.grad(loss, [w[name] for name in names])):
            expected = GOLDEN[f"ns/{phase}_grad_{name.replace('/', '_')}"]
            torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-12)


def test_official_preconditioning_is_edms_where_the_generator_is_used():
    """theirs is the identity at sigma = 0.002, which one step from sigma = 80 never sees."""
    edm = Denoiser(nn.Identity()).coefficients(torch.tensor(80.0))
    for name, ours in zip(("c_skip", "c_out", "c_in"), edm):
        torch.testing.assert_close(ours, GOLDEN[name][0], rtol=6e-5, atol=0)


def test_official_network_in_the_generator():
    generator = gdd.make_generator(golden_net("ncsnpp_cond")[0])
    with torch.no_grad():
        x0 = generator(GOLDEN["net/x"], GOLDEN["net/sigma"], GOLDEN["net/class_labels"])
    torch.testing.assert_close(x0, GOLDEN["net/D"], rtol=5e-5, atol=5e-5)


@pytest.mark.parametrize("name, per_gpu", [("cifar10", 256 // 4), ("imagenet64", 512 // 4)])
def test_gamma_of_the_large_presets_is_the_official_weight_of_r1(name, per_gpu):
    """The official discriminator returns a *tensor* for each of its two networks.

    `logits += tensor` then extends a list by that tensor's rows, one for each image, and the sum
    over the list is one over images; the golden's toy returns lists, and does not show it. Here
    that sum in its own type: L_G and L_D grow with the batch, R1 does not.
    """
    torch.manual_seed(0)
    weights = torch.randn(2, 4, 12, 16, dtype=torch.float64)  # of 2 networks, 4 heads, 16 logits
    x0, fake = torch.randn(2, per_gpu, 1, 3, 4, dtype=torch.float64)

    def official(x, labels=None):
        logits = []
        for heads in weights:
            logits += torch.cat([torch.tanh(x.flatten(1)) @ w for w in heads], 1)  # (B, 64)
        return logits

    def ours(x, labels=None):
        return [torch.tanh(x.flatten(1)) @ w for heads in weights for w in heads]

    real, generated = official(x0), official(fake)
    loss_g = sum(F.softplus(-row).mean() for row in generated)
    loss_d = sum(F.softplus(row).mean() for row in generated)
    loss_d = loss_d + sum(F.softplus(-row).mean() for row in real)
    scale = loss_d / gdd.discriminator_loss(ours(x0), ours(fake))
    torch.testing.assert_close(loss_g, scale * gdd.generator_loss(ours(fake)))
    assert scale.item() == pytest.approx(per_gpu / 4)
    torch.testing.assert_close(gdd.r1_penalty(official, x0), gdd.r1_penalty(ours, x0))
    config = gdd.Config(dataset=name, device="cuda")
    assert config.r1_gamma == pytest.approx(1e-4 / scale.item())


def test_official_ema():
    decay = [
        ema_decay(n, 256, gdd.Config(dataset="cifar10", device="cuda").ema_images)
        for n in GOLDEN["ema_cur_nimg"].tolist()
    ]
    np.testing.assert_allclose(decay, GOLDEN["ema_r"], rtol=1e-9, atol=1e-12)


def test_one_step_evaluates_the_network_once_at_sigma_max():
    calls = []

    def generator(x, sigma, labels):
        calls.append((x, sigma, labels))
        return x

    gdd.one_step(generator, 80.0)(GOLDEN["z"], "labels")
    ((x, sigma, labels),) = calls
    torch.testing.assert_close(x, GOLDEN["g_input"], rtol=1e-12, atol=0)
    assert sigma == 80 == GOLDEN["g_sigma"][0] and labels == "labels"


@pytest.mark.parametrize("kind, label_dim", [("uncond", 0), ("cond", 10)])
@pytest.mark.parametrize("level, number", [("conv", 1), ("conv+qkv", 2), ("conv+qkv+skip", 3)])
def test_official_freeze_lists(kind, label_dim, level, number):
    expected = FROZEN[f"cifar10-{kind}-ve-freeze{number}"]
    with torch.device("meta"):
        teacher = Denoiser(unet.ncsnpp(32, 3, label_dim=label_dim))
        generator = gdd.make_generator(teacher, level)
    frozen = [name for name, p in generator.named_parameters() if not p.requires_grad]
    trained = [p.numel() for p in generator.parameters() if p.requires_grad]
    assert len(frozen) == expected["n_excluded"] and len(trained) == expected["trainable_tensors"]
    assert sum(trained) == expected["trainable_params"]
    if number == 1:
        assert frozen == FROZEN["cifar10-uncond-ve-freeze1"]["excluded_from_optimizer"]


def test_no_freezing_trains_everything_and_adm_keeps_its_ends():
    with torch.device("meta"):
        free = gdd.make_generator(Denoiser(unet.ncsnpp(32, 3)), "none")
        generator = gdd.make_generator(Denoiser(unet.adm(64, 3, label_dim=1000)), "conv")
    assert all(p.requires_grad for p in free.parameters())
    trained = {name for name, p in generator.named_parameters() if p.requires_grad}
    block = "model.enc.32x32_block0"
    ends = {"model.out_conv.weight", "model.enc.64x64_conv.weight", "model.map_label.weight"}
    inside = {f"{block}.{layer}.weight" for layer in ("qkv", "norm0", "affine")}
    fixed = {"enc.32x32_down.conv0.weight", "dec.8x8_in0.proj.bias", "dec.16x16_up.conv1.weight"}
    assert ends | inside <= trained and not {f"model.{name}" for name in fixed} & trained


# --------------------------------------------------------------------------- closed forms


def test_losses_at_equilibrium_and_their_signs():
    zeros = [torch.zeros(3, 4), torch.zeros(3, 1)]
    high, low, log2 = [9 + z for z in zeros], [z - 9 for z in zeros], np.log(2)
    assert gdd.generator_loss(zeros).item() == pytest.approx(2 * log2)
    assert gdd.discriminator_loss(zeros, zeros).item() == pytest.approx(4 * log2)
    assert gdd.generator_loss(high) < 1e-3 and gdd.generator_loss(low) > 17  # fooled; found out
    right, wrong = gdd.discriminator_loss(high, low), gdd.discriminator_loss(low, high)
    assert right < 1e-3 and wrong > 35


def test_penalty_of_a_linear_discriminator():
    a, b = torch.randn(2, 1, 3, 3, dtype=torch.float64)
    x0 = torch.randn(5, 1, 3, 3, dtype=torch.float64)

    def linear(x, labels):
        return [
            (x * a).sum((1, 2, 3))[:, None] * labels[:, None],
            (x * b).sum((1, 2, 3))[:, None].expand(-1, 2),
        ]

    labels = torch.arange(5.0, dtype=torch.float64)
    expected = np.mean(
        [(0.3 / 2) * ((k * a + 2 * b) ** 2).sum().item() for k in range(5)]
    )  # mean over images of the squared norm
    assert gdd.r1_penalty(linear, x0, labels, 0.3).item() == pytest.approx(expected, rel=1e-12)
    assert not x0.requires_grad


# ---------------------------------------------------------------------- the discriminator


def test_projection_mixes_channels_then_scales_from_coarse_to_fine():
    torch.manual_seed(0)
    projection = gdd.Projection([3, 5], 4)
    fine, coarse = torch.randn(2, 3, 2, 2), torch.randn(2, 5, 1, 1)
    first, second = projection([fine, coarse])
    channel, scale = projection.channel, projection.scale
    expected = torch.einsum("oc,bcij->boij", channel[1][:, :, 0, 0], coarse)  # (2, 8, 1, 1)
    torch.testing.assert_close(second, expected)
    up = torch.einsum("oc,bcij->boij", scale[0][:, :, 1, 1], expected)  # sees the centre tap only
    mixed = torch.einsum("oc,bcij->boij", channel[0][:, :, 0, 0], fine)
    torch.testing.assert_close(first, mixed + up.expand(-1, -1, 2, 2))
    assert not any(p.requires_grad for p in projection.parameters())
    assert set(projection.state_dict()) == {"channel.0", "channel.1", "scale.0"}


def test_projection_keeps_the_size_of_features():
    torch.manual_seed(0)
    maps = [torch.randn(8, c, side, side) for c, side in ((16, 8), (32, 4), (64, 2))]
    for i, y in enumerate(gdd.Projection([16, 32, 64], 32)(maps)):
        assert y.shape[1] == 32 * 2**i and 0.5 < y.std() < 2


def test_head_gives_the_logit_of_the_own_class():
    torch.manual_seed(0)
    head, x = gdd.Head(6, 16, 3).eval(), torch.randn(4, 6, 16, 16)
    labels = torch.tensor([2, 0, 1, 2])
    logits = head(x, labels)
    every = head.out(head.body(x))  # (4, 3, 4, 4)
    for k, label in enumerate(labels):
        torch.testing.assert_close(logits[k], every[k, label].flatten())
    assert logits.shape == (4, 16) and gdd.Head(6, 5, 0)(torch.randn(4, 6, 5, 5)).shape == (4, 4)
    assert (every[:, 0] - every[:, 1]).abs().mean() > 1e-3


@pytest.fixture
def discriminator():
    torch.manual_seed(1)
    return gdd.Discriminator(gdd.feature_networks(gdd.Config(smoke=True), "cpu"), (1, 8, 8), 4)


def test_discriminator_sees_the_features_of_a_classifier_that_no_fid_uses(discriminator):
    x = torch.randn(6, 1, 8, 8)
    maps = discriminator.projections[0](
        load_classifier("digits", "cpu", seed=2, steps=5).feature_maps(x)
    )
    for logits, m, head in zip(discriminator.eval()(x), maps, discriminator.heads):
        torch.testing.assert_close(logits, head(m))
        assert logits.shape == (6, m.shape[-1] ** 2 if m.shape[-1] <= 4 else 16)


def test_logits_depend_on_one_image_alone_and_networks_are_frozen(discriminator):
    x = torch.randn(6, 1, 8, 8)
    before = copy.deepcopy(discriminator.networks.state_dict())
    for _ in range(20):
        discriminator(x)  # the power iteration of the spectral norms settles
    for both, alone in zip(discriminator(x), discriminator(x[:2])):
        torch.testing.assert_close(both[:2], alone, rtol=1e-3, atol=1e-4)
    assert all(
        torch.equal(before[k], v) for k, v in discriminator.networks.state_dict().items()
    )  # no batch statistics
    trained = [name for name, p in discriminator.named_parameters() if p.requires_grad]
    assert trained and all(name.startswith("heads.") for name in trained)
    assert sum("projections" in name for name in discriminator.state_dict()) == 5  # saved with it


def test_imagenet_networks_and_where_they_cannot_be_had(monkeypatch):
    (lite0,) = gdd.feature_networks(gdd.Config(features="lite0"), "cpu")
    discriminator = gdd.Discriminator([lite0], (3, 32, 32), 4)
    logits = discriminator(torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)))
    assert len(logits) == 4 and all(head.std() > 0 for head in logits)

    def get_model(name, weights):
        raise urllib.error.URLError("no\nnetwork")

    monkeypatch.setattr("torchvision.models.get_model", get_model)
    with pytest.raises(UsageError) as error:
        gdd.feature_networks(gdd.Config(features="imagenet"), "cpu")
    parts = ("--features imagenet: ", "no network", "checkpoints", "--features classifier")
    assert "\n" not in str(error.value) and all(part in str(error.value) for part in parts)


def test_missing_weights_are_found_before_classifiers_are_trained(monkeypatch, tmp_path):
    def refused(config, device):
        raise UsageError("no weights")

    monkeypatch.setattr(gdd, "feature_networks", refused)
    monkeypatch.setattr(gdd, "make_evaluator", None)  # never reached
    with pytest.raises(UsageError, match="no weights"):
        run_main(monkeypatch, "--smoke", "--out", tmp_path, "--device", "cpu")


# --------------------------------------------------------------------------- the training


def reference(config, teacher, steps):
    """The training of PAPERS.md section 5, written apart: plain backward passes, one loop."""
    torch.manual_seed(config.seed)
    generator = Denoiser(copy.deepcopy(teacher.net)).eval().requires_grad_(False)
    names = [
        n
        for n, _ in generator.named_parameters()
        if not any(k in n for k in ("conv0", "conv1", "proj"))
    ]
    trained = [generator.get_parameter(n).requires_grad_(True) for n in names]
    ema = {n: p.clone() for n, p in generator.named_parameters()}
    d = gdd.Discriminator(
        gdd.feature_networks(config, "cpu"),
        teacher.net.img_shape,
        config.width,
        teacher.net.label_dim,
    )
    c = config.r1_every / (config.r1_every + 1)
    optimizer_g = torch.optim.Adam(trained, config.lr, betas=(0.0, 0.99))
    optimizer_d = torch.optim.Adam(
        [p for p in d.parameters() if p.requires_grad], config.lr_d * c, betas=(0.0, 0.99**c)
    )
    stream = gdd.Stream(load_dataset("digits"), config.batch_size, config.seed)
    for step in range(steps):
        x0, labels = stream.next()
        z, z_d = torch.randn(2, config.batch_size, 1, 8, 8)
        labels = labels if teacher.net.label_dim else None
        fake = generator(config.sigma_max * z, config.sigma_max, labels)
        optimizer_g.zero_grad()
        sum(F.softplus(-logits).mean() for logits in d(fake, labels)).backward()
        optimizer_g.step()
        optimizer_d.zero_grad()
        fake = generator(config.sigma_max * z_d, config.sigma_max, labels).detach()  # G is new
        real_logits, fake_logits = d(x0, labels), d(fake, labels)
        sum(
            F.softplus(-r).mean() + F.softplus(f).mean() for r, f in zip(real_logits, fake_logits)
        ).backward()
        optimizer_d.step()
        if step > 0 and step % config.r1_every == 0:
            optimizer_d.zero_grad()
            x = x0.clone().requires_grad_(True)
            gradient = torch.autograd.grad(
                sum(logits.sum() for logits in d(x, labels)), x, create_graph=True
            )[0]
            (config.r1_every * config.r1_gamma / 2 * (gradient**2).sum() / len(x)).backward()
            for p in optimizer_d.param_groups[0]["params"]:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            optimizer_d.step()
        decay = ema_decay(step * config.batch_size, config.batch_size, config.ema_images)
        for n, p in generator.named_parameters():
            ema[n] = decay * ema[n] + (1 - decay) * p.detach()
    return generator, ema, d


@pytest.fixture
def double(monkeypatch):
    """Everything in float64.

    With beta1 = 0, Adam's step of a gradient that is almost 0 is the sign of its rounding error.
    """
    gdd.feature_networks(gdd.Config(smoke=True), "cpu")  # trained in float32, then cached

    class DoubleStream(Stream):
        def next(self):
            x0, labels = super().next()
            return x0.double(), labels

    monkeypatch.setattr(gdd, "Stream", DoubleStream)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("label_dim, sigma_max", [(0, 80.0), (10, 10.0)])
def test_training_is_that_of_the_paper(tmp_path, double, label_dim, sigma_max):
    config = tiny_config(tmp_path, images=40, sigma_max=sigma_max)
    teacher = tiny_teacher(label_dim=label_dim).double()
    generator, expected, d = reference(config, teacher, 5)
    ema, losses = recorded(config, teacher)
    parts = load_checkpoint(tmp_path / "checkpoint.pt")["parts"]
    pairs = (
        (parts["generator"], generator.state_dict()),
        (ema.state_dict(), expected),
        (parts["discriminator"], d.state_dict()),
    )
    for ours, theirs in pairs:
        for name, value in theirs.items():
            torch.testing.assert_close(
                ours[name],
                value.detach(),
                rtol=1e-5,
                atol=1e-8,
                msg=lambda m, name=name: f"{name}: {m}",
            )
    assert losses.shape == (5, 2) and (losses > 0.5).all()


def test_fake_images_get_the_classes_of_the_real_ones(tmp_path, monkeypatch):
    seen = watch(monkeypatch, gdd.Discriminator, "forward")
    gdd.train(tiny_config(tmp_path, images=8, r1_gamma=0), teacher=tiny_teacher(label_dim=10))
    labels = Stream(load_dataset("digits"), 8, 0).next()[1]
    assert len(seen) == 3 and all(torch.equal(given, labels) for _, _, given in seen)


def test_the_penalty_alone_is_in_float32(tmp_path, monkeypatch):
    """Under autocast a second derivative would be one of bfloat16."""
    calls, original = [], Run.backward

    def backward(self, optimizer, loss_fn, *batch, mixed_precision=True):
        calls.append((self.done, len(batch), mixed_precision))
        return original(self, optimizer, loss_fn, *batch, mixed_precision=mixed_precision)

    monkeypatch.setattr(Run, "backward", backward)
    gdd.train(tiny_config(tmp_path, images=40), teacher=tiny_teacher())
    steps = [[(k, 2, True), (k, 3, True)] for k in range(5)]
    for k in (2, 4):
        steps[k].append((k, 2, False))
    assert calls == [call for step in steps for call in step]


def kept(monkeypatch, name):
    """A list that gets every module which gdd.<name>(...) returns, and its first parameters."""
    made, make = [], getattr(gdd, name)

    def spy(*args):
        module = make(*args)
        made.append((module, {n: p.detach().clone() for n, p in module.named_parameters()}))
        return module

    monkeypatch.setattr(gdd, name, spy)
    return made


@pytest.mark.parametrize("level", ["none", "conv", "conv+qkv+skip"])
def test_what_is_frozen_stays_and_costs_nothing(tmp_path, level, monkeypatch):
    teacher, optimizers = tiny_teacher(), []

    class Adam(torch.optim.Adam):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            optimizers.append(self)

    monkeypatch.setattr(torch.optim, "Adam", Adam)
    made = kept(monkeypatch, "make_generator")
    config = tiny_config(tmp_path, images=24, freeze=level)
    gdd.feature_networks(config, "cpu")
    optimizers.clear()
    ema = gdd.train(config, teacher=teacher)
    frozen, ((generator, _),) = 0, made
    for name, p in generator.named_parameters():
        assert p.requires_grad == (not gdd.is_frozen(name, level))
        if not p.requires_grad:
            frozen += 1
            assert torch.equal(p, teacher.get_parameter(name)), name
            assert torch.equal(ema.get_parameter(name), p) and p.grad is None, name
            assert not any(p is q for q in optimizers[0].param_groups[0]["params"])
        elif not name.endswith("qkv.bias"):  # a shift of all keys changes nothing
            assert not torch.equal(p, teacher.get_parameter(name)), name
    assert len(optimizers[0].state) == len(list(teacher.parameters())) - frozen
    assert (frozen == 0) == (level == "none")


def test_parts_of_a_batch_train_as_the_whole(tmp_path):
    """The parts of a batch must not make spectral norm iterate more often.

    It iterates with every forward pass in training mode.
    """

    def config(name, **options):
        return tiny_config(tmp_path / name, eval_n=4, **options)

    trained = []
    for n in (None, 4, 3):
        trained.append(recorded(config(f"{n}", images=160, batch_per_gpu=n), tiny_teacher()))
    states = []
    for n in (None, 4):  # weights that almost stay: then the iterations alone move the states
        slow = config(f"slow {n}", images=16, batch_per_gpu=n, lr=1e-12, lr_d=1e-12)
        gdd.train(slow, teacher=tiny_teacher())
        checkpoint = load_checkpoint(tmp_path / f"slow {n}" / "checkpoint.pt")
        states.append(checkpoint["parts"]["discriminator"].values())
    assert all(torch.allclose(a, b, rtol=0, atol=1e-7) for a, b in zip(*states))
    (whole, losses), *others = trained
    for ema, other in others:
        torch.testing.assert_close(other, losses, rtol=2e-3, atol=2e-3)
        for (name, a), b in zip(whole.state_dict().items(), ema.state_dict().values()):
            assert (a - b).abs().max() < 2e-3, name


def test_the_generator_starts_as_a_copy_of_the_teacher():
    teacher = tiny_teacher()
    generator = gdd.make_generator(teacher)
    for name, p in teacher.named_parameters():
        assert torch.equal(generator.get_parameter(name), p)
        assert generator.get_parameter(name) is not p
    assert not generator.training  # no dropout


def test_before_training_the_generator_is_one_euler_step_of_the_teacher():
    teacher = load_teacher(None, "digits", "cpu")
    noise = noise_from_seeds(range(8), (1, 8, 8))
    with torch.no_grad():
        x0 = gdd.one_step(gdd.make_generator(teacher), 80.0)(noise, None)
        expected = euler(teacher, 80.0 * noise, sigma_grid("edm", 1))
    torch.testing.assert_close(x0, expected, rtol=0, atol=0.02)
    assert expected.std() > 0.2


def states(folder):
    state = load_checkpoint(folder / "checkpoint.pt")
    return state["step"], {**state["parts"], "rng": state["rng"]}


def test_resumed_is_bitwise_uninterrupted(tmp_path, monkeypatch):
    teacher = tiny_teacher()
    ema, losses = recorded(tiny_config(tmp_path / "whole"), teacher)
    config = tiny_config(tmp_path / "cut")
    calls = watch(monkeypatch, Stream, "next", fails_at=5)
    with pytest.raises(ZeroDivisionError):
        gdd.train(config, Run("distributional", config, checkpoint_seconds=0), teacher)
    assert states(tmp_path / "cut")[0] == 4
    config.resume = True
    ema2, losses2 = recorded(config, teacher)
    assert len(calls) == 5 + 2
    assert not differences(*(states(tmp_path / name) for name in ("whole", "cut")))
    weights, resumed = ema.state_dict(), ema2.state_dict()
    assert not differences(weights, resumed) and torch.equal(losses[4:], losses2)
    assert (losses > 0).all() and differences(weights, teacher.state_dict())


@pytest.mark.parametrize(
    "network, name, value, step, call",  # call: which gradient of that tensor in that step
    [
        ("generator", "model.dec.4x4_in0.qkv.weight", math.nan, 3, 1),
        ("discriminator", "heads.1.out.bias", -math.inf, 3, 1),
        ("R1", "heads.1.out.parametrizations.weight.original", math.inf, 4, 2),
    ],
)
def test_gradients_that_are_not_finite_stop_the_run(
    tmp_path, monkeypatch, network, name, value, step, call
):
    """The loss stays finite: one gradient, in one step, is not. Nothing after it is saved."""
    config = tiny_config(tmp_path, images=400)
    run = Run("distributional", config, checkpoint_seconds=0)
    steps = []

    def hook(gradient):
        steps.append(run.done)
        if (run.done, steps.count(run.done)) == (step, call):
            return torch.full_like(gradient, value)

    maker = "make_generator" if network == "generator" else "Discriminator"
    make = getattr(gdd, maker)

    def make_with_hook(*args):
        module = make(*args)
        module.get_parameter(name).register_hook(hook)
        return module

    monkeypatch.setattr(gdd, maker, make_with_hook)
    message = f"the {network}, or its gradient, is nan at step {step}"
    with pytest.raises(UsageError, match=message):
        gdd.train(config, run, tiny_teacher())
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    assert state["step"] == step
    for part in ("generator", "discriminator"):
        assert all(torch.isfinite(p).all() for p in state["parts"][part].values())


def test_gradients_are_averaged_before_they_are_used(tmp_path, monkeypatch):
    """An average of zeros: nothing moves."""

    def zeros(parameters):
        for p in parameters:
            if p.grad is not None:
                p.grad.zero_()

    monkeypatch.setattr("common.machinery.run.average_gradients", zeros)
    made = [kept(monkeypatch, name) for name in ("make_generator", "Discriminator")]
    gdd.train(tiny_config(tmp_path), teacher=tiny_teacher())
    for ((module, first),) in made:
        for name, p in module.named_parameters():
            assert torch.equal(p, first[name]), name


def test_gradients_of_any_memory_layout_are_used_rightly(tmp_path):
    """Adam's fused form takes a gradient's memory as it lies: it must lie like the weights."""
    torch.manual_seed(0)
    net, weight = nn.Conv2d(4, 4, 3), torch.randn(4, 4, 3, 3)
    before = net.weight.detach().clone()
    other = weight.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam([net.weight], 0.1, (0.0, 0.99), fused=True)

    def loss(one):
        return (net.weight.to(memory_format=torch.channels_last) * other).sum()

    Run("distributional", tiny_config(tmp_path)).backward(optimizer, loss, torch.ones(1))
    optimizer.step()
    torch.testing.assert_close(before - net.weight, 0.1 * weight.sign(), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_short_training_beats_what_costs_nothing_with_two_evaluations(tmp_path, monkeypatch):
    """One step, after a minute of training, against the best solver and grid with two.

    Its FID is lower also in features that neither the loss nor the usual FID uses. (With five,
    DDIM on the cosine grid is ahead of it: 1.46.)
    """
    run_main(monkeypatch, "--images", 25_600, "--nfe", 2, "--eval-n", 1024, "--out", tmp_path)
    ddim, untrained, ours, best = results(tmp_path)
    assert untrained["fid"] < ddim["fid"] and untrained["name"].startswith("untrained")
    assert (
        best["fid"] < ours["fid"] < untrained["fid"] / 1.5
        and ours["fid_unseen"] < untrained["fid_unseen"] / 1.5
        and ours["recall"] > 0.3
    )


# ---------------------------------------------------------------------------- measurement


def test_activation_changes_are_those_of_each_block():
    """The function of the notebook."""
    path = ROOT / "notebooks" / "6_distributional.ipynb"
    notebook = json.loads(path.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in notebook["cells"]]
    (source,) = [text for text in sources if "def activation_changes" in text]
    names = {"torch": torch, "Block": unet.Block}
    exec(source[source.index("@torch.no_grad") :].split("\n\n\n")[0], names)
    teacher = tiny_teacher()
    x0, noise, outputs = torch.randn(3, 1, 8, 8), torch.randn(3, 1, 8, 8), []
    changes = names["activation_changes"](teacher, x0, noise, [10.0, 1.0, 0.1])
    blocks = [n for n, m in teacher.net.named_modules() if isinstance(m, unet.Block)]
    assert list(changes) == blocks and len(changes) > 5
    assert not any(m._forward_hooks for m in teacher.modules())
    block = teacher.net.get_submodule("dec.4x4_in0")
    handle = block.register_forward_hook(lambda block, inputs, y: outputs.append(y))
    for sigma in (10.0, 1.0, 0.1):
        teacher(x0 + sigma * noise, sigma)
    handle.remove()
    for k in (0, 1):
        expected = ((outputs[k + 1] - outputs[k]).norm() / outputs[k].norm()).item()
        assert changes["dec.4x4_in0"][k] == pytest.approx(expected, rel=1e-5) and expected > 0


@pytest.mark.parametrize("freeze, name", [("conv", "gdd-i"), ("none", "gdd")])
def test_each_row_is_what_its_name_and_its_evaluations_say(freeze, name):
    """By a denoiser that records the noise levels at which it is evaluated."""
    config = gdd.Config(freeze=freeze, sigma_max=10.0)
    asked, noise = [], torch.randn(2, 1, 8, 8, dtype=torch.float64)

    def denoiser(role):
        mixture = GaussianMixture(torch.zeros(1, 64), torch.tensor([0.5]))

        def record(x, sigma, labels):
            asked.append((role, float(sigma)))
            assert labels == "labels"
            return mixture(x.flatten(1), sigma).view_as(x)

        return record

    teacher, generator = denoiser("teacher"), denoiser("generator")
    samplers, made = gdd.make_samplers(config, teacher, generator), {}
    for (row, nfe), sampler in samplers.items():
        asked.clear()
        made[row, nfe] = sampler(noise, "labels")
        role = "generator" if row == name else "teacher"
        assert len(asked) == nfe and {r for r, _ in asked} == {role} and asked[0][1] == 10, row
        if row == "ddim":
            cosine = sigma_grid("cosine", nfe, sigma_max=10.0)
            assert [sigma for _, sigma in asked] == pytest.approx(cosine[:-1].tolist())
            expected = euler(lambda x, s: teacher(x, s, "labels"), 10 * noise, cosine)
            torch.testing.assert_close(made[row, nfe], expected)
        elif row == "teacher":  # Heun: both ends of each of 17 steps, then one step to 0
            edm = sigma_grid("edm", 17, sigma_max=10.0).tolist()
            assert [s for _, s in asked[::2]] == pytest.approx(edm)
            assert [s for _, s in asked[1::2]] == pytest.approx(edm[1:])
        elif row == name:
            torch.testing.assert_close(made[row, nfe], generator(10 * noise, 10.0, "labels"))
        else:
            solver, order, grid = best_untrained("digits", nfe)
            assert row.startswith(f"untrained ({solver}") and row.endswith(f", {grid})")
    assert set(samplers) >= {("ddim", n) for n in (1, 2, 4, 8)} | {(name, 1), ("teacher", 35)}
    assert len(samplers) == 4 + 4 + 2
    exact = 10 * noise * 0.5 / (0.25 + 100) ** 0.5  # the ODE's solution for this one Gaussian
    torch.testing.assert_close(made["teacher", 35], exact, rtol=0.03, atol=0)


run_main = partial(run_script, gdd)


@pytest.mark.parametrize("freeze, name", [("conv", "gdd-i"), ("none", "gdd")])
def test_smoke_run_leaves_everything(monkeypatch, tmp_path, freeze, name):
    flags = ["--smoke", "--freeze", freeze, "--nfe", 1, 2, "--out", tmp_path, "--device", "cpu"]
    run_main(monkeypatch, *flags)
    files = {"metrics.json", "samples.png", "losses.png", "log.jsonl", "checkpoint.pt"}
    assert {p.name for p in tmp_path.iterdir()} >= files | {"generator.safetensors"}
    rows = results(tmp_path)
    assert [(row["name"].split()[0], row["nfe"]) for row in rows] == [
        *((row, nfe) for nfe in (1, 2) for row in ("ddim", "untrained")), (name, 1), ("teacher", 3)
    ]
    for row in rows:
        assert row["fid_n"] == 16 and row["fid_features"] == "digits-classifier"
        assert "-seed1-" in row["fid_unseen_features"] and row["fid_unseen"] >= 0
        assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
        assert row["precision_recall_features"] == row["fid_unseen_features"]
        assert "rmse_to_teacher" not in row
    assert rows[4]["fid"] < rows[0]["fid"]  # before training they are equal
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log and all(min(line["generator"], line["discriminator"]) > 0 for line in log)

    modified = (tmp_path / "checkpoint.pt").stat().st_mtime_ns
    run_main(monkeypatch, *flags, "--resume")  # trained already: measured again
    assert results(tmp_path) == rows
    assert (tmp_path / "checkpoint.pt").stat().st_mtime_ns == modified


def test_the_generators_file_is_loaded_and_refused_at_other_noise_levels(monkeypatch, tmp_path):
    run_main(monkeypatch, "--smoke", "--nfe", 1, "--out", tmp_path, "--device", "cpu")
    path = tmp_path / "generator.safetensors"
    generator = load_teacher(str(path), "digits", "cpu")
    noise = noise_from_seeds(range(2), (1, 8, 8))
    weights = load_checkpoint(tmp_path / "checkpoint.pt")["parts"]["ema"]
    assert all(torch.equal(weights[k], v) for k, v in generator.state_dict().items())
    with torch.no_grad():
        x0 = gdd.one_step(copy.deepcopy(generator), 80.0)(noise, None)
        torch.testing.assert_close(generator(80 * noise, torch.full((2,), 80.0)), x0)
        with pytest.raises(UsageError, match="^--teacher: a one-step generator.*80 alone"):
            euler(generator, 80 * noise, sigma_grid("cosine", 2))
    arguments = ["--teacher", path, "--smoke", "--device", "cpu"]
    assert_refused(gdd, monkeypatch, tmp_path, arguments, ["--teacher", "one-step generator"])


@pytest.mark.parametrize(
    "arguments, names",
    [
        (["--freeze", "all"], ["--freeze", "all", "conv+qkv"]),
        (["--features", "clip"], ["--features", "clip", "imagenet"]),
        (["--width", "0"], ["--width 0"]),
        (["--batch-size", "0"], ["--batch-size 0"]),
        (["--images", "100"], ["--images 100", "128"]),
        (["--lr", "0"], ["--lr 0"]),
        (["--r1-every", "0"], ["--r1-every 0"]),
        (["--ema-images", "0"], ["--ema-images 0"]),
        (["--sigma-max", "0"], ["--sigma-max 0"]),
        (["--sigma-max", "0.001"], ["--sigma-max 0.001"]),
        (["--nfe", "5", "0"], ["--nfe", "0"]),
        (["--eval-n", "3"], ["--eval-n 3"]),
        (["--eval-batch", "0"], ["--eval-batch 0"]),
        (["--teacher", "nowhere.pt"], ["nowhere.pt"]),
        (["--teacher", "FOREIGN"], ["foreign.pt"]),
        (["--teacher", "BIG", "--smoke"], ["--teacher", "(1, 16, 16)", "(1, 8, 8)"]),
        (["--teacher", "CLASSES", "--smoke"], ["--teacher", "3 classes", "10"]),
        *EVERYWHERE,
    ],
)
def test_bad_input_is_one_line_before_any_work(monkeypatch, tmp_path, arguments, names):
    place = {}
    for key, options in {"BIG": {"img_resolution": 16}, "CLASSES": {"label_dim": 3}}.items():
        if key in arguments:
            place[key] = tmp_path / f"{key}.pt"
            save_teacher(place[key], tiny_teacher(**options), "ddpmpp", TINY | options, "digits")
    assert_refused(gdd, monkeypatch, tmp_path, arguments, names, **place)
    assert not (tmp_path / "run" / "checkpoint.pt").exists()
