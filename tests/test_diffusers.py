"""Models of diffusers as teachers, and back: agreement with diffusers' own numbers."""

import contextlib
import copy
import importlib.util
import json
import shutil
import sys
from functools import partial
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

import cfd
import distributional
import dode
import ld3
import progressive
from common import UsageError
from common.datasets import Stream, load_dataset
from common.diffusion import noise_from_seeds, sigma_grid
from common.machinery import diffusers_teachers
from common.machinery.options import cli
from common.solvers import SOLVERS, euler
from common.teacher import load_student, load_teacher, save_teacher
from scripts import run_script

sys.path.append(str(Path(__file__).parent.parent / "notebooks"))
import to_diffusers  # noqa: E402

BETAS = ("linear", "scaled_linear", "squaredcos_cap_v2")
PREDICTIONS = ("epsilon", "sample", "v_prediction")
SCRIPTS = (ld3, dode, progressive, cfd, distributional)
SIZES = dict(
    in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_num_groups=4, attention_head_dim=8,
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
)  # fmt: skip


def save_model(folder, prediction="epsilon", betas="linear", size=4, classes=None, **options):
    """A UNet2DModel with random weights and its scheduler, in a folder that diffusers wrote."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=size, num_class_embeds=classes, **SIZES).eval()
    scheduler = diffusers.DDIMScheduler(
        prediction_type=prediction, beta_schedule=betas, clip_sample=False, **options
    )
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return unet, scheduler


def load(folder, dataset="folder"):
    return load_teacher(str(folder), dataset, torch.device("cpu"))


@pytest.fixture(scope="module")
def digits_model(tmp_path_factory):
    """Of the size of digits, predicts eps, linear betas."""
    folder = tmp_path_factory.mktemp("model") / "eps"
    save_model(folder, size=8)
    return folder


def in_double(unet, scheduler, denoiser):
    """diffusers' tables are float32: at sigma 20,000 that is 1e-3 of an x0."""
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return unet.double(), scheduler, denoiser.double()


# ------------------------------------------------------------------------- the same numbers


def pairs():
    """All predictions with all betas; a third of them in the quick tier."""
    for i, prediction in enumerate(PREDICTIONS):
        for j, betas in enumerate(BETAS):
            yield pytest.param(prediction, betas, marks=[pytest.mark.slow] if i != j else [])


@pytest.mark.parametrize("prediction, betas", [*pairs()])
@torch.no_grad()
def test_x0_and_ddim_are_those_of_diffusers(tmp_path, prediction, betas):
    """At every training timestep x0 to 1e-5, and ten steps of its DDIMScheduler to 1e-4."""
    parts = save_model(tmp_path, prediction, betas, timestep_spacing="trailing")
    in_float = load(tmp_path)
    unet, scheduler, denoiser = in_double(*parts, copy.deepcopy(in_float))
    a = scheduler.alphas_cumprod
    sigmas = (1 - a).sqrt() / a.sqrt()
    t = torch.arange(1000)
    z = noise_from_seeds(range(1000), (1, 4, 4))
    scheduler.set_timesteps(1000)
    output = unet(z, t).sample
    theirs = torch.cat(
        [scheduler.step(output[k : k + 1], k, z[k : k + 1]).pred_original_sample for k in t]
    )
    x = z * (1 + sigmas**2).sqrt().view(-1, 1, 1, 1)
    torch.testing.assert_close(denoiser(x, sigmas), theirs, rtol=0, atol=1e-5)
    # In float32 as far as its network goes: to 1e-5 of the largest pixel or of 1.
    size = theirs.abs().amax((1, 2, 3), keepdim=True).clamp(min=1)
    torch.testing.assert_close(in_float(x, sigmas) / size, theirs / size, rtol=0, atol=1e-5)

    scheduler.set_timesteps(10)
    grid = torch.cat([sigmas[scheduler.timesteps], torch.zeros(1)])
    ours = euler(denoiser, (1 + grid[0] ** 2).sqrt() * z[:4], grid)
    z = z[:4]
    for t in scheduler.timesteps:
        z = scheduler.step(unet(z, t).sample, t, z).prev_sample
    torch.testing.assert_close(ours, z, rtol=0, atol=1e-4)


