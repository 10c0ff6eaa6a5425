"""common/unet.py against:

- numbers that EDM's own networks produced (golden/unet_*.npz; maths: shared/golden/README.md,
  section 1);
- the tensor lists of the public checkpoints (golden/unet_shapes.json);
- closed forms and finite differences.
"""

import json
import math
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from common import unet
from common.diffusion import Denoiser

GOLDEN = Path(__file__).parent / "golden"
CASES = [f"{arch}_{kind}" for arch in ("ddpmpp", "ncsnpp", "adm") for kind in ("uncond", "cond")]
SHAPES = json.loads((GOLDEN / "unet_shapes.json").read_text())
TINY = dict(model_channels=8, channel_mult=(1, 2), num_blocks=1, attn_resolutions=(4,))


@lru_cache(None)
def read(name):
    """Config, {array name: tensor} and state dict of one golden file; float16 is storage only."""
    with np.load(GOLDEN / f"unet_{name}.npz") as file:
        arrays = {key: file[key] for key in file.files}
    config = json.loads(str(arrays.pop("config")))
    tensors = {
        key: torch.from_numpy(np.asarray(value, np.float32 if value.dtype == np.float16 else None))
        for key, value in arrays.items()
    }
    state = {
        key.removeprefix("sd/"): value for key, value in tensors.items() if key.startswith("sd/")
    }
    return config, tensors, state


def golden_net(name, **overrides):
    """Denoiser around the golden network in eval mode, config, tensors, conditions.

    The conditions are the keyword arguments labels and augment_labels.
    """
    config, tensors, state = read(name)
    options = {
        key: value
        for key, value in config["model_kwargs"].items()
        if key not in ("model_type", "decoder_type")
    }
    factory = getattr(unet, config["arch"])
    with torch.device("meta"):  # the initial weights are replaced anyway
        net = factory(
            config["img_resolution"],
            config["img_channels"],
            config["label_dim"],
            **(options | overrides),
        )
        denoiser = Denoiser(net, sigma_data=config["sigma_data"])
    denoiser.load_state_dict(
        {key: value.clone() for key, value in state.items()}, strict=True, assign=True
    )
    conditions = dict(
        labels=tensors.get("class_labels"), augment_labels=tensors.get("augment_labels")
    )
    return denoiser.eval(), config, tensors, conditions


def close(actual, expected, tolerance):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# ------------------------------------------------------------------- the official numbers


@pytest.mark.parametrize("name", CASES)
def test_outputs_equal_official(name):
    denoiser, config, g, conditions = golden_net(name)
    with torch.no_grad():
        close(denoiser.model(g["F_in_x"], g["F_in_noise"], **conditions), g["F"], 2e-5)
        close(denoiser(g["x"], g["sigma"], **conditions), g["D"], 2e-5)
        close(denoiser(g["x"], g["sigma"][1], **conditions), g["D_scalar_sigma"], 2e-5)
        if name.endswith("_cond"):
            close(denoiser(g["x"], g["sigma"], labels=conditions["labels"]), g["D_noaugment"], 2e-5)
            unlabelled = denoiser(g["x"], g["sigma"], augment_labels=conditions["augment_labels"])
            close(unlabelled, g["D_nolabel"], 2e-5)
    blocks = {
        key: block for key, block in denoiser.named_modules() if isinstance(block, unet.Block)
    }
    assert {key: block.heads for key, block in blocks.items() if block.heads} == config["num_heads"]


@pytest.mark.parametrize("name", CASES)
def test_float64_equals_official(name):
    denoiser, _, g, conditions = golden_net(name)
    sigma = g["sigma"].double()
    x = g["x"].double() / (sigma**2 + 0.25).sqrt()[:, None, None, None]
    with torch.no_grad():
        # The labels stay float32.
        out = denoiser.double().model(x, sigma.log() / 4, **conditions)
    # Observed <= 2e-7: the official frequencies and softmax are float32.
    close(out, g["F64"], 1e-6)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_official(name):
    denoiser, config, g, conditions = golden_net(name)
    (denoiser(g["x"], g["sigma"], **conditions) * g["probe"]).mean().backward()
    parameters = dict(denoiser.named_parameters())
    assert sorted(parameters) == sorted(config["grad_names"])
    for key, total, scale in zip(
        config["grad_names"], g["grad_sum"].tolist(), g["grad_abs_sum"].tolist()
    ):
        grad = parameters[key].grad.double()
        assert grad.sum().item() == pytest.approx(total, abs=1e-4 * scale), key
        assert grad.abs().sum().item() == pytest.approx(scale, rel=1e-4), key


