"""What one should see: the loss curves of the runs whose log.jsonl is kept, and what they mean.

    python notebooks/losses.py      # notebooks/results/*/log.jsonl -> losses.png beside each

A run writes its loss about once a second, of the batch of that moment. Here these are averaged
over ten neighbours; every phase of the training, a stage of PD or CFD say, has its own curve.
"""
import json
import sys
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common.machinery.plots import save_curves  # noqa: E402

MEANING = {  # method -> quantity in its log -> what it is, and what it should do
    "ld3": {
        "loss": "Distance between the student's images and the teacher's, of one batch of latents. "
        "It falls fast, then follows which latents are in the batch.",
        "validation": "The same distance on the validation latents, which decides which time grid "
        "is kept: the lowest point counts.",
    },
    "dode": {
        "loss": "RMSE between the last states of the few-step solver and of the fine one, once for "
        "each solver and count that is fitted: they follow each other, nothing falls.",
    },
    "progressive": {
        "loss": "Weighted squared error of the student against x~. Each stage starts from the "
        "student before; its loss falls with the learning rate and ends higher than that of the "
        "stage before, because a step is twice as long.",
    },
    "cfd": {
        "loss": "In stages by PD as there; then a divergence of features in nats, another unit. "
        "With tau < 1 it is above 0 even where both images agree: the teacher's is sharpened.",
    },
    "cud": {
        "loss": "Flow-matching error plus catch-up error of the velocities, summed over heads. The "
        "first never falls to 0, because one noisy image belongs to many pairs of data and noise; with "
        "--adaptive-weight, as on digits, its weight falls to 0, and with it the loss.",
    },
    "gdd": {
        "generator": "Softplus of minus the logits of generated images, summed over the "
        "discriminator's heads: ln 2 for each head that is undecided.",
        "discriminator": "Its loss on real and on generated images: 2 ln 2 for each head that is "
        "undecided; below, it is ahead. Neither curve measures quality; FID does.",
        "R1": "The gradient penalty, which keeps the discriminator smooth.",
    },
}


def curves_of(folder):
    """{"phase" or "phase: quantity": (steps, values)} of the log in `folder`."""
    found = {}
    for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines():
        entry = json.loads(line)
        for name in entry:
            if name in ("seconds", "step", "what"):
                continue
            label = ": ".join(w for w in (entry.get("what"), name) if w and w != "loss")
            steps, values = found.setdefault(label or name, ([], []))
            steps.append(entry["step"])
            values.append(entry[name])
    return found


def smooth(steps, values, over=10):
    """Means of `over` neighbours; fewer where a curve is short."""
    over = min(over, max(1, len(values) // 5))
    window = np.ones(over) / over
    return [np.convolve(numbers, window, "valid").tolist() for numbers in (steps, values)]


def save_losses(folder, method):
    """losses.png in `folder`, from its log.jsonl; the sentences that go with it."""
    curves = {label: smooth(*curve) for label, curve in curves_of(folder).items()}
    lowest = min(min(values) for _, values in curves.values())
    log = "y" if lowest > 0 else "symlog"
    save_curves(folder / "losses.png", curves, "update", "loss", folder.name, log)
    return [f"{name}: {text}" for name, text in MEANING[method].items()]


def main():
    for path in sorted((ROOT / "notebooks" / "results").glob("*/log.jsonl")):
        method = path.parent.name.split("-")[1]  # of DATASET-METHOD-WHAT
        print(f"{path.parent.name}/losses.png", *save_losses(path.parent, method), sep="\n  ")


if __name__ == "__main__":
    main()