@pytest.mark.parametrize("betas", BETAS)
def test_between_training_timesteps(tmp_path, betas):
    """As diffusers' EulerDiscreteScheduler: linear in log sigma, the nearest outside."""
    save_model(tmp_path, betas=betas)
    denoiser = load(tmp_path)
    euler_scheduler = diffusers.EulerDiscreteScheduler(beta_schedule=betas)
    low, high = diffusers_teachers.sigma_range(tmp_path)
    sigmas = sigma_grid("logsnr", 50, low / 2, high * 2)
    euler_scheduler.set_timesteps(sigmas=[*sigmas.tolist(), 0])
    t = denoiser.timestep(sigmas)
    torch.testing.assert_close(t, euler_scheduler.timesteps.double(), rtol=0, atol=2e-3)
    assert t[0] == 999 and t[-1] == 0 and (t[1:-1].frac() > 0).any()
    assert torch.equal(denoiser.timestep(denoiser.log_sigmas.exp()).round(), torch.arange(1000.0))
    inside = sigmas[5:-5].requires_grad_()
    assert torch.autograd.gradcheck(denoiser.timestep, (inside,), eps=1e-7, atol=1e-3, rtol=1e-3)


def test_gradients_reach_the_noise_levels_and_checkpointing_changes_none(digits_model):
    """LD3 learns conditioning noise levels through the timestep's embedding."""
    x = noise_from_seeds(range(2), (1, 8, 8))
    gradients = []
    for recompute in (False, True):
        denoiser = load(digits_model, "digits").requires_grad_(True)
        denoiser.net.checkpoint = recompute
        assert denoiser.net.checkpoint == recompute
        sigma = denoiser.log_sigmas[300:302].mean().exp().requires_grad_()  # between two timesteps
        denoiser(x, sigma).square().mean().backward()
        assert denoiser.net.unet.is_gradient_checkpointing == recompute
        gradients.append([sigma.grad, *(p.grad for p in denoiser.parameters())])
    for plain, recomputed in zip(*gradients):
        torch.testing.assert_close(plain, recomputed)
    h = 1e-3 * sigma.item()
    with torch.no_grad():
        up, down = (denoiser(x, sigma + d).square().mean() for d in (h, -h))
    assert gradients[0][0].item() == pytest.approx((up - down).item() / (2 * h), rel=0.02)


@torch.no_grad()
def test_classes_reach_the_network(tmp_path):
    unet, _ = save_model(tmp_path, "sample", classes=3)
    denoiser = load(tmp_path)
    x, labels = noise_from_seeds(range(4), (1, 4, 4)), torch.tensor([0, 2, 1, 2])
    sigma = denoiser.log_sigmas[300].exp()
    z = (x / (1 + sigma**2).sqrt()).float()
    assert denoiser.net.label_dim == 3 and denoiser.net.img_shape == (1, 4, 4)
    expected = unet(z, 300, labels).sample.double()
    for given in (labels, torch.nn.functional.one_hot(labels, 3)):
        torch.testing.assert_close(denoiser(x, sigma, given), expected, rtol=0, atol=1e-5)
    save_model(tmp_path / "none")
    plain = load(tmp_path / "none")
    assert plain.net.label_dim == 0
    assert torch.equal(plain(x, 1.0, labels), plain(x, 1.0))  # as everywhere: ignored


# --------------------------------------------------------------------------- and back