@pytest.mark.parametrize("name", SHAPES)
def test_default_nets_are_those_of_the_public_checkpoints(name):
    entry = SHAPES[name]
    expected, options = entry, entry["kwargs"]
    if isinstance(entry["parameters"], str):  # "same as <aug9> without model.map_augment.weight"
        expected = SHAPES[name.replace("aug0", "aug9")]
        expected = expected | {
            "parameters": {
                k: v for k, v in expected["parameters"].items() if k != "model.map_augment.weight"
            }
        }
    factory = unet.adm if "adm" in name else unet.ncsnpp if "-ve-" in name else unet.ddpmpp
    with torch.device("meta"):  # no memory, no time
        net = factory(
            options["img_resolution"],
            options["img_channels"],
            options["label_dim"],
            options.get("augment_dim", 0),
        )
        denoiser = Denoiser(net)
    assert [(k, list(v.shape)) for k, v in denoiser.named_parameters()] == list(
        expected["parameters"].items()
    )
    assert [(k, list(v.shape)) for k, v in denoiser.named_buffers()] == list(
        expected["buffers"].items()
    )
    assert sum(p.numel() for p in net.parameters()) == entry["param_count"]
    assert {block.dropout for block in net.modules() if isinstance(block, unet.Block)} == {
        options["dropout"]
    }
    assert set(denoiser.state_dict()) == set(expected["parameters"]) | set(expected["buffers"])


# ----------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("name", ["ddpmpp_cond", "adm_cond"])
def test_labels_as_indices_or_one_hot(name):
    net = golden_net(name)[0].model
    x, c_noise = torch.randn(3, 3, 8, 8), torch.randn(3)
    index = torch.tensor([7, 0, 3])
    with torch.no_grad():
        one_hot = net(x, c_noise, F.one_hot(index, 10).float())
        close(net(x, c_noise, index), one_hot, 0)
        close(net(x, c_noise, index.int()), one_hot, 0)
        # One-hot rows of integers are not indices.
        close(net(x, c_noise, F.one_hot(index, 10)), one_hot, 0)
        close(net(x, c_noise, index.flip(0)).flip(0)[1], one_hot[1], 1e-6)
        # Each image depends on its own label.
        change = (net(x, c_noise, index.flip(0)) - one_hot)[[0, 2]]
        assert change.abs().amin(0).max() > 1e-3
        close(net(x, c_noise, torch.tensor(7))[:1], one_hot[:1], 1e-5)  # one label for all
        for bad in (torch.rand(10), torch.rand(3, 9)):
            with pytest.raises(ValueError, match=r"labels of shape .*one-hot \(B, 10\) or integer"):
                net(x, c_noise, bad)
        with pytest.raises(RuntimeError):
            net(x, c_noise, torch.tensor([7, 0, 10]))  # there is no class 10


@pytest.mark.parametrize("name", ["ncsnpp_cond", "adm_cond"])
def test_each_image_has_its_own_conditions(name):
    denoiser, _, g, conditions = golden_net(name)
    with torch.no_grad():
        batch = denoiser(g["x"], g["sigma"], **conditions)
        alone = [
            denoiser(g["x"][i : i + 1], g["sigma"][i], *(c[i : i + 1] for c in conditions.values()))
            for i in range(3)
        ]
        close(torch.cat(alone), batch, 1e-5)
        other_augment = denoiser(
            g["x"], g["sigma"], conditions["labels"], conditions["augment_labels"].roll(1, 0)
        )
    assert (other_augment - batch).flatten(1).abs().amax(1).min() > 1e-3


