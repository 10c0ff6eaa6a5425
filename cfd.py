"""CFD: Accelerating Diffusion Sampling with Classifier-based Feature Distillation
(Sun et al., ICME 2023, arXiv:2211.12039).

Idea: progressive distillation (PD, progressive.py) asks a few-step student to match its
teacher pixel by pixel, which it cannot. What matters is what is seen in the image: CFD
compares a classifier's last features of both images, as distributions over features.

Loss:  L = KL( softmax(f(x~) / tau) || softmax(f(D_student)) )
           + beta (gamma L_ent + (1 - gamma) L_div)
x~: the x0 with which one DDIM step lands where two steps of the teacher do, as in PD.
f, p: a frozen classifier's features and class probabilities. L_ent: mean of H(p), every
image should be of one class; L_div = -H(mean of p): all classes should occur. tau < 1
sharpens the teacher's features. No pixel term, no weight w(sigma) (RCFD/diffusion.py).

Differences from paper and official code (github.com/zju-SWJ/RCFD, commit 14b9a3a):
 1. The classifier sees images normalized as in its training (theirs: [-1, 1]).
 2. Entropy by log_softmax (theirs: p log p, NaN where a probability underflows).
 3. PD's noise levels, down to 0 (theirs: discrete cosine, leaves residual noise).
 4. f: a small classifier or torchvision's of ImageNet (theirs: also ResNet18, DenseNet201).
 5. digits: 16 -> 8 by PD, 8 -> 1 by CFD, 300 updates, lr 5e-4 (theirs, CIFAR-10:
    1024 -> 8 -> 1, 10,000, 5e-5).
Result on digits, FID [digits-classifier, n=1024] at 4, 2, 1 steps: 0.52, 0.64, 0.93; PD 0.52,
0.69, 1.18. More: RESULTS.md
    python cfd.py                                  # digits: 4 min on 2 CPU cores
    python cfd.py --pd runs/progressive-digits     # start from PD's 8-step student
    python cfd.py --beta 0.003 --gamma 0.75        # with entropy and diversity
    python cfd.py --dataset cifar10 --classifier imagenet-densenet201      # one GPU
"""
import copy
import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F

from common.classifier import ImageNetFeatures, load_classifier
from common.datasets import Stream, load_dataset
from common.diffusion import expand, sigma_grid, with_labels
from common.fid import make_evaluator, measure
from common.machinery.options import (
    DistillationOptions, cli, complete, option, parse_config, require,
)
from common.machinery.plots import save_fid_curves, save_rows
from common.machinery.run import Run
from common.solvers import euler, heun
from common.teacher import check_classes, load_student, load_teacher, save_teacher

# --- the method


def cfd_loss(classifier, x0_hat, target, tau, beta, gamma):
    """The loss above, averaged over the batch. The gradient reaches x0_hat alone.

    x0_hat, target (B, C, H, W) in [-1, 1]; classifier(x) -> features (B, F), logits (B, K).
    """
    with torch.no_grad():
        sharpened = (classifier(target)[0] / tau).log_softmax(1)  # (B, F)
    features, logits = classifier(x0_hat)
    kl = F.kl_div(features.log_softmax(1), sharpened, log_target=True, reduction="batchmean")
    log_p = logits.log_softmax(1)  # (B, K)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # (K,)
    diversity = (log_mean.exp() * log_mean).sum()  # of one rank's images (--batch-per-gpu)
    return kl + beta * (gamma * entropy + (1 - gamma) * diversity)


def stage_levels(n, sigma_max):
    """The steps of an n-step student: (m, 3) rows of noise levels sigma > sigma' > sigma''.

    sigma = tan(pi t / 2) at t = i/n, (i - 1/2)/n, (i - 1)/n, cut off at sigma_max.
    Steps of length 0 are left out: m <= n.
    """
    t = torch.linspace(1, 0, 2 * n + 1, dtype=torch.float64)
    sigmas = torch.tan(torch.pi / 2 * t).clamp(max=sigma_max)
    sigmas[0] = sigma_max  # tan(pi / 2) in floating point
    rows = torch.stack([sigmas[:-2:2], sigmas[1::2], sigmas[2::2]], 1)
    return rows[rows[:, 0] > rows[:, 2]]


def ddim_levels(n, sigma_max):
    """The time grid of an n-step student, (m + 1,): from sigma_max to 0."""
    sigmas = stage_levels(n, sigma_max)[:, 0]
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def two_step_target(teacher, x, sigma, sigma_mid, sigma_end):
    """x~ (B, C, H, W): with this x0 one DDIM step lands where two steps of the teacher do.

    x (B, C, H, W) at level sigma; sigma >= sigma_mid > sigma_end >= 0, each (B,).
    DDIM (Eq. 7) is Euler in sigma. With r1 = sigma'/sigma, r2 = sigma''/sigma'
        two steps: x'' = r1 r2 x + r2 (1 - r1) D1 + (1 - r2) D2
        one step:  x'' = r1 r2 x + (1 - r1 r2) x~
    """
    r1 = expand(sigma_mid, x) / expand(sigma, x)
    r2 = expand(sigma_end, x) / expand(sigma_mid, x)
    d1 = teacher(x, sigma)
    d2 = teacher(r1 * x + (1 - r1) * d1, sigma_mid)
    return (r2 * (1 - r1) * d1 + (1 - r2) * d2) / (1 - r1 * r2)  # Alg. 2, solved for x~