def exported(folder, solver, order, denoiser, sigmas, variant="bh1"):
    """The scheduler that the written loader makes."""
    to_diffusers.export_grid(folder, denoiser, sigmas, solver, order, variant)
    spec = importlib.util.spec_from_file_location("ld3_scheduler", folder / "ld3_scheduler.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.load()


def learned_grid(low, high, n=7):
    """A grid that no scheduler of diffusers has."""
    sigmas = sigma_grid("logsnr", n, low, high)
    sigmas[1:-1] *= 1 + 0.2 * torch.sin(torch.arange(1.0, n))
    return sigmas


RULES = [  # solver and order, steps, sigma_max over the model's
    (("euler", 1), 7, 1), (("dpmpp", 2), 16, 1), (("dpmpp", 3), 7, 1), (("unipc", 2), 7, 1),
    (("unipc", 2, "bh2"), 7, 1),
    (("unipc", 3), 7, 10),  # its first two levels have the same, last timestep
]  # fmt: skip


@pytest.mark.parametrize("prediction, betas", [*pairs()])
@torch.no_grad()
def test_the_exported_scheduler_samples_as_our_solver(tmp_path, prediction, betas):
    unet, _ = save_model(tmp_path / "model", prediction, betas)
    denoiser = load(tmp_path / "model")
    low, high = diffusers_teachers.sigma_range(tmp_path / "model")
    noise = noise_from_seeds(range(4), (1, 4, 4))
    own = denoiser.scheduler
    for (solver, order, *variant), steps, above in RULES:
        sigmas = learned_grid(low, above * high, steps)
        keeps = steps == 16  # a model whose scheduler ends at sigma_min; the others end at 0
        denoiser.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(
            own.config, final_sigmas_type="sigma_min" if keeps else "zero"
        )
        scheduler = exported(tmp_path / "export", solver, order, denoiser, sigmas, *variant)
        more = {"variant": variant[0]} if variant else {}
        if not keeps:
            sigmas[-1] = 0
        for _ in range(2):  # the second time as the first
            scheduler.set_timesteps(50)
            z = noise.float() * scheduler.init_noise_sigma
            for t in scheduler.timesteps:
                model_output = unet(scheduler.scale_model_input(z, t), t).sample
                z = scheduler.step(model_output, t, z).prev_sample
        theirs = z.double() * (1 + sigmas[-1] ** 2) ** 0.5
        ours = SOLVERS[solver](denoiser, above * high * noise, sigmas, order=order, **more)
        size = max(1, theirs.abs().max())  # of eps with random weights: hundreds
        torch.testing.assert_close(ours / size, theirs / size, rtol=0, atol=2e-5)


@pytest.mark.parametrize("solver, order", [("euler", 1), ("dpmpp", 3), ("unipc", 3)])
@torch.no_grad()
def test_a_pipeline_makes_our_images(tmp_path, solver, order):
    """DDPMPipeline, which begins with unit noise and returns images in [0, 1]: to 1e-3."""
    save_model(tmp_path / "model", "sample")
    denoiser = load(tmp_path / "model")
    low, high = diffusers_teachers.sigma_range(tmp_path / "model")
    sigmas = learned_grid(low, high)
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "model")
    pipeline.scheduler = exported(tmp_path / "export", solver, order, denoiser, sigmas)
    pipeline.set_progress_bar_config(disable=True)
    sigmas[-1] = 0  # as with diffusers' own schedulers, no noise stays
    seed = partial(torch.Generator().manual_seed, 3)
    images = pipeline(batch_size=4, generator=seed(), output_type="np").images
    noise = torch.randn(4, 1, 4, 4, generator=seed()).double()
    ours = SOLVERS[solver](denoiser, high * noise, sigmas, order=order)
    assert (ours.abs() < 1).double().mean() > 0.5  # not all clipped
    ours = (ours / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(
        torch.from_numpy(images).permute(0, 3, 1, 2).double(), ours, rtol=0, atol=1e-3
    )


def test_students_are_saved_for_diffusers(tmp_path, digits_model):
    """What PD, CFD and GDD write: a pipeline of diffusers, and a teacher."""
    teacher = load(digits_model, "digits")
    student = progressive.make_student(teacher)
    x = noise_from_seeds(range(2), (1, 8, 8))
    assert torch.equal(student(x, 2.0), teacher(x, 2.0))
    with torch.no_grad():
        for p in student.parameters():
            p.mul_(0.9)
    path = tmp_path / "student-4.safetensors"
    save_teacher(path, student, teacher.arch, teacher.kwargs, "digits")
    read = [
        load(tmp_path / "student-4", "digits"),
        load_student(tmp_path / "student-4.safetensors", copy.deepcopy(teacher)),
        progressive.read_student(tmp_path / "student-4.safetensors", teacher),
    ]
    with torch.no_grad():
        for other in read:
            assert torch.equal(other(x, 2.0), student(x, 2.0))
            assert not torch.equal(other(x, 2.0), teacher(x, 2.0))
            assert not any(p.requires_grad for p in other.parameters())
        pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "student-4")
        z = x.float()
        torch.testing.assert_close(pipeline.unet(z, 7).sample, student.net(z, torch.tensor(7)))

    # A student of another prediction says so in its folder, and is no student of this teacher.
    student = progressive.make_student(teacher, "v")
    save_teacher(tmp_path / "v.pt", student, teacher.arch, teacher.kwargs, "digits")
    read = load(tmp_path / "v", "digits")
    assert read.prediction == "v_prediction" and torch.equal(read(x, 2.0), student(x, 2.0))
    again = progressive.read_student(tmp_path / "v.pt", teacher, "v")
    assert torch.equal(again(x, 2.0), read(x, 2.0))
    save_model(tmp_path / "larger", size=16)
    for path, said in (
        ("v.pt", "v: not a student .*its prediction_type is v_prediction"),
        ("larger.pt", None),
        ("nothing.pt", "nothing"),
    ):
        with pytest.raises(UsageError, match=said) if said else contextlib.nullcontext():
            load_student(tmp_path / path, copy.deepcopy(teacher))