def test_one_noise_level_for_all():
    denoiser, _, g, conditions = golden_net("ddpmpp_cond")
    net, c_noise = denoiser.model, torch.tensor(0.3)
    with torch.no_grad():
        expected = net(g["x"], c_noise.expand(3), **conditions)
        close(net(g["x"], c_noise, **conditions), expected, 0)
        close(net(g["x"], c_noise.reshape(1), **conditions), expected, 0)
        assert (net(g["x"], c_noise + 0.5, **conditions) - expected).abs().max() > 1e-3
        with pytest.raises(RuntimeError):
            net(g["x"], torch.rand(2), **conditions)


def test_conditions_that_the_net_lacks_are_ignored():
    denoiser, _, g, _ = golden_net("ddpmpp_uncond")
    with torch.no_grad():
        conditions = dict(labels=torch.tensor([1, 2]), augment_labels=torch.rand(2, 9))
        close(denoiser(g["x"], g["sigma"], **conditions), g["D"], 2e-5)


# --------------------------------------------------------------------------- random parts


def test_dropout_in_training_only():
    denoiser, _, g, conditions = golden_net("ddpmpp_cond", dropout=0.5)
    with torch.no_grad():
        close(denoiser(g["x"], g["sigma"], **conditions), g["D"], 2e-5)  # eval
        denoiser.train()
        first, second = (denoiser(g["x"], g["sigma"], **conditions) for _ in range(2))
        assert (first - second).abs().max() > 1e-2
        denoiser = golden_net("ddpmpp_cond", dropout=0.0)[0].train()
        close(denoiser(g["x"], g["sigma"], **conditions), g["D"], 2e-5)


@pytest.mark.parametrize("family", [unet.SONG, unet.ADM], ids=["song", "adm"])
def test_dropout_sits_before_the_last_convolution(family):
    block = unet.Block(8, 8, 16, family, dropout=1.0)
    torch.nn.init.normal_(block.conv1.weight)
    torch.nn.init.normal_(block.conv1.bias)
    x = torch.randn(2, 8, 4, 4)
    close(
        block(x, torch.randn(2, 16)),
        (block.conv1.bias[:, None, None] + x) * family.skip_scale,
        1e-6,
    )


@pytest.mark.parametrize("name", ["ncsnpp_cond", "adm_cond"])
def test_label_dropout(name):
    net = golden_net(name, dropout=0.0, label_dropout=0.75)[0].model
    x, c_noise = torch.randn(1, 3, 8, 8).expand(24, -1, -1, -1), torch.tensor(0.1)
    labels = torch.full((24,), 4)
    with torch.no_grad():
        with_label, without = net(x, c_noise, labels), net(x, c_noise)  # eval: nothing is dropped
        assert (with_label - without).flatten(1).abs().amax(1).min() > 1e-3
        torch.manual_seed(0)
        mixed = net.train()(x, c_noise, labels)
    dropped = [torch.allclose(a, b, atol=1e-5) for a, b in zip(mixed, without)]
    kept = [torch.allclose(a, b, atol=1e-5) for a, b in zip(mixed, with_label)]
    assert [not d for d in dropped] == kept
    assert 13 <= sum(dropped) <= 23  # 18 expected, standard deviation 2.1


def bound(tensor):
    """Half-width of the uniform distribution that a large tensor was drawn from."""
    edge = tensor.abs().max().item()
    assert tensor.std().item() == pytest.approx(edge / math.sqrt(3), rel=0.1)
    return pytest.approx(edge, rel=0.02)