def pd_loss(x0_hat, target, sigma):
    """PD's Eq. (2) with w = max(1, 1 / sigma^2), averaged. x0_hat, target (B, C, H, W)."""
    weight = (1 / sigma**2).clamp(min=1)  # (B,)
    return (weight * (x0_hat - target).square().flatten(1).mean(1)).mean()


def plan(first, last, updates):
    """Stages [(steps of the student, updates)] for first, first / 2, ..., last steps."""
    counts = [last << k for k in range(32) if last << k <= first]
    return [(n, updates * (2 if n <= 2 else 1)) for n in reversed(counts)]


# --- options

CLASSIFIERS = (
    "own", "imagenet-lite0", "imagenet-resnet18", "imagenet-resnet50", "imagenet-densenet121",
    "imagenet-densenet201",
)


@dataclass
class Config(DistillationOptions):
    pd: str | None = option(
        None, "folder of a progressive.py run: start from its student; measure its later ones"
    )
    from_steps: int | None = option(None, "steps of the teacher's sampler (official: 1024)", low=1)
    cfd_from: int | None = option(None, "PD down to so many steps, then CFD (official: 8)", low=1)
    to_steps: int = option(1, "steps of the last student (paper: 1)", low=1)
    classifier: str = option(
        "own", "whose features: the data set's own classifier's, or one's that knows ImageNet",
        choices=CLASSIFIERS,
    )
    tau: float | None = option(
        None, "temperature of the teacher's features (official: 0.9 DenseNet201, 0.95 ResNet18)",
        above=0,
    )
    beta: float | None = option(
        None, "weight of entropy and diversity (official: DenseNet201 0, ResNet18 0.003)", low=0
    )
    gamma: float = option(0.75, "share of the entropy (official: 0.75)", low=0, high=1)
    updates: int | None = option(
        None, "updates per stage, twice that for 2 steps and 1 (official: 10,000)", low=1
    )
    batch_size: int | None = option(None, "images per update (official: 128)", low=1)
    lr: float | None = option(
        None, "Adam's rate; falls to 0 in every stage, along a cosine (official: 5e-5)", above=0
    )
    clip: float = option(1.0, "largest norm of the gradient (official: 1)", above=0)
    flip: bool | None = option(None, "random horizontal flips of the training images")
    nfe: tuple[int, ...] | None = option(None, "steps to measure (default: all stages up to 8)")

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        counts = [n for n, _ in plan(self.from_steps, self.to_steps, 1)]
        right = f"must be --to-steps {self.to_steps} times a power of 2"
        require(self.from_steps in counts, "from_steps", self.from_steps, right)
        self.nfe = self.nfe or [c for c in counts if c <= 8] or counts[-1:]
        self.nfe = tuple(sorted(self.nfe, reverse=True))
        stages = f"no such stage; choose from {', '.join(map(str, counts))}"
        require(self.cfd_from in counts, "cfd_from", self.cfd_from, stages)
        for n in self.nfe:
            require(n in counts, "nfe", n, stages)


# Official: config/*.txt and README of RCFD. It has no ImageNet-64: PD's batch and rate.
_CIFAR10 = dict(
    from_steps=1024, cfd_from=8, tau=0.9, beta=0.0, updates=10_000, batch_size=128, lr=5e-5,
    flip=True, eval_n=50_000, eval_batch=256,
)
_DIGITS = {
    **_CIFAR10, "from_steps": 16, "tau": 0.95, "updates": 300, "lr": 5e-4, "flip": False,
    "eval_n": 1024,
}
PRESETS = {
    "digits": _DIGITS,
    "mnist": {**_DIGITS, "updates": 150, "batch_size": 64, "eval_batch": 32},
    "cifar10": _CIFAR10,
    "imagenet64": {**_CIFAR10, "batch_size": 2048, "lr": 1e-4, "flip": False},
    "folder": {
        **_DIGITS, "updates": 100, "batch_size": 32, "flip": True, "eval_n": 500, "eval_batch": 50
    },
    "folder-gpu": {**_CIFAR10, "eval_n": 10_000},
}
SMOKE = dict(from_steps=4, cfd_from=2, updates=2, batch_size=4, eval_n=32, eval_batch=32)


# --- classifiers


def make_classifier(config, device):
    if config.classifier == "own":
        steps = config.classifier_steps
        return load_classifier(config.dataset, device, data_dir=config.data_dir, steps=steps)
    name, option = config.classifier.removeprefix("imagenet-"), f"classifier {config.classifier}"
    return ImageNetFeatures(name, option, "take --classifier own").to(device)