def test_gdd_starts_from_the_teacher_and_freezes_the_same_layers(digits_model):
    teacher = load(digits_model, "digits")
    generator = distributional.make_generator(teacher, "none")
    x = noise_from_seeds(range(2), (1, 8, 8))
    made = distributional.one_step(generator, 150.0)(x, None)
    torch.testing.assert_close(made, euler(teacher, 150 * x, torch.tensor([150.0, 0.0])))
    assert all(p.requires_grad for p in generator.parameters())
    kinds = {"conv": {"conv1", "conv2", "to_out"}}
    kinds["conv+qkv"] = kinds["conv"] | {"to_q", "to_k", "to_v"}
    kinds["conv+qkv+skip"] = kinds["conv+qkv"] | {"conv_shortcut"}
    for level, frozen in kinds.items():
        for name, p in distributional.make_generator(teacher, level).named_parameters():
            assert p.requires_grad == (not frozen & set(name.split("."))), name


# ------------------------------------------------------------------------------- options


def test_noise_levels_default_to_those_of_the_training(digits_model):
    a = diffusers.DDPMScheduler().alphas_cumprod.double()
    low, high = ((1 - a) / a).sqrt()[[0, -1]].tolist()
    assert (low, high) == pytest.approx((0.01, 157.4), rel=1e-3)
    for script in SCRIPTS:
        of_edm, given = script.Config(), script.Config(teacher=str(digits_model), sigma_max=7.0)
        config = script.Config(teacher=str(digits_model))
        assert config.sigma_max == pytest.approx(high) and given.sigma_max == 7.0
        assert of_edm.sigma_max == 80.0
        if hasattr(config, "sigma_min"):
            assert config.sigma_min == given.sigma_min == pytest.approx(low)
            assert of_edm.sigma_min == 0.002