def test_initialisation_song():
    torch.manual_seed(0)
    net = unet.ncsnpp(16, 3, 10, 9, model_channels=32, channel_mult=(2, 4), num_blocks=1)
    block, xavier = net.enc["16x16_block0"], math.sqrt(6 / (9 * (32 + 64)))
    assert xavier == bound(block.conv0.weight)
    assert math.sqrt(6 / (64 + 128)) == bound(net.map_layer0.weight)
    assert 1e-5 * math.sqrt(6 / (9 * 128)) == bound(block.conv1.weight)
    attention = net.dec["8x8_in0"]
    assert math.sqrt(0.2) * math.sqrt(6 / (128 + 384)) == bound(attention.qkv.weight)
    assert 1e-5 * math.sqrt(6 / 256) == bound(attention.proj.weight)
    assert 1e-5 * math.sqrt(6 / (9 * (64 + 3))) == bound(net.dec["16x16_aux_conv"].weight)
    assert math.sqrt(6 / (10 + 64)) == bound(net.map_label.weight)
    assert math.sqrt(6 / (9 + 64)) == bound(net.map_augment.weight)
    assert net.map_noise.freqs.std().item() == pytest.approx(16, rel=0.5)
    for key, value in net.named_parameters():
        if "norm" in key:
            assert (value == key.endswith("weight")).all(), key
        elif key.endswith("bias"):
            assert (value == 0).all(), key


def test_initialisation_adm():
    torch.manual_seed(0)
    net = unet.adm(16, 3, 10, 9, model_channels=64, channel_mult=(1, 2), num_blocks=1)
    block = net.enc["8x8_block0"]
    assert math.sqrt(1 / (9 * 64)) == bound(block.conv0.weight)
    assert math.sqrt(1 / (9 * 64)) == bound(block.conv0.bias)
    assert math.sqrt(1 / 128) == bound(block.qkv.weight)
    assert math.sqrt(1 / 256) == bound(block.affine.weight)
    assert net.map_label.weight.std().item() == pytest.approx(1, rel=0.05)
    assert net.map_label.weight.abs().max() > 2.5  # normal, not uniform
    for key, value in net.named_parameters():
        if any(part in key for part in ("conv1.", "proj.", "out_conv.", "map_augment.")):
            assert (value == 0).all(), key
    with torch.no_grad():
        # D = c_skip x before the first training step.
        assert (net(torch.randn(2, 3, 16, 16), torch.zeros(2)) == 0).all()


def test_initialisation_depends_on_the_seed_alone():
    nets = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        nets.append(unet.ncsnpp(8, 1, **TINY).state_dict())
    assert all(torch.equal(nets[0][key], nets[1][key]) for key in nets[0])
    assert not torch.equal(nets[0]["enc.8x8_conv.weight"], nets[2]["enc.8x8_conv.weight"])
    assert not torch.equal(nets[0]["map_noise.freqs"], nets[2]["map_noise.freqs"])


# ------------------------------------------------------------------------------ the parts


@pytest.mark.parametrize("name", ["ddpmpp_cond", "adm_cond"])
def test_features_and_head(name):
    denoiser, config, g, conditions = golden_net(name)
    net, state = denoiser.model, denoiser.model.state_dict()
    norm, conv, eps = (
        ("dec.8x8_aux_norm", "dec.8x8_aux_conv", 1e-6)
        if name.startswith("ddpmpp")
        else ("out_norm", "out_conv", 1e-5)
    )
    with torch.no_grad():
        features = net.forward_features(g["F_in_x"], g["F_in_noise"], **conditions)  # (3, 16, 8, 8)
        by_hand = F.group_norm(features, 4, state[f"{norm}.weight"], state[f"{norm}.bias"], eps)
        by_hand = F.conv2d(
            F.silu(by_hand), state[f"{conv}.weight"], state[f"{conv}.bias"], padding=1
        )
        close(by_hand, g["F"], 2e-5)
        close(net.head(features), net(g["F_in_x"], g["F_in_noise"], **conditions), 0)


