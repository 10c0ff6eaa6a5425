"""Progressive Distillation for Fast Sampling of Diffusion Models
(Salimans & Ho, ICLR 2022, arXiv:2202.00512).

Idea: DDIM with 2N steps is a deterministic map from noise to an image. A student, at first a
copy of its teacher, learns to make two of the teacher's steps in one. Then it becomes the
teacher of the next stage and N is halved, until a single step is left.

Loss (Eq. 2, with the target of Algorithm 2), at x = x0 + sigma noise:
    L = E  w(sigma) | x~ - D_student(x, sigma) |^2,   w = max(1, 1 / sigma^2), section 4
x0 is a training image, noise is unit Gaussian, D is a denoiser: D(x, sigma) estimates x0.
The noise level is sigma = tan(pi t / 2) at t = i / N, with i uniform on 1 ... N. The teacher
makes two DDIM steps: to sigma' at t - 1/(2N), then to sigma'' at t - 1/N. x~ is the x0 for
which *one* DDIM step from sigma ends where the teacher's two do. The weight w is the
signal-to-noise ratio 1 / sigma^2, at least 1. The paper's variables are z = alpha x and
sigma_t = alpha sigma, with alpha = 1 / sqrt(1 + sigma^2).

Differences from the paper and its code (google-research/diffusion_distillation):
 1. The teacher is any EDM denoiser, and its student has the same form (theirs: a VP network
    that predicts x or, on ImageNet, x and eps). With --prediction x, v or eps the student's
    network predicts that (Table 1); then a first stage, ours, fits it to the teacher's D.
 2. Noise levels are cut off at sigma_max = 80 (theirs: log-SNR within +-20, so sigma up to
    22,026). Steps that this leaves without length, the first 65 of 8192, are left out.
 3. The stages of 2 steps and of 1 have twice the updates (paper, 5.2; released config: no).
 4. Only the finished image is clipped to [-1, 1] (theirs: every prediction in sampling).
 5. On several GPUs the gradient is clipped after the average (theirs: before, on each).
 6. digits: 16 -> 1 steps, 300 updates a stage, learning rate 5e-4, no flips (theirs for
    CIFAR-10: 8192 -> 1, 50,000, 5e-5, flips).
Result on digits, FID [digits-classifier, n=1024] with 8, 4, 2, 1 steps: 0.40, 0.52, 0.69,
1.18; the teacher by DDIM on the same grid 0.67, 2.3, 19, 105; by the best of our solvers and
hand-made grids 0.18, 0.32, 4.6, 105. So training pays for 2 steps and 1. More: RESULTS.md
    python progressive.py                         # digits, 16 -> 1: 4 min on 2 CPU cores
    python progressive.py --from-steps 4 --teacher RUN/student-4.safetensors --out OTHER
    python progressive.py --prediction eps        # why the paper predicts x or v
    python progressive.py --dataset cifar10       # one GPU
"""
import copy
from dataclasses import dataclass
from functools import partial

import torch

from common.baselines import check_stages, halving_stages, stage_samplers
from common.datasets import Stream, load_dataset
from common.diffusion import Denoiser, expand, stage_levels, with_labels
from common.fid import make_evaluator, measure
from common.machinery.files import save_weights
from common.machinery.options import (
    DistillationOptions, cli, complete, option, parse_config, require,
)
from common.machinery.plots import save_fid_curves, save_rows
from common.machinery.run import Run
from common.solvers import euler
from common.teacher import check_classes, load_student, load_teacher, save_teacher

# --- the method: what cfd.py has too, pd_loss there with one weight


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


def pd_loss(x0_hat, target, sigma, weight="truncated"):
    """PD's Eq. 2: w(sigma) times the mean square over pixels, averaged over the batch.

    x0_hat, target (B, C, H, W); sigma (B,).
    """
    return (WEIGHTS[weight](sigma) * (x0_hat - target).square().flatten(1).mean(1)).mean()


def sample(denoiser, noise, sigmas):
    """DDIM along the time grid `sigmas` (N + 1,): N evaluations of the denoiser.

    noise (B, C, H, W) has unit variance. -> images (B, C, H, W)
    """
    return euler(denoiser, sigmas[0].item() * noise, sigmas)


# --- the method: what only this file has

