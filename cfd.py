"""CFD: progressive distillation with another loss; only `cfd_loss` is new.
Accelerating Diffusion Sampling with Classifier-based Feature Distillation
(Sun et al., ICME 2023, arXiv:2211.12039).

Idea: progressive distillation (PD: Salimans & Ho, arXiv:2202.00512, progressive.py) asks
a student to match, pixel by pixel, a teacher with twice as many steps, for which it has too
few. What matters is what is seen in the image: CFD compares the features that a classifier
has of both images, as distributions over features.

Loss (RCFD/diffusion.py:198-258):
    L = KL( softmax(f(x~) / tau) || softmax(f(D_student)) )
        + beta (gamma L_ent + (1 - gamma) L_div)
x~ is the x0 for which *one* DDIM step ends where two steps of the teacher do (PD, Alg. 2);
D_student is the student's estimate of x0 at the same noisy image, drawn as in PD. f are
the last features of a frozen classifier, p its class probabilities. A tau < 1 sharpens the
features of the teacher only (official). L_ent is the mean entropy of p: every image should
be of one class. L_div is the negative entropy of the mean of p over the batch: all classes
should occur. There is no pixel term and no weight w(sigma).

Differences from the paper's code (github.com/zju-SWJ/RCFD, commit 14b9a3a):
 1. The classifier sees images normalized as in its training (theirs: always [-1, 1]).
 2. Entropy by log_softmax (theirs: p log p, NaN where a probability underflows).
 3. The teacher is any EDM denoiser, noise levels as in progressive.py, 80 to 0 (theirs
    predicts x0; a discrete cosine, 20,798 to 0.0063).
 4. f: a small classifier of the data set, or one of ImageNet that sees resized images
    (theirs: ResNet18 or DenseNet201, trained on CIFAR-10 and chosen by test accuracy; or
    ImageNet's, resized with aligned corners). Their tau, 0.95 and 0.9, were tuned for the
    two of CIFAR-10; none is published for ImageNet's features, 0.9 here is not tuned.
 5. L_div is of the whole batch (theirs: of one GPU's part, 32 of 128 images).
 6. Only the finished image is clipped to [-1, 1] (theirs: every prediction in sampling).
 7. digits: 16 -> 8 by PD, 8 -> 1 by CFD, 300 updates, learning rate 5e-4, no flips
    (theirs, CIFAR-10: 1024 -> 8 -> 1, 10,000, 5e-5, flips). For ImageNet-64 they have an
    option but no settings: batch and learning rate are PD's.
As in theirs, the learning rate falls along a cosine, also in the stages by PD. With --pd
the 8-step student and the rows "pd" come from a run of progressive.py, whose learning rate
falls linearly, as in PD's code.
Result on digits, FID [digits-classifier, n=1024] with 4, 2, 1 steps: 0.52, 0.64, 0.93;
PD 0.52, 0.69, 1.18; the teacher by the best of our solvers and hand-made grids 0.32, 4.6,
105. More: RESULTS.md
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

from common.baselines import check_stages, halving_stages, stage_samplers
from common.classifier import ImageNetFeatures, load_classifier
from common.datasets import Stream, load_dataset
from common.diffusion import expand, stage_levels, with_labels
from common.fid import make_evaluator, measure
from common.machinery.options import (
    DistillationOptions, cli, complete, option, parse_config, require,
)
from common.machinery.plots import save_fid_curves, save_rows
from common.machinery.ranks import gather_with_gradient
from common.machinery.run import Run
from common.solvers import euler
from common.teacher import check_classes, load_student, load_teacher, save_teacher

# --- the method: what only this file has


def cfd_loss(classifier, x0_hat, target, tau, beta, gamma):
    """The loss above, averaged over the batch. The gradient reaches x0_hat alone.

    x0_hat, target (B, C, H, W) in [-1, 1]; classifier(x) -> features (B, F), logits (B, K).
    """
    with torch.no_grad():  # tau divides the teacher's features only (official)
        sharpened = (classifier(target)[0] / tau).log_softmax(1)  # (B, F)
    features, logits = classifier(x0_hat)
    kl = F.kl_div(features.log_softmax(1), sharpened, log_target=True, reduction="batchmean")
    log_p = logits.log_softmax(1)  # (B, K)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    log_p = gather_with_gradient(log_p)  # (B of all GPUs, K)
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # (K,), log of the mean of p
    diversity = (log_mean.exp() * log_mean).sum()
    return kl + beta * (gamma * entropy + (1 - gamma) * diversity)


# --- the method: what progressive.py has too (there pd_loss has a choice of weights)


def two_step_target(teacher, x, sigma, sigma_mid, sigma_end):
    """PD's x~ (B, C, H, W): one DDIM step with it ends where two steps of the teacher do.

    x (B, C, H, W) has noise level sigma; sigma >= sigma_mid > sigma_end >= 0, each (B,).
    A DDIM step (PD, Eq. 7) is an Euler step in sigma, x' = r x + (1 - r) D with r = sigma'/sigma.
    With D1 and D2 the teacher's estimates at sigma and sigma_mid, r1 = sigma_mid / sigma and
    r2 = sigma_end / sigma_mid:
        two steps of the teacher:  x'' = r1 r2 x + r2 (1 - r1) D1 + (1 - r2) D2
        one step with x~ as D:     x'' = r1 r2 x + (1 - r1 r2) x~
    """
    r1 = expand(sigma_mid, x) / expand(sigma, x)
    r2 = expand(sigma_end, x) / expand(sigma_mid, x)
    d1 = teacher(x, sigma)
    d2 = teacher(r1 * x + (1 - r1) * d1, sigma_mid)
    return (r2 * (1 - r1) * d1 + (1 - r2) * d2) / (1 - r1 * r2)  # PD, Alg. 2, solved for x~


def pd_loss(x0_hat, target, sigma):
    """PD's Eq. 2: w(sigma) times the mean square over pixels, averaged over the batch.

    x0_hat, target (B, C, H, W); sigma (B,).
    """
    weight = (1 / sigma**2).clamp(min=1)  # PD, section 4: truncated signal-to-noise ratio
    return (weight * (x0_hat - target).square().flatten(1).mean(1)).mean()


def sample(denoiser, noise, sigmas):
    """DDIM along the time grid `sigmas` (N + 1,): N evaluations of the denoiser.

    noise (B, C, H, W) has unit variance. -> images (B, C, H, W)
    """
    return euler(denoiser, sigmas[0].item() * noise, sigmas)


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
    from_steps: int | None = option(
        None, "steps of the teacher's sampler (official: 1024)", low=1
    )
    cfd_from: int | None = option(
        None, "steps of the last student trained with PD's loss (official: 8)", low=1
    )
    to_steps: int = option(1, "steps of the last student (paper: 1)", low=1)
    classifier: str = option(
        "own", "whose features: the data set's own classifier's, or one's that knows ImageNet",
        choices=CLASSIFIERS,
    )
    tau: float | None = option(
        None, "temperature of the teacher's features, of these alone (official, for CIFAR-10's "
        "classifiers: DenseNet201 0.9, ResNet18 0.95)",
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
        None, "Adam's learning rate, falls along a cosine to 0 in every stage (official: 5e-5)",
        above=0,
    )
    clip: float = option(1.0, "largest norm of the gradient (official: 1)", above=0)
    flip: bool | None = option(None, "random horizontal flips of the training images")
    nfe: tuple[int, ...] | None = option(
        None, "steps to measure (default: all stages up to 8)"
    )

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        counts = check_stages(self)
        message = f"no such stage; choose from {', '.join(map(str, counts))}"
        require(self.cfd_from in counts, "cfd_from", self.cfd_from, message)


# Official: config/*.txt and README of RCFD; ImageNet-64: batch and learning rate are PD's.
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
    "cifar10": {**_DIGITS, "updates": 200, "batch_size": 64, "flip": True, "eval_batch": 64},
    "cifar10-gpu": _CIFAR10,
    "imagenet64": {**_CIFAR10, "batch_size": 2048, "lr": 1e-4},
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
    """The stages [(steps, updates)] of a run, from the teacher or from the student of --pd."""
    first = config.cfd_from if config.pd else config.from_steps
    return halving_stages(first // 2, config.to_steps, config.updates)


def train(config, run=None, teacher=None, classifier=None):
    """Distil stage after stage: student-N.safetensors in --out. Returns the last student."""
    run = run or Run("cfd", config)
    # The diversity term is no mean over images: it needs a GPU's whole share in one pass.
    share = config.batch_size // run.world
    message = f"must be at least {share}: with --beta the loss needs the whole batch at once"
    enough = not config.beta or (config.batch_per_gpu or share) >= share
    require(enough, "batch_per_gpu", config.batch_per_gpu, message)
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
    run.prepare(student.net, stage_teacher.net)

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
            if step == 0:  # the student becomes the teacher of this stage
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


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("cfd", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    students = {}  # {(row's name, steps): denoiser}, first those of progressive.py
    for n in config.nfe:
        if config.pd and n <= config.cfd_from:
            path = f"{config.pd}/student-{n}.safetensors"
            students["pd", n] = load_student(path, copy.deepcopy(teacher))
    classifier = make_classifier(config, run.device)  # fails before the training, if at all
    evaluator = make_evaluator(config, run.device, unseen=True)
    train(config, run, teacher, classifier)
    for n, _ in stages_of(config):
        if n in config.nfe:
            name = "pd" if n >= config.cfd_from else "cfd"  # by the loss of its stage
            path = run.out / f"student-{n}.safetensors"
            students[name, n] = load_student(path, copy.deepcopy(teacher))
    samplers = stage_samplers(config, teacher, students, sample)
    rows, pictures = measure(run, samplers, teacher.net, evaluator, reference="teacher")
    # In the picture DDIM is shown on the students' own time grid alone.
    shown = [label for label in pictures if not label.startswith("ddim-edm")]
    save_rows(run.out / "samples.png", {label: pictures[label] for label in shown})
    title = f"{config.dataset}, from {config.from_steps} steps"
    save_fid_curves(run.out / "fid.png", rows, title)
    run.finish(rows)


if __name__ == "__main__":
    cli(main)
