"""CFD: Accelerating Diffusion Sampling with Classifier-based Feature Distillation (Sun et al., ICME 2023, arXiv:2211.12039).

Idea: progressive distillation asks a weak, few-step student to match its teacher pixel by pixel, which it cannot. What matters is what
is seen in the image: so compare what a classifier makes of the two images, its last features, read as a distribution over features.
Everything else is progressive distillation: the same noisy images, the same two teacher steps, the same halvings.

Loss:  L = KL( softmax(f(x~) / tau) || softmax(f(D_student)) ) + beta (gamma L_ent + (1 - gamma) L_div)
    f: a frozen classifier's penultimate features, p its class probabilities for the student's image; x~: see progressive.py
    L_ent = mean over the batch of the entropy H(p): every image should be of some class; L_div = -H(mean of p): and all classes occur.
    tau < 1 sharpens the teacher's features only. No pixel term, no weight by noise level (RCFD/diffusion.py).

Differences from the paper and its official code (github.com/zju-SWJ/RCFD, commit 14b9a3a):
 1. The classifier sees images in the normalisation it was trained with (theirs feeds images in [-1, 1] to classifiers trained on
    standardised ones, ImageNet's included).
 2. Entropy through log_softmax (theirs: p log p, NaN where a probability underflows).
 3. The walk ends at sigma = 0, noise levels are progressive.py's (theirs: discrete cosine with a rest of noise at its end).
 4. The classifier is the data set's own, small one (theirs: ResNet18 or DenseNet201 of CIFAR-10), or torchvision's of ImageNet.
 5. digits: 16 -> 8 by PD, 8 -> 1 by CFD, some hundred updates of lr 5e-4 (CIFAR-10: 1024 -> 8 -> 1, 10,000 and 20,000 of 5e-5).
Measured: digits, from the 8-step students of progressive.py, with as many updates; n = 1,024, 3 training seeds
    steps   FID in the features of the loss    FID in those of another seed
            pd               cfd               pd               cfd
        4   0.500 +- 0.026   0.504 +- 0.014    0.560 +- 0.031   0.506 +- 0.025
        2   0.688 +- 0.030   0.628 +- 0.018    0.772 +- 0.044   0.600 +- 0.043
        1   1.184 +- 0.048   0.837 +- 0.080    1.303 +- 0.058   0.820 +- 0.034
    The gain is not one of the judged features alone: it is larger in those that the loss has never seen. In pixels CFD is further from the
    teacher (RMSE at 1 step .237, PD .190). tau matters: each stage multiplies the features, hence contrast, by 1 / tau, against the
    blur of few steps; 0.9 overdoes it, 1 leaves PD's blur. beta 0.003 changes nothing. With a fifth of the updates, FID at 4, 2, 1 steps:
        PD 0.56, 1.04, 2.09; tau 1: 0.77, 1.05, 2.08; tau 0.95: 0.75, 0.82, 1.26; tau 0.9: 1.00, 1.40, 1.77
    python cfd.py                                                # digits, 16 -> 8 by PD, 8 -> 1 by CFD: 4.2 minutes on 2 CPU cores
    python progressive.py && python cfd.py --pd runs/progressive-digits    # start from PD's 8-step student, and compare with PD
    python cfd.py --tau 0.95 --beta 0.003 --gamma 0.75           # with entropy and diversity
    python cfd.py --dataset cifar10 --classifier imagenet-densenet201      # one GPU
"""
import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from common.classifier import ImageNetInput, load_classifier
from common.datasets import Stream, load_dataset
from common.diffusion import expand, with_labels
from common.fid import make_judge
from common.teacher import check_classes, load_teacher
from common.training import (SCORES, Run, TrainingOptions, UsageError, accumulate, autocast, average_gradients, cli, fill_from_presets,
                             option, parse_config, prepare, require, table)
from progressive import check_stages, evaluate, make_student, pd_loss, plan, read_student, save_student, stage_levels, two_step_target

CLASSIFIERS = ("own", "imagenet-resnet18", "imagenet-resnet50", "imagenet-densenet121", "imagenet-densenet201")


