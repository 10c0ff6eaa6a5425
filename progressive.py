"""Progressive Distillation for Fast Sampling of Diffusion Models (Salimans & Ho, ICLR 2022, arXiv:2202.00512).

Idea: DDIM with 2N steps is a deterministic map from noise to image. A student, a copy of the network, learns to do two of its steps in
one, at every level of the walk; then the student is the teacher, N is halved, and so on down to a single step. Every stage is
supervised regression on the data set's own noisy images: no sampling while training, no new network.

Loss (Eq. 2 with the target of Alg. 2):  L = E over i, x0, noise of  w(sigma_i) | x~ - D_student(x, sigma_i) |^2,  x = x0 + sigma_i noise
    t = i/N, i uniform on 1, ..., N (discrete time), sigma = tan(pi t / 2); two DDIM steps of the teacher, t -> t - 1/2N -> t - 1/N,
    pass through levels sigma > sigma' > sigma''; x~ is the answer that takes one DDIM step to the same place.
    w = max(1, 1 / sigma^2): truncated SNR, the larger of the errors in data and in noise (section 4).
The paper's z, alpha_t, sigma_t are VP: z = alpha x, sigma_t = alpha sigma. DDIM is Euler in our sigma, so that two steps are
    x'' - r x = r2 (1 - r1) D1 + (1 - r2) D2,  r1 = sigma'/sigma, r2 = sigma''/sigma', r = r1 r2,  and  x~ = (x'' - r x) / (1 - r):
the target is a weighted mean of the teacher's two answers. At sigma'' = 0 it is the second; the paper's rule for i = 0 needs no line.

Differences from the paper and its official code (google-research/diffusion_distillation):
 1. The teacher is any EDM denoiser (theirs: VP, predicts x or (x, eps)). --prediction x, v, eps make the student's network predict what
    the paper's Table 1 compares; then a first stage, without halving, translates the teacher into that form.
 2. Levels above sigma_max are cut off (80; theirs: logSNR bounded to +-20, sigma up to 22,026); where that makes both ends of a step
    equal, as in the first 65 of 8192 steps, the step is left out.
 3. Twice the updates for the last two stages (paper, section 5.2; the released config has the same number for all).
 4. Nothing is clipped while sampling but the finished image (theirs: every answer, to [-1, 1]).
 5. digits: 16 -> 1 in a few hundred updates of lr 5e-4 (CIFAR-10: 8192 -> 1, 50,000 updates, 5e-5).
Measured: digits, 16 -> 1, FID [digits-classifier, n=1024], 3 training seeds, 4.3 minutes on 2 CPU cores; Heun with 35 evaluations: 0.156
    steps  ddim, same grid  ddim, edm grid  pd              pd / ddim    the same in features of a classifier of another seed
        8            0.674            2.76  0.392 +- 0.014       0.58    0.749 -> 0.430
        4            2.255           14.02  0.500 +- 0.026       0.22    2.60  -> 0.560
        2           18.73            55.43  0.688 +- 0.030       0.04    20.6  -> 0.772
        1          105.1            105.0   1.184 +- 0.048       0.01    98.9  -> 1.30
    --updates 80, one seed, FID at 16, 8, 4, 2, 1 steps: --prediction v 0.45, 0.56, 0.84, 1.41, 2.36; eps 10.1, 10.7, 12.5, 17.1, 35.4
    python progressive.py                                           # digits, 16 -> 1
    python progressive.py --from-steps 4 --to-steps 2 --teacher runs/progressive-digits/student-4.pt   # a part of it
    python progressive.py --resume                                  # go on; or, when it is done, measure and sample again
    python progressive.py --prediction eps                          # why the paper does not predict the noise
    python progressive.py --dataset cifar10                         # one GPU; torchrun --nproc_per_node=8 progressive.py ... for eight
"""
import copy
from dataclasses import dataclass
from functools import partial

import torch