WEIGHTS = {  # w(sigma) of section 4
    "truncated": lambda sigma: (1 / sigma**2).clamp(min=1),  # the larger error of x and of eps
    "snr": lambda sigma: 1 / sigma**2,  # the error of eps
    "snr+1": lambda sigma: 1 / sigma**2 + 1,  # the error of v
    "constant": torch.ones_like,  # the error of x
}


class VPDenoiser(Denoiser):
    """D(x, sigma) by a network that predicts x0, v or the noise eps (section 4).

    With alpha = 1 / sqrt(1 + sigma^2) and v = alpha eps - alpha sigma x0,
        D = alpha^2 x - alpha sigma v = x - sigma eps.
    """

    def __init__(self, net, sigma_data, prediction):
        super().__init__(net, sigma_data)
        self.prediction = prediction

    def coefficients(self, sigma):
        *_, c_in = super().coefficients(sigma)  # EDM's scale of the network's input
        if self.prediction == "x":
            return torch.zeros_like(sigma), torch.ones_like(sigma), c_in
        if self.prediction == "v":
            return 1 / (1 + sigma**2), -sigma / (1 + sigma**2).sqrt(), c_in
        return torch.ones_like(sigma), -sigma, c_in


# --- options


@dataclass
class Config(DistillationOptions):
    from_steps: int | None = option(
        None, "steps of the teacher's sampler (official: CIFAR-10 8192, ImageNet-64 1024)", low=1
    )
    to_steps: int = option(
        1, "steps of the last student: --from-steps over a power of 2 (paper: 1)", low=1
    )
    prediction: str = option(
        "edm", "what the student's network predicts", choices=("edm", "x", "v", "eps")
    )
    weight: str = option(
        "truncated", "w of the loss (official: truncated SNR)", choices=tuple(WEIGHTS)
    )
    updates: int | None = option(
        None, "updates per stage, twice that for 2 steps and 1 (paper: 50,000)", low=1
    )
    batch_size: int | None = option(
        None, "images per update, over all ranks (official: 128; ImageNet-64: 2048)", low=1
    )
    lr: float | None = option(
        None, "Adam's learning rate, falls linearly to 0 in every stage (official: 5e-5; "
        "ImageNet-64: 1e-4)", above=0,
    )
    clip: float = option(1.0, "largest norm of the gradient (official: 1)", above=0)
    flip: bool | None = option(None, "random horizontal flips of the training images")
    nfe: tuple[int, ...] | None = option(
        None, "steps to measure (default: all stages up to 8)"
    )

    def __post_init__(self):
        complete(self, PRESETS, SMOKE)
        check_stages(self)


# Official: config/cifar_distill.py and imagenet64_distill.py; updates: paper, section 5.2.
_CIFAR10 = dict(
    from_steps=8192, updates=50_000, batch_size=128, lr=5e-5, flip=True,
    eval_n=50_000, eval_batch=256,
)
_DIGITS = {
    **_CIFAR10, "from_steps": 16, "updates": 300, "lr": 5e-4, "flip": False, "eval_n": 1024
}
PRESETS = {
    "digits": _DIGITS,
    "mnist": {**_DIGITS, "updates": 150, "batch_size": 64, "eval_batch": 32},
    "cifar10": {**_DIGITS, "updates": 200, "batch_size": 64, "flip": True, "eval_batch": 64},
    "cifar10-gpu": _CIFAR10,
    "imagenet64": {**_CIFAR10, "from_steps": 1024, "batch_size": 2048, "lr": 1e-4},
    "folder": {
        **_DIGITS, "updates": 100, "batch_size": 32, "flip": True, "eval_n": 500, "eval_batch": 50
    },
    "folder-gpu": {**_CIFAR10, "from_steps": 1024, "eval_n": 10_000},
}
SMOKE = dict(from_steps=4, updates=2, batch_size=4, eval_n=32, eval_batch=32)


# --- training

# With --prediction, the stage before the others has so many times the updates of a stage and
# so many times its learning rate.
FIRST_STAGE = 4