def edit(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def pickled(folder):
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def with_weights(change):
    def damage(folder):
        path = folder / "unet" / "diffusion_pytorch_model.safetensors"
        weights = load_file(path)
        change(weights)
        save_file(weights, path)

    return damage


def test_a_model_that_has_only_a_half_variant_is_read(digits_model, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(digits_model, folder)
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights = {name: weight.half() for name, weight in load_file(path).items()}
    save_file(weights, path.with_suffix(".fp16.safetensors"))
    path.unlink()
    found = load(folder, "digits").net.unet.state_dict()
    assert all(torch.equal(found[name], weight.float()) for name, weight in weights.items())


def unet_config(**changes):
    return lambda folder: edit(folder / "unet" / "config.json", **changes)


def scheduler_config(**changes):
    return lambda folder: edit(folder / "scheduler" / "scheduler_config.json", **changes)


BAD = {
    "no model": (lambda f: (f / "unet" / "config.json").unlink(), "config.json"),
    "no scheduler": (lambda f: shutil.rmtree(f / "scheduler"), "scheduler_config.json"),
    "no json": (lambda f: (f / "unet" / "config.json").write_text("{"), "config.json"),
    "another class": (unet_config(_class_name="DiTTransformer2DModel"), "DiTTransformer2DModel"),
    "variance": (unet_config(out_channels=2), "variance"),
    "no size": (unet_config(sample_size=None), "sample_size"),
    "a size that is text": (unet_config(sample_size="32"), "sample_size"),
    "a negative size": (unet_config(sample_size=-8), "sample_size"),
    "no timesteps": (scheduler_config(num_train_timesteps=0), None),
    "empty betas": (scheduler_config(trained_betas=[]), None),
    "deep": (lambda f: (f / "unet" / "config.json").write_text("[" * 10**5), "recursion"),
    "another size": (unet_config(sample_size=16), r"\(1, 16, 16\), digits has \(1, 8, 8\)"),
    "fourier": (unet_config(time_embedding_type="fourier"), "timesteps"),
    "identity": (unet_config(class_embed_type="identity"), "class_embed_type"),
    "other widths": (unet_config(block_out_channels=[8, 32]), "shape|size"),
    "pickled": (pickled, "no file named .*safetensors"),
    "missing": (with_weights(lambda w: w.pop("conv_in.bias")), "conv_in.bias"),
    "more": (with_weights(lambda w: w.update(more=torch.zeros(1))), "more"),
    "nan": (with_weights(lambda w: w["conv_in.bias"].fill_(torch.nan)), "not finite"),
    "scheduler": (scheduler_config(_class_name="PNDMScheduler"), "PNDMScheduler.*DDIMScheduler"),
    "prediction": (scheduler_config(prediction_type="flow"), "prediction_type is flow"),
    "betas": (scheduler_config(beta_schedule="sigmoid"), "beta_schedule is sigmoid"),
    "no number": (scheduler_config(beta_end="x"), "str"),
    "no noise": (scheduler_config(rescale_betas_zero_snr=True), "finite"),
    "falling": (scheduler_config(beta_start=-1.0), "increasing"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_folders_are_one_line(tmp_path, digits_model, monkeypatch, capfd, name):
    damage, said = BAD[name]
    shutil.copytree(digits_model, tmp_path / "model")
    damage(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        arguments = ("--smoke", "--teacher", tmp_path / "model", "--out", tmp_path / "run")
        cli(lambda: run_script(ld3, monkeypatch, *arguments))
    assert stop.value.code == 2
    line, end = capfd.readouterr().err.split("\n")
    assert "error: --teacher " in line and end == "" and len(line) < 500
    with pytest.raises(UsageError, match=said):
        load(tmp_path / "model", "digits")


def test_a_model_with_its_scheduler_beside_it_and_one_from_the_hub(
    tmp_path, digits_model, monkeypatch
):
    flat = tmp_path / "flat"
    shutil.copytree(digits_model / "unet", flat)
    shutil.copy(digits_model / "scheduler" / "scheduler_config.json", flat)
    x = noise_from_seeds(range(2), (1, 8, 8))
    expected = load(digits_model, "digits")(x, 3.0)
    assert torch.equal(load(flat, "digits")(x, 3.0), expected)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append(name)
        if name == "nobody/nothing":
            raise OSError("no\nnetwork")
        assert not any(pattern.endswith((".bin", ".pt", "*")) for pattern in allow_patterns)
        return str(digits_model)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert torch.equal(load("somebody/model", "digits")(x, 3.0), expected)
    with pytest.raises(UsageError, match="--teacher nobody/nothing: .*no network"):
        load("nobody/nothing", "digits")
    with pytest.raises(UsageError, match="No such file"):
        load("runs/nothing.pt", "digits")  # a file's name, and no repository's
    assert asked == ["somebody/model", "nobody/nothing"]


def test_without_diffusers_one_line_says_what_to_install(digits_model, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(UsageError, match="--teacher .*pip install"):
        load(digits_model, "digits")


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"sigmas_net": [9.0, 4.0, 0.1]}, "--times coupled"),
        ({"solver": "heun"}, "euler, dpmpp, unipc"),
        ({"sigmas": [2.0, 1.0], "sigmas_net": [2.0]}, "--times coupled"),
        ({"solver": "dpmpp", "order": 3, "sigmas": [*range(16, 0, -1)]}, "--order 2"),
        ({"teacher": "x.pt"}, "no model of diffusers"),
        ({"teacher": None}, "no model of diffusers"),
        ({"sigmas": ["x"]}, "not a schedule.json"),
    ],
)
def test_what_cannot_be_exported_is_refused(digits_model, monkeypatch, tmp_path, changes, said):
    about = {"teacher": str(digits_model), "solver": "unipc", "order": 3, "variant": "bh1"}
    about |= {"sigmas": [9.0, 5.0, 0.1], **changes}
    path = tmp_path / "schedule.json"
    path.write_text(json.dumps({"sigmas_net": about["sigmas"], **about}))
    with pytest.raises(UsageError, match=said):
        run_script(
            to_diffusers, monkeypatch, "--schedule", path, "--out", tmp_path / "export"
        )
    assert not (tmp_path / "export").exists()


# ------------------------------------------------------------------------- all together


def train_as_diffusers(folder, steps):
    """diffusers' own training loop, on digits: noise, timesteps, add_noise, MSE on eps."""
    torch.manual_seed(0)
    sizes = {**SIZES, "block_out_channels": (32, 64), "norm_num_groups": 8}
    unet = diffusers.UNet2DModel(sample_size=8, **sizes)
    scheduler = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(unet.parameters(), 2e-3)
    rate = diffusers.optimization.get_cosine_schedule_with_warmup(optimizer, 50, steps)
    stream, losses = Stream(load_dataset("digits"), 64, 0), []
    for _ in range(steps):
        x0, _ = stream.next()
        noise, t = torch.randn_like(x0), torch.randint(1000, (len(x0),))
        output = unet(scheduler.add_noise(x0, noise, t), t).sample
        loss = torch.nn.functional.mse_loss(output, noise)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        losses.append(loss.item())
    diffusers.DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return sum(losses[-50:]) / 50


@pytest.mark.slow
def test_a_model_that_diffusers_trained_on_digits_goes_through_every_script(
    tmp_path, monkeypatch
):
    model = tmp_path / "model"
    assert train_as_diffusers(model, 600) < 0.3  # of eps; 1 at the start

    def rows(script, out, *arguments):
        run_script(script, monkeypatch, "--smoke", "--out", tmp_path / out, *arguments)
        metrics = json.loads((tmp_path / out / "metrics.json").read_text())
        assert metrics["teacher"] == str(arguments[1])
        assert metrics["config"]["sigma_max"] == pytest.approx(157.4, rel=1e-3)
        return {(row["name"], row["nfe"]): row for row in metrics["results"]}

    more = ("--times", "coupled", "--steps", 40, "--train-n", 8, "--batch-size", 4)
    learned = rows(ld3, "ld3", "--teacher", model, *more)
    hand_made = min(v["rmse_to_teacher"] for (k, _), v in learned.items() if k in ("logsnr", "edm"))
    assert learned["ld3", 5]["rmse_to_teacher"] < hand_made
    schedule = tmp_path / "ld3" / "schedule.json"
    folder = tmp_path / "export"
    run_script(to_diffusers, monkeypatch, "--schedule", schedule, "--out", folder)
    assert (folder / "ld3_scheduler.py").exists()
    fitted = rows(dode, "dode", "--teacher", model)
    assert fitted["d-ddim", 5]["rmse_to_teacher"] < fitted["ddim", 5]["rmse_to_teacher"]
    both = rows(dode, "both", "--teacher", model, "--schedule", schedule, "--solver", "ddim")
    assert both["d-ddim", 5]["rmse_to_teacher"] < both["ddim", 5]["rmse_to_teacher"]
    for script, out, *arguments in (
        (progressive, "pd", "--prediction", "v"),
        (progressive, "pd-eps"),
        (cfd, "cfd", "--pd", tmp_path / "pd-eps"),
        (distributional, "gdd"),
    ):
        rows(script, out, "--teacher", model, *arguments)
    for student in ("pd/student-1", "pd-eps/student-2", "cfd/student-1", "gdd/generator"):
        student = load(tmp_path / student, "digits")
        assert student(noise_from_seeds([0], (1, 8, 8)), 80.0).isfinite().all()
    assert load(tmp_path / "pd" / "student-1", "digits").prediction == "v_prediction"