@dataclass
class Config(TrainingOptions):
    teacher: str | None = option(None, "teacher checkpoint (default: the data set's own)")
    pd: str | None = option(None, "folder of a progressive.py run: start from its student, and measure its later ones as rows `pd`")
    from_steps: int | None = option(None, "steps of the teacher's sampler (official: 1024)")
    cfd_from: int | None = option(None, "PD down to this many steps, CFD from there (official: 8)")
    to_steps: int = option(1, "steps of the last student (paper: 1)")
    sigma_max: float = option(80.0, "highest noise level (EDM); levels above are cut off")
    classifier: str = option("own", "whose features: the data set's own classifier, or torchvision's of ImageNet", choices=CLASSIFIERS)
    tau: float | None = option(None, "temperature of the teacher's features (official: 0.9 with DenseNet201, 0.95 with ResNet18)")
    beta: float | None = option(None, "weight of entropy and diversity (official: 0 with DenseNet201, 0.003 with ResNet18); diversity is "
                                      "that of the images that one rank has at a time")
    gamma: float = option(0.75, "share of the entropy in it (official, with ResNet18: 0.75)")
    updates: int | None = option(None, "updates of a stage, twice as many for 2 steps and 1 (official: 10,000)")
    batch_size: int | None = option(None, "images per update, over all ranks (official: 128)")
    lr: float | None = option(None, "Adam's rate, falls to 0 along a cosine in every stage (official: 5e-5)")
    clip: float = option(1.0, "largest norm of the gradient (official: 1)")
    flip: bool | None = option(None, "random horizontal flips of the training images")
    nfe: tuple[int, ...] | None = option(None, "step counts to measure (default: 8, 4, 2, 1 as far as they are stages)")

    def __post_init__(self):
        fill_from_presets(self, PRESETS, SMOKE)
        check_stages(self)
        for name in ("updates", "batch_size", "lr", "clip", "tau"):
            require(getattr(self, name) > 0, name, getattr(self, name), "must be above 0")
        require(self.beta >= 0, "beta", self.beta, "must not be negative")
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "must lie between 0 and 1")
        counts = [n for n, _, _ in plan(self.from_steps, self.to_steps, 1)]
        require(self.cfd_from in counts, "cfd_from", self.cfd_from, f"there is no such stage; choose from {', '.join(map(str, counts))}")


# Official: config/*.txt and README of RCFD, as listed in the help of each option.
_CIFAR10 = dict(from_steps=1024, cfd_from=8, tau=0.9, beta=0.0, updates=10_000, batch_size=128, lr=5e-5, flip=True, eval_n=50_000,
                eval_batch=256)
PRESETS = {
    "digits": {**_CIFAR10, "from_steps": 16, "tau": 0.95, "updates": 300, "lr": 5e-4, "flip": False, "eval_n": 1024},
    "mnist": {**_CIFAR10, "from_steps": 64, "tau": 0.95, "updates": 2000, "lr": 2e-4, "flip": False, "eval_n": 10_000},
    "cifar10": _CIFAR10,
    "imagenet64": {**_CIFAR10, "batch_size": 2048, "lr": 1e-4, "flip": False},  # CFD has no such run: PD's batch and rate
    "folder": {**_CIFAR10, "eval_n": 10_000},
}
SMOKE = dict(from_steps=4, cfd_from=2, updates=2, batch_size=4, eval_n=32, eval_batch=32)


# ------------------------------------------------------------------------------------------------------------------- the method

def cfd_loss(classifier, x0_hat, target, tau, beta, gamma):
    """The loss above, averaged over the batch. x0_hat, target (B, C, H, W) in [-1, 1]; classifier(x) -> features (B, F), logits (B, K).

    The gradient goes through the classifier into x0_hat alone.
    """
    with torch.no_grad():
        sharpened = (classifier(target)[0] / tau).log_softmax(1)  # (B, F)
    features, logits = classifier(x0_hat)
    kl = F.kl_div(features.log_softmax(1), sharpened, log_target=True, reduction="batchmean")
    log_p = logits.log_softmax(1)  # (B, K)
    entropy = -(log_p.exp() * log_p).sum(1).mean()
    log_mean = log_p.logsumexp(0) - math.log(len(log_p))  # (K,)
    diversity = (log_mean.exp() * log_mean).sum()
    return kl + beta * (gamma * entropy + (1 - gamma) * diversity)