from common.datasets import Stream, load_dataset
from common.diffusion import Denoiser, expand, sigma_grid, with_labels
from common.fid import make_judge, measure
from common.plots import save_curves, save_rows
from common.solvers import euler, heun
from common.teacher import check_classes, load_teacher, save_teacher
from common.training import (SCORES, Run, TrainingOptions, UsageError, accumulate, autocast, average_gradients, cli, ema_update,
                             fill_from_presets, load_checkpoint, option, parse_config, prepare, require, save_checkpoint, table)

PREDICTIONS = ("edm", "x", "v", "eps")
TRANSLATE = 4  # the stage that teaches the network another form: so many times the updates, at so many times the rate
WEIGHTS = {  # section 4; 1 / sigma^2 is the SNR
    "truncated": lambda sigma: (1 / sigma**2).clamp(min=1),
    "snr": lambda sigma: 1 / sigma**2,
    "snr+1": lambda sigma: 1 / sigma**2 + 1,
    "constant": torch.ones_like,
}


@dataclass
class Config(TrainingOptions):
    teacher: str | None = option(None, "teacher checkpoint, or a student-N.pt of an earlier run (default: the data set's own)")
    from_steps: int | None = option(None, "steps of the teacher's sampler (official: 8192 on CIFAR-10, 1024 on ImageNet-64)")
    to_steps: int = option(1, "steps of the last student: --from-steps halved as often as you like (paper: 1)")
    sigma_max: float = option(80.0, "highest noise level (EDM); levels above are cut off")
    prediction: str = option("edm", "what the student's network predicts; all but edm need a stage more", choices=PREDICTIONS)
    weight: str = option("truncated", "weight of the squared error in x0 (official: truncated SNR)", choices=tuple(WEIGHTS))
    updates: int | None = option(None, "updates of a stage, twice as many for 2 steps and 1 (paper, section 5.2: 50,000)")
    batch_size: int | None = option(None, "images per update, over all ranks (official: 128; ImageNet-64: 2048)")
    lr: float | None = option(None, "Adam's rate, falls to 0 in every stage (official: 5e-5; ImageNet-64: 1e-4)")
    clip: float = option(1.0, "largest norm of the gradient (official: 1)")
    ema: float = option(0.0, "decay of an average of the weights within a stage; 0: none (official)")
    flip: bool | None = option(None, "random horizontal flips of the training images")
    nfe: tuple[int, ...] | None = option(None, "step counts to measure (default: 8, 4, 2, 1 as far as they are stages)")

    def __post_init__(self):
        fill_from_presets(self, PRESETS, SMOKE)
        check_stages(self)
        for name in ("updates", "batch_size", "lr", "clip"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        require(0 <= self.ema < 1, "ema", self.ema, "must be at least 0 and below 1")


def check_stages(config):
    """What progressive.py and cfd.py ask of their step counts. Fills in --nfe."""
    n, last = config.from_steps, config.to_steps
    require(last >= 1, "to_steps", last, "must be at least 1")
    require(n >= last and n % last == 0 and (n // last).bit_count() == 1, "from_steps", n, f"must be --to-steps {last} times a power of 2")
    require(0 < config.sigma_max < float("inf"), "sigma_max", config.sigma_max, "must be above 0 and finite")
    counts = [n >> k for k in range((n // last).bit_length())]  # from_steps, ..., to_steps
    config.nfe = [c for c in counts if c <= 8] or [last] if config.nfe is None else config.nfe
    config.nfe = tuple(sorted({config.nfe} if isinstance(config.nfe, int) else set(config.nfe), reverse=True))
    for count in config.nfe:
        require(count in counts, "nfe", count, f"there is no such stage; choose from {', '.join(map(str, counts))}")
    walks = {len(stage_levels(count, config.sigma_max)) for count in config.nfe}
    require(len(walks) == len(config.nfe), "sigma_max", config.sigma_max, "so many steps have nothing to do that two of --nfe are the same")


# Official: config/cifar_distill.py and imagenet64_distill.py; updates: paper, section 5.2.
_CIFAR10 = dict(from_steps=8192, updates=50_000, batch_size=128, lr=5e-5, flip=True, eval_n=50_000, eval_batch=256)
PRESETS = {
    "digits": {**_CIFAR10, "from_steps": 16, "updates": 300, "lr": 5e-4, "flip": False, "eval_n": 1024},
    "mnist": {**_CIFAR10, "from_steps": 64, "updates": 2000, "lr": 2e-4, "flip": False, "eval_n": 10_000},
    "cifar10": _CIFAR10,
    "imagenet64": {**_CIFAR10, "from_steps": 1024, "batch_size": 2048, "lr": 1e-4, "flip": False},
    "folder": {**_CIFAR10, "from_steps": 1024, "eval_n": 10_000},
}
SMOKE = dict(from_steps=4, updates=2, batch_size=4, eval_n=32, eval_batch=32)


# ------------------------------------------------------------------------------------------------------------------- the method

def stage_levels(n, sigma_max):
    """The steps of an n-step student: (m, 3) rows of sigma > sigma' > sigma'', sigma = tan(pi t / 2) at t = i/n, (i - 1/2)/n, (i - 1)/n.

    Cut off at sigma_max; m < n where that leaves a step nothing to do.
    """
    t = torch.linspace(1, 0, 2 * n + 1, dtype=torch.float64)
    sigmas = torch.tan(torch.pi / 2 * t).clamp(max=sigma_max)
    sigmas[0] = sigma_max  # tan(pi / 2) in floating point
    rows = torch.stack([sigmas[:-2:2], sigmas[1::2], sigmas[2::2]], 1)
    return rows[rows[:, 0] > rows[:, 2]]


def two_step_target(teacher, x, sigma, sigma_mid, sigma_end):
    """x~ (B, C, H, W): the data that one DDIM step from sigma must assume to land where two steps of the teacher do (Alg. 2).

    x (B, C, H, W) at level sigma; sigma >= sigma_mid > sigma_end >= 0, each (B,).
    """
    d1 = teacher(x, sigma)
    r1, r2 = (expand(b, x) / expand(a, x) for a, b in ((sigma, sigma_mid), (sigma_mid, sigma_end)))
    d2 = teacher(r1 * x + (1 - r1) * d1, sigma_mid)  # DDIM, Eq. (7)
    return (r2 * (1 - r1) * d1 + (1 - r2) * d2) / (1 - r1 * r2)  # x~ of Alg. 2 without cancellation


def pd_loss(x0_hat, target, sigma, weight="truncated"):
    """Eq. (2): w(sigma) times the mean square over pixels, averaged over the batch. x0_hat, target (B, C, H, W); sigma (B,)."""
    return (WEIGHTS[weight](sigma) * (x0_hat - target).square().flatten(1).mean(1)).mean()


class Predicts(Denoiser):
    """The same network asked for x0, v = alpha noise - alpha sigma x0, or the noise eps (section 4), given as EDM's D(x, sigma)."""

    def __init__(self, net, sigma_data, prediction):
        super().__init__(net, sigma_data)
        self.prediction = prediction

    def coefficients(self, sigma):
        c_in = super().coefficients(sigma)[2]
        if self.prediction == "x":
            return torch.zeros_like(sigma), torch.ones_like(sigma), c_in
        if self.prediction == "v":
            return 1 / (1 + sigma**2), -sigma / (1 + sigma**2).sqrt(), c_in  # x^ = alpha z - alpha sigma v
        return torch.ones_like(sigma), -sigma, c_in  # x^ = (z - alpha sigma eps) / alpha


# ------------------------------------------------------------------------------------------------------------------- the stages

def make_student(teacher, prediction="edm"):
    """A trainable copy of the teacher. In eval mode: no dropout in distillation, for student and teacher alike."""
    student = copy.deepcopy(teacher)
    if prediction != "edm":
        student = Predicts(student.net, student.sigma_data, prediction).to(next(student.parameters()).device)
        if prediction != "x":  # v and eps have the sign of the noise, EDM's network that of the data: turn the last layer round
            last = student.net.out_conv if student.net.family.out_head else list(student.net.dec.values())[-1]
            for parameter in last.parameters():
                parameter.data.neg_()
    return student.eval().requires_grad_(True)


def plan(first, last, updates):
    """[(steps of the student, first update, last + 1)] for students of `first`, first / 2, ..., `last` steps."""
    stages, end = [], 0
    for n in (first >> k for k in range((first // last).bit_length())):
        begin, end = end, end + updates * (2 if n <= 2 else 1)
        stages.append((n, begin, end))
    return stages


def save_student(path, student, teacher, dataset, prediction="edm"):
    """student-N.pt: as EDM denoiser any script's --teacher takes it; in another form only `read_student` does."""
    if prediction == "edm":
        save_teacher(path, student, teacher.arch, teacher.kwargs, dataset)
    else:
        save_checkpoint(path, f"{prediction}-predicting student", {"weights": student.state_dict()})


def read_student(path, teacher, prediction="edm"):
    """The student of a stage on the teacher's device, frozen. Raises UsageError if the file is none, or another teacher's."""
    student, state = make_student(teacher, prediction), load_checkpoint(path)
    right = "teacher" if prediction == "edm" else f"{prediction}-predicting student"
    if state["fewstep"] != right:
        raise UsageError(f"{path}: holds a {state['fewstep']}, not a {right}")
    try:
        student.load_state_dict(state["weights"])
    except RuntimeError:
        raise UsageError(f"{path}: a student of another teacher (its weights have other names or shapes)") from None
    return student.requires_grad_(False)


def stages_of(config):
    """The stages of a run; before the first halving one without, where the network must first take another form."""
    stages = plan(config.from_steps // 2, config.to_steps, config.updates)
    first = 0 if config.prediction == "edm" else TRANSLATE * config.updates
    return [(config.from_steps, 0, first)] * (first > 0) + [(n, begin + first, end + first) for n, begin, end in stages]


def train(config, run=None, teacher=None):
    """Distil stage after stage; every stage leaves student-N.pt in the run's folder. Returns the last student."""
    run = run or Run("progressive", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    check_classes(config, teacher, data)
    per_rank, mine = run.rows(config.batch_size)
    student = make_student(teacher, config.prediction)
    halving = copy.deepcopy(student).requires_grad_(False)  # the teacher of the stage
    ema = copy.deepcopy(halving) if config.ema else None
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr, fused=True)
    stream = Stream(data, per_rank, config.seed, config.flip, run.rank, run.world)

    prepare(config, student.net, halving.net, teacher.net)

    def loss_of(n, x, sigma, sigma_mid, sigma_end, labels):
        with autocast(run.device):
            with torch.no_grad():
                if n == config.from_steps:  # only translate the teacher into the network's new form
                    target = with_labels(teacher, labels)(x, sigma)
                else:
                    target = two_step_target(with_labels(halving, labels), x, sigma, sigma_mid, sigma_end)
            return pd_loss(with_labels(student, labels)(x, sigma), target, sigma, config.weight)

    stages = stages_of(config)
    levels = {n: stage_levels(n, config.sigma_max).to(run.device, torch.float32) for n, _, _ in stages}
    parts = {"student": student, "teacher": halving, "optimizer": optimizer, "stream": stream, **({"ema": ema} if ema else {})}
    first = run.restore(parts)
    for step in run.steps(first, stages[-1][2] if stages else 0, parts, "distilling"):
        n, begin, end = next(stage for stage in stages if step < stage[2])
        if step == begin:
            halving.load_state_dict(student.state_dict())
            if ema:
                ema.load_state_dict(student.state_dict())
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - (step - begin) / (end - begin)) * (TRANSLATE if n == config.from_steps else 1)
        x0, labels = stream.next()  # (B, C, H, W)
        noise = torch.randn(config.batch_size, *x0.shape[1:], device=run.device)[mine]
        steps = torch.randint(len(levels[n]), (config.batch_size,), device=run.device)[mine]  # i ~ Cat[1 ... N]
        sigma, sigma_mid, sigma_end = levels[n][steps].unbind(1)  # (B,) each
        x = x0 + expand(sigma, x0) * noise
        batch = x, sigma, sigma_mid, sigma_end, labels if teacher.net.label_dim else None
        optimizer.zero_grad()
        run.loss = accumulate(partial(loss_of, n), batch, config.batch_per_gpu)
        average_gradients(student.parameters())
        torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
        optimizer.step()
        if ema:
            ema_update(ema, student, config.ema)
        if step == end - 1:
            if ema:
                student.load_state_dict(ema.state_dict())
            if run.rank == 0:
                save_student(run.out / f"student-{n}.pt", student, teacher, config.dataset, config.prediction)
    return student


def ddim_levels(n, sigma_max):
    """The levels an n-step student walks down: from sigma_max to 0."""
    return torch.cat([stage_levels(n, sigma_max)[:, 0], torch.zeros(1, dtype=torch.float64)])


def evaluate(config, run, teacher, judge, students):
    """Rows and pictures, all from the same noise (seeds 0 ... eval_n - 1): `students` {row name: {n: Denoiser}} against plain DDIM.

    ddim: the teacher on the students' cosine grid; ddim-edm: on the EDM grid. rmse_to_teacher: to 35 evaluations of Heun.
    """
    samplers = {}

    def row(name, solver, denoiser, sigmas):
        nfe = 35 if name == "teacher" else len(sigmas) - 1
        samplers[name, nfe] = lambda noise, labels: solver(with_labels(denoiser, labels), sigmas[0].item() * noise, sigmas)

    row("teacher", heun, teacher, torch.cat([sigma_grid("edm", 17, sigma_max=config.sigma_max), torch.zeros(1, dtype=torch.float64)]))
    for n in config.nfe:
        row("ddim", euler, teacher, ddim_levels(n, config.sigma_max))
        row("ddim-edm", euler, teacher, sigma_grid("edm", n, sigma_max=config.sigma_max))
        for name, of in students.items():
            if n in of:
                row(name, euler, of[n], ddim_levels(n, config.sigma_max))
    rows, pictures = measure(samplers, config, teacher.net.img_shape, run.device, judge, teacher.net.label_dim, truth=True)
    curves = {}
    for measured in rows[1:]:
        xs, ys = curves.setdefault(measured["name"], ([], []))
        xs.append(measured["nfe"])
        ys.append(measured["fid"])
    curves["teacher"] = (config.nfe, [rows[0]["fid"]] * len(config.nfe))
    if run.rank == 0:
        save_rows(run.out / "samples.png", {label: images for label, images in pictures.items() if not label.startswith("ddim-edm")})
        save_curves(run.out / "fid.png", curves, "network evaluations", f"FID [{rows[0]['fid_features']}, n={config.eval_n}]",
                    f"{config.dataset}, from {config.from_steps} steps", log="xy")
    return [*rows[1:], rows[0]]


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("progressive", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    judge = make_judge(config, run.device, unseen=True)
    train(config, run, teacher)
    counts = [n for n, _, _ in stages_of(config) if n in config.nfe]
    students = {n: read_student(run.out / f"student-{n}.pt", teacher, config.prediction) for n in counts}
    results = evaluate(config, run, teacher, judge, {"pd": students})
    run.metrics(results, teacher=config.teacher or f"{config.dataset} (shipped or cached)")
    run.say(table(results, ["name", "nfe", "rmse_to_teacher", *SCORES]))
    run.say(f"{run.seconds():.0f} s; results in {run.out}: metrics.json, samples.png, fid.png, "
            + ", ".join(f"student-{n}.pt" for n, _, _ in stages_of(config)))


if __name__ == "__main__":
    cli(main)