def make_student(teacher, prediction="edm"):
    """A trainable copy of the teacher. In eval mode: distillation is without dropout."""
    student = copy.deepcopy(teacher)
    if prediction != "edm" and teacher.arch == "diffusers":
        student.predict(prediction)
    elif prediction != "edm":
        require(type(teacher) is Denoiser, "prediction", prediction, "this teacher is a flow")
        device = next(student.parameters()).device
        student = VPDenoiser(student.net, student.sigma_data, prediction).to(device)
    if type(student) is VPDenoiser and prediction != "x":
        # The network's factor in D, c_out, is positive in EDM's form, but negative for v and
        # eps. With its last layer negated, the student starts near the teacher at low noise.
        net = student.net
        last = net.out_conv if net.family.out_head else list(net.dec.values())[-1]
        for parameter in last.parameters():
            parameter.data.neg_()
    return student.eval().requires_grad_(True)


def save_student(path, student, teacher, dataset, prediction="edm"):
    """With EDM's prediction the student is a teacher for any script. diffusers: a folder."""
    if prediction == "edm" or teacher.arch == "diffusers":
        save_teacher(path, student, teacher.arch, teacher.kwargs, dataset)
    else:
        kind = f"{prediction}-predicting student"
        save_weights(path, kind, student.state_dict())


def read_student(path, teacher, prediction="edm"):
    """A frozen student on the teacher's device. Raises UsageError if the file holds none."""
    kind = "teacher" if prediction == "edm" else f"{prediction}-predicting student"
    return load_student(path, make_student(teacher, prediction), kind)


def stages_of(config):
    """The stages of a run, [(steps of the student, updates)].

    The first student has half of the teacher's --from-steps steps. A student whose network
    predicts x, v or eps is no copy of its teacher: a stage before the others regresses its D
    onto the teacher's at the noise levels of --from-steps steps (not in the paper).
    """
    stages = halving_stages(config.from_steps // 2, config.to_steps, config.updates)
    if config.prediction != "edm":
        stages.insert(0, (config.from_steps, FIRST_STAGE * config.updates))
    return stages


def train(config, run=None, teacher=None, stream=None):
    """Distil stage after stage: student-N.safetensors in --out. Returns the last student."""
    run = run or Run("progressive", config)
    teacher = teacher or load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    data = load_dataset(config.dataset, "train", config.data_dir, run.device)
    check_classes(config, teacher, data)
    student = make_student(teacher, config.prediction)
    stage_teacher = copy.deepcopy(student).requires_grad_(False)
    optimizer = torch.optim.Adam(student.parameters(), lr=config.lr, fused=True)
    stream = stream or Stream(data, config.batch_size, config.seed, config.flip)
    run.prepare(student.net, stage_teacher.net, teacher.net)

    def loss_fn(n, x, sigma, sigma_mid, sigma_end, labels):
        with torch.no_grad():
            if n == config.from_steps:  # the stage before the others, see stages_of
                target = teacher(x, sigma, labels)
            else:
                denoiser = with_labels(stage_teacher, labels)
                target = two_step_target(denoiser, x, sigma, sigma_mid, sigma_end)
        return pd_loss(student(x, sigma, labels), target, sigma, config.weight)

    run.resume(student=student, teacher=stage_teacher, optimizer=optimizer, stream=stream)
    for n, updates in stages_of(config):
        stage_loss = partial(loss_fn, n)
        levels = stage_levels(n, config.sigma_max).to(run.device, torch.float32)  # (m, 3)
        lr = config.lr * (FIRST_STAGE if n == config.from_steps else 1)
        for step in run.steps(updates, f"{n}-step student"):
            if step == 0:  # the student becomes the teacher of this stage
                stage_teacher.load_state_dict(student.state_dict())
                optimizer.state.clear()
            for group in optimizer.param_groups:
                group["lr"] = lr * (1 - step / updates)
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
                save_student(path, student, teacher, config.dataset, config.prediction)
    return student


# --- evaluation


def main():
    config = parse_config(Config, PRESETS, __doc__)
    run = Run("progressive", config)
    teacher = load_teacher(config.teacher, config.dataset, run.device, config.data_dir)
    evaluator = make_evaluator(config, run.device, unseen=True)
    train(config, run, teacher)
    students = {}
    for n, _ in stages_of(config):
        if n in config.nfe:
            path = run.out / f"student-{n}.safetensors"
            students["pd", n] = read_student(path, teacher, config.prediction)
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