@pytest.mark.parametrize("taps", [(1, 1), (1, 3, 3, 1)])
def test_resampling_keeps_a_ramp_where_it_is(taps):
    """A ramp in x and y stays that ramp.

    Downsampling averages around the middle of 2 pixels, upsampling reads at their quarters.
    """
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    ramp = torch.stack([5 * y - 2 * x, x])[None]  # (1, 2, 8, 8)
    middle = torch.arange(4) * 2 + 0.5
    down = unet.Conv2d(2, 2, 0, None, down=taps)(ramp)
    close(
        down[0, :, 1:3, 1:3],
        torch.stack([5 * middle[:, None] - 2 * middle, middle.expand(4, 4)])[:, 1:3, 1:3],
        1e-6,
    )
    close(
        F.avg_pool2d(unet.Conv2d(2, 2, 0, None, up=taps)(ramp), 2)[:, :, 1:-1, 1:-1],
        ramp[:, :, 1:-1, 1:-1],
        1e-6,
    )
    up = unet.Conv2d(2, 2, 0, None, up=taps)(ramp)  # (1, 2, 16, 16)
    quarter = torch.arange(16) / 2 - 0.25 if len(taps) == 4 else torch.arange(16) // 2
    close(up[0, 1, 8, 2:-2], quarter[2:-2].float(), 1e-6)


def test_fused_resampling_is_the_same_map_away_from_the_border():
    torch.manual_seed(0)
    layer = unet.Conv2d(2, 3, 3, unet.Init(False, bias_gain=1.0), down=(1, 3, 3, 1), fused=True)
    plain = unet.Conv2d(2, 3, 3, unet.Init(False, bias_gain=1.0))
    plain.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    x = torch.randn(1, 2, 16, 16)
    expected = unet.Conv2d(3, 3, 0, None, down=(1, 3, 3, 1))(plain(x))
    close(layer(x)[..., 1:-1, 1:-1], expected[..., 1:-1, 1:-1], 1e-6)
    assert layer(x).shape == (1, 3, 8, 8)


# ------------------------------------------------------- derivatives, dtypes, compilation


@pytest.mark.parametrize("arch", ["ddpmpp", "ncsnpp", "adm"])
def test_first_and_second_derivatives(arch):
    torch.manual_seed(0)
    # ADM has attention from 64 channels on; here from 4.
    few = dict(family=replace(unet.ADM, head_channels=4)) if arch == "adm" else {}
    net = getattr(unet, arch)(4, 1, 2, **TINY, **few).double().eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2 if parameter.ndim > 1 else 0.5)
    x = torch.randn(2, 1, 4, 4, dtype=torch.float64)
    c_noise = torch.randn(2, dtype=torch.float64) / 4
    labels = torch.rand(2, 2, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, c_noise, labels)]
    # float32 anywhere inside would fail.
    assert torch.autograd.gradcheck(net, inputs, fast_mode=True)
    # What NCSN++ adds to DDPM++ has no second derivative of its own.
    if arch != "ncsnpp":
        with sdpa_kernel(SDPBackend.MATH):
            assert torch.autograd.gradgradcheck(net, inputs, fast_mode=True)