class ImageNetFeatures(nn.Module):
    """torchvision's classifier as (features, logits) of x (B, 1 or 3, H, W) in [-1, 1]: resized to 224, in ImageNet's normalisation."""

    def __init__(self, name, weights="DEFAULT"):
        super().__init__()
        from torchvision.models import get_model
        try:
            self.net = get_model(name, weights=weights)
        except OSError as error:
            raise UsageError(f"--classifier imagenet-{name}: its weights could not be downloaded ({error}); put torchvision's file into "
                             f"{torch.hub.get_dir()}/checkpoints, or take --classifier own") from None
        head = "fc" if hasattr(self.net, "fc") else "classifier"
        self.head = getattr(self.net, head)
        setattr(self.net, head, nn.Identity())
        self.input = ImageNetInput()
        self.eval().requires_grad_(False)

    def forward(self, x):
        features = self.net(self.input(x))
        return features, self.head(features)


def make_classifier(config, device):
    if config.classifier == "own":
        return load_classifier(config.dataset, device, data_dir=config.data_dir, steps=5 if config.smoke else None)
    return ImageNetFeatures(config.classifier.removeprefix("imagenet-")).to(device)


def stages_of(config):
    """progressive.plan from the teacher's steps, or from those of the student that --pd gives."""
    return plan((config.cfd_from if config.pd else config.from_steps) // 2, config.to_steps, config.updates)


def train(config, run=None, teacher=None):
    """PD down to --cfd-from steps, CFD from there; every stage leaves student-N.pt in the run's folder. Returns the last student."""
    run = run or Run("cfd", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    classifier = make_classifier(config, run.device)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    check_classes(config, teacher, data)
    per_rank, mine = run.rows(config.batch_size)
    student = read_student(Path(config.pd) / f"student-{config.cfd_from}.pt", teacher) if config.pd else make_student(teacher)
    student.requires_grad_(True)
    halving = copy.deepcopy(student).requires_grad_(False)  # the teacher of the stage
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr, fused=True)
    stream = Stream(data, per_rank, config.seed, config.flip, run.rank, run.world)

    prepare(config, student.net, halving.net)

    def loss_of(n, x, sigma, sigma_mid, sigma_end, labels):
        with autocast(run.device):
            with torch.no_grad():
                target = two_step_target(with_labels(halving, labels), x, sigma, sigma_mid, sigma_end)
            x0_hat = with_labels(student, labels)(x, sigma)
            if n >= config.cfd_from:
                return pd_loss(x0_hat, target, sigma)
            return cfd_loss(classifier, x0_hat, target, config.tau, config.beta, config.gamma)

    stages = stages_of(config)
    levels = {n: stage_levels(n, config.sigma_max).to(run.device, torch.float32) for n, _, _ in stages}
    parts = {"student": student, "teacher": halving, "optimizer": optimizer, "stream": stream}
    first = run.restore(parts)
    for step in run.steps(first, stages[-1][2] if stages else 0, parts, "distilling"):
        n, begin, end = next(stage for stage in stages if step < stage[2])
        if step == begin:
            halving.load_state_dict(student.state_dict())
            optimizer.state.clear()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 + math.cos(math.pi * (step - begin) / (end - begin))) / 2
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
        if step == end - 1 and run.rank == 0:
            save_student(run.out / f"student-{n}.pt", student, teacher, config.dataset)
    return student


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("cfd", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    counts = [n for n, _, _ in stages_of(config)]
    pd = {n: read_student(Path(config.pd) / f"student-{n}.pt", teacher) for n in (config.cfd_from, *counts)} if config.pd else {}
    judge = make_judge(config, run.device, unseen=True)
    train(config, run, teacher)
    cfd = {n: read_student(run.out / f"student-{n}.pt", teacher) for n in counts}
    pd.update({n: cfd.pop(n) for n in counts if n >= config.cfd_from})
    results = evaluate(config, run, teacher, judge, {"pd": pd, "cfd": cfd})
    run.metrics(results, teacher=config.teacher or f"{config.dataset} (shipped or cached)")
    run.say(table(results, ["name", "nfe", "rmse_to_teacher", *SCORES]))
    run.say(f"{run.seconds():.0f} s; results in {run.out}: metrics.json, samples.png, fid.png, "
            + ", ".join(f"student-{n}.pt" for n in counts))


if __name__ == "__main__":
    cli(main)