# --- training


def stages_of(config):
    """The stages of a run, which starts from the teacher or the student of --pd."""
    first = config.cfd_from if config.pd else config.from_steps
    return plan(first // 2, config.to_steps, config.updates)


def train(config, run=None, teacher=None, classifier=None):
    """Distil stage after stage: student-N.safetensors in --out. Returns the last student."""
    run = run or Run("cfd", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    classifier = classifier or make_classifier(config, run.device)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    check_classes(config, teacher, data)
    stage_teacher = copy.deepcopy(teacher)
    if config.pd:
        path = f"{config.pd}/student-{config.cfd_from}.safetensors"
        stage_teacher = load_student(path, stage_teacher)
    student = copy.deepcopy(stage_teacher).requires_grad_(True)  # eval mode: no dropout
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr, fused=True)
    stream = Stream(data, config.batch_size, config.seed, config.flip)
    steps = sum(updates for _, updates in stages_of(config))
    run.prepare(student.net, stage_teacher.net, steps=steps)

    def loss_fn(n, x, sigma, sigma_mid, sigma_end, labels):
        with torch.no_grad():
            denoiser = with_labels(stage_teacher, labels)
            target = two_step_target(denoiser, x, sigma, sigma_mid, sigma_end)
        x0_hat = student(x, sigma, labels)
        if n >= config.cfd_from:
            return pd_loss(x0_hat, target, sigma)
        return cfd_loss(classifier, x0_hat, target, config.tau, config.beta, config.gamma)

    run.resume(student=student, teacher=stage_teacher, optimizer=optimizer, stream=stream)
    for n, updates in stages_of(config):
        stage_loss = partial(loss_fn, n)
        levels = stage_levels(n, config.sigma_max).to(run.device, torch.float32)  # (m, 3)
        for step in run.steps(updates, f"{n}-step student"):
            if step == 0:
                stage_teacher.load_state_dict(student.state_dict())
                optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = config.lr * (1 + math.cos(math.pi * step / updates)) / 2
            x0, labels = stream.next()  # (B, C, H, W), (B,)
            noise = run.randn(config.batch_size, *x0.shape[1:])
            i = run.randint(len(levels), config.batch_size)  # (B,)
            sigma, sigma_mid, sigma_end = levels[i].unbind(1)  # (B,) each
            x = x0 + expand(sigma, x0) * noise
            batch = x, sigma, sigma_mid, sigma_end, labels
            # bfloat16 does not resolve the difference of student and teacher at many steps
            run.loss = run.backward(optimizer, stage_loss, *batch, mixed_precision=False)
            torch.nn.utils.clip_grad_norm_(student.parameters(), config.clip)
            optimizer.step()
            if step == updates - 1 and run.rank == 0:
                path = run.out / f"student-{n}.safetensors"
                save_teacher(path, student, teacher.arch, teacher.kwargs, config.dataset)
    return student


# --- evaluation


def make_samplers(config, teacher, students):
    """{(name, NFE): sampler(noise, labels) -> x0}. students: {(name, steps): Denoiser}."""

    def sampler(denoiser, sigmas, solver=euler):
        def sample(noise, labels):
            return solver(with_labels(denoiser, labels), sigmas[0].item() * noise, sigmas)

        return sample

    samplers = {}
    for n in config.nfe:
        sigmas = ddim_levels(n, config.sigma_max)
        nfe = len(sigmas) - 1
        samplers["ddim", nfe] = sampler(teacher, sigmas)
        edm = sigma_grid("edm", n, sigma_max=config.sigma_max)
        samplers["ddim-edm", n] = sampler(teacher, edm)
        for (name, steps), student in students.items():
            if steps == n:
                samplers[name, nfe] = sampler(student, sigmas)
    edm = sigma_grid("edm", 17, sigma_max=config.sigma_max)
    samplers["teacher", 35] = sampler(teacher, torch.cat([edm, edm.new_zeros(1)]), heun)
    return samplers


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("cfd", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    students = {}
    for n in config.nfe:
        if config.pd and n <= config.cfd_from:
            path = f"{config.pd}/student-{n}.safetensors"
            students["pd", n] = load_student(path, copy.deepcopy(teacher))
    classifier = make_classifier(config, run.device)  # first: its weights may be missing
    evaluator = make_evaluator(config, run.device, unseen=True)
    train(config, run, teacher, classifier)
    for n, _ in stages_of(config):
        if n in config.nfe:
            name = "pd" if n >= config.cfd_from else "cfd"
            path = run.out / f"student-{n}.safetensors"
            students[name, n] = load_student(path, copy.deepcopy(teacher))
    samplers = make_samplers(config, teacher, students)
    rows, pictures = measure(run, samplers, teacher.net, evaluator, reference="teacher")
    save_rows(run.out / "samples.png", {k: v for k, v in pictures.items() if "edm" not in k})
    title = f"{config.dataset}, from {config.from_steps} steps"
    save_fid_curves(run.out / "fid.png", rows, title)
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