@pytest.mark.parametrize("name", ["ncsnpp_cond", "adm_cond"])
def test_bfloat16_autocast_and_channels_last(name):
    denoiser, _, g, conditions = golden_net(name)
    denoiser.to(memory_format=torch.channels_last)
    x = g["x"].to(memory_format=torch.channels_last)
    close(denoiser(x, g["sigma"], **conditions), g["D"], 2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        out = denoiser.model(g["F_in_x"], g["F_in_noise"], **conditions)
        # bfloat16 is too coarse for a phase.
        assert denoiser.model.map_noise(g["F_in_noise"]).dtype == torch.float32
    assert out.dtype == torch.bfloat16
    error = (out.float() - g["F"]).square().mean().sqrt() / g["F"].std()
    assert 1e-4 < error < 0.05  # 8 bits of mantissa
    out.float().square().mean().backward()
    assert all(
        p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in denoiser.parameters()
    )


@pytest.mark.parametrize("name", ["ncsnpp_cond", "adm_cond"])
def test_on_a_cpu_norms_resampling_and_attention_are_not_bfloat16(name, monkeypatch):
    """They take several times as long in it; convolutions run in it."""
    denoiser, _, g, conditions = golden_net(name)
    seen = {}

    def watch_dtype(name, plain):
        def call(x, *rest, **named):
            out = plain(x, *rest, **named)
            kind = (name, "resampling") if named.get("groups") else name
            seen.setdefault(kind, set()).add(out.dtype)
            return out

        monkeypatch.setattr(F, name, call)

    for name in ("group_norm", "conv_transpose2d", "scaled_dot_product_attention", "conv2d"):
        watch_dtype(name, getattr(F, name))
    with torch.autocast("cpu", torch.bfloat16):
        denoiser.model(g["F_in_x"], g["F_in_noise"], **conditions)
    assert seen.pop("conv2d") == {torch.bfloat16}
    assert len(seen) == 4 and set.union(*seen.values()) == {torch.float32}


@pytest.mark.parametrize("factory", [unet.ncsnpp, unet.adm])
def test_compiles_as_one_graph(factory):
    options = TINY | dict(channel_mult=(1,) if factory is unet.adm else (1, 2))
    net = factory(8, 3, 10, 9, **options).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = torch.randn(2, 3, 8, 8), torch.randn(2), torch.tensor([3, 1]), torch.randn(2, 9)
    with torch.no_grad():
        # A graph break would raise.
        compiled = torch.compile(net, fullgraph=True, backend="eager")
        close(compiled(*inputs), net(*inputs), 1e-6)


def test_patches_are_channels_of_a_smaller_image():
    """patch=2 on 8x8x3 is the same network on 4x4x12, each 2x2 square of pixels spelt out."""
    net = unet.ddpmpp(8, 3, 10, patch=2, **TINY).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    inner = unet.ddpmpp(4, 12, 10, **TINY).eval()
    inner.load_state_dict(net.state_dict())
    x, c_noise, labels = torch.randn(2, 3, 8, 8), torch.randn(2), torch.tensor([3, 1])
    corners = [(c, i, j) for c in range(3) for i in range(2) for j in range(2)]
    small = torch.stack([x[:, c, i::2, j::2] for c, i, j in corners], 1)  # (2, 12, 4, 4)
    with torch.no_grad():
        f, out = inner(small, c_noise, labels), net(x, c_noise, labels)
    for k, (c, i, j) in enumerate(corners):
        close(out[:, c, i::2, j::2], f[:, k], 1e-6)


# --------------------------------------------------------------------------------- misuse


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        (
            (28, 1),
            dict(channel_mult=(1, 2, 2, 2)),
            "img_resolution=28 cannot be halved 3 times; use a multiple of 8",
        ),
        ((8, 1), TINY | dict(model_channels=144), "144 channels.* 32 groups.*multiple of 32"),
        ((8, 1), TINY | dict(model_channels=2), "2 channels.* 0 groups.*multiple of 32"),
        ((8, 1), TINY | dict(model_channels=5), "model_channels=5 is odd.*even"),
        (
            (8, 1),
            dict(family=unet.ADM, model_channels=224, channel_mult=(1,)),
            "224 channels.* 3 attention heads.*multiple of 64",
        ),
        (
            (8, 1),
            TINY | dict(embedding_type="cosine"),
            "embedding_type='cosine'.*'positional' or 'fourier'",
        ),
        ((8, 1), TINY | dict(encoder_type="skip"), "encoder_type='skip'.*'standard' or 'residual'"),
    ],
)
def test_wrong_options_are_named(arguments, options, message):
    with torch.device("meta"), pytest.raises(ValueError, match=message) as error:
        unet.ddpmpp(*arguments, **options)
    assert "\n" not in str(error.value)


def test_unknown_option():
    for factory in (unet.ddpmpp, unet.ncsnpp, unet.adm):
        with pytest.raises(TypeError, match="model_chanels"):
            factory(8, 1, model_chanels=8)


def test_nothing_is_too_small():
    net = unet.ddpmpp(8, 1, model_channels=4, channel_mult=(1,), num_blocks=1, attn_resolutions=())
    with torch.no_grad():
        out = net(torch.randn(2, 1, 8, 8), torch.zeros(2))
    assert out.isfinite().all() and out.shape == (2, 1, 8, 8)
