"""Images -> features -> moments -> Frechet distance (Heusel et al. 2017, arXiv:1706.08500), and the name of the feature space with it.

`inception` is the network of the usual FID, in pytorch-fid's weights; where they are missing, or the images are grey, the data set's
own classifier stands in: such numbers compare methods on one data set and one classifier, never with a paper.
"""
import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common.classifier import load_classifier
from common.datasets import channels_of, fingerprint, load_dataset, locked, to_float, to_uint8
from common.training import UsageError, atomic_write, cache_dir, download, noise_from_seeds

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # its last 8 hex digits are the head of its SHA-256
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"


# ------------------------------------------------------------------------------------------------------------------ the distance

def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)) in float64; mu (D,), cov (D, D), numpy or torch.

    tr sqrt(cov1 cov2) is the sum of the roots of the eigenvalues of cov1^1/2 cov2 cov1^1/2, which is symmetric: no complex parts, and
    singular covariances do no harm. Raises ValueError when the shapes do not fit.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(a).detach().to("cpu", torch.float64) for a in (mu1, cov1, mu2, cov2))
    if not (mu1.shape == mu2.shape and cov1.shape == cov2.shape == (*mu1.shape, *mu1.shape)):
        raise ValueError(f"moments of shapes {[tuple(a.shape) for a in (mu1, cov1, mu2, cov2)]} do not fit together")
    values, vectors = torch.linalg.eigh(cov1)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov2 @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float((mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross))  # rounding can give -1e-14


class Moments:
    """Mean and covariance of features that arrive in batches: float64, merged by Chan's formula, so that nothing cancels."""

    def __init__(self, dim):
        self.n, self.mean, self.scatter = 0, torch.zeros(dim, dtype=torch.float64), torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, features):
        """Take in a batch (B, D)."""
        features = features.detach().double()
        batch, mean = len(features), features.mean(0)
        centred = features - mean
        delta = mean.to(self.mean) - self.mean
        self.scatter += (centred.T @ centred).to(self.mean) + delta.outer(delta) * (self.n * batch / (self.n + batch))
        self.mean += delta * (batch / (self.n + batch))
        self.n += batch

    def mean_cov(self):
        """mu (D,), cov (D, D) with n - 1 in the denominator, as np.cov; float64 on the CPU."""
        if self.n < 2:
            raise ValueError(f"a covariance of {self.n} images")
        return self.mean, self.scatter / (self.n - 1)


# ----------------------------------------------------------------------------------------------------------- feature extractors

@dataclass
class FeatureExtractor:
    """Calling it: uint8 images (B, C, H, W), wherever they are -> features (B, dim) float32 on `device`."""
    name: str    # printed with every number; that of a classifier trained on this machine ends in a part of its digest
    digest: str  # 8 hex digits of the weights: moments are kept per digest
    dim: int
    device: torch.device
    features: Callable

    @torch.no_grad()
    def __call__(self, images):
        return self.features(images.to(self.device)).float()


class Inception(nn.Module):
    """The Inception-v3 of the TensorFlow FID graph: uint8 images (B, 3, H, W) -> pool3 features (B, 2048).

    Against torchvision's: 1008 classes, no auxiliary head, and other pools in the pool branches: averages that leave the padding out,
    and in the very last block a maximum. `weights` is pytorch-fid's state dict.
    """

    def __init__(self, weights):
        super().__init__()
        from torchvision.models import inception_v3
        self.net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        self.net.load_state_dict(weights)
        self.net.fc = nn.Identity()
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            _replace_pool(self.net.get_submodule(f"Mixed_{name}"), lambda x: F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False))
        _replace_pool(self.net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, padding=1))
        self.eval().requires_grad_(False)

    def forward(self, images):
        x = F.interpolate(images.float() / 255, size=(299, 299), mode="bilinear", align_corners=False)
        return self.net(2 * x - 1)


def _replace_pool(block, pool):
    """Let the pool branch of an Inception block, the last channels of its output, see `pool` of the block's input."""
    width = block.branch_pool.conv.out_channels
    block.register_forward_hook(lambda block, inputs, output: torch.cat([output[:, :-width], block.branch_pool(pool(inputs[0]))], 1))


def _inception_weights(path, fetch):
    """The state dict at `path` (given by the user), or of the checked file in the cache, downloaded if `fetch`; None without."""
    cached = cache_dir() / INCEPTION_FILE
    if path is None:
        if not fetch and not cached.exists():
            return None
        try:
            with locked(cached):
                download(INCEPTION_URL, cached, "Inception for FID")
            if hashlib.sha256(cached.read_bytes()).hexdigest()[:8] != "6726825d":
                raise UsageError(f"Inception for FID: {cached} is damaged; delete it, or replace it by {INCEPTION_URL}")
        except UsageError as error:
            print(f"{error}. Until then FID uses the data set's own classifier.")
            return None
    try:
        return torch.load(path or cached, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises anything
        raise UsageError(f"--inception {path or cached}: not readable ({type(error).__name__}); right is {INCEPTION_URL}") from None


def feature_extractor(dataset_name, device, inception=None, data_dir=None, steps=None):
    """The FeatureExtractor of a data set: Inception for colour images if its weights can be had, else the data set's classifier.

    `inception`: path of the weights; without it the cache is looked into, and for cifar10 and imagenet64 they are downloaded.
    `steps` shortens the training of a classifier (a smoke test).
    """
    if channels_of(dataset_name, data_dir) == 3:
        weights = _inception_weights(inception, fetch=dataset_name in ("cifar10", "imagenet64"))
        if weights is not None:
            net = Inception(weights).to(device)
            return FeatureExtractor("inception", _digest(net), 2048, device, net)
    elif inception is not None:
        raise UsageError(f"--inception {inception}: Inception sees colour images only, and {dataset_name} is grey; leave it out")
    return classifier_features(dataset_name, device, data_dir, steps)


def classifier_features(dataset_name, device, data_dir=None, steps=None, seed=0):
    """The FeatureExtractor of the data set's own classifier; `seed` 1, 2, ...: of one trained apart from it."""
    net = load_classifier(dataset_name, device, seed, data_dir, steps)
    digest = _digest(net)
    shipped = (dataset_name, seed) == ("digits", 0)
    name = f"{dataset_name}-classifier" + (f"-seed{seed}" if seed else "") + ("" if shipped else f"-{digest[:6]}")
    return FeatureExtractor(name, digest, net.head.in_features, device, lambda images: net(to_float(images))[0])


def _digest(net):
    return hashlib.sha256(b"".join(w.cpu().numpy().tobytes() for w in net.state_dict().values())).hexdigest()[:8]


# ------------------------------------------------------------------------------------------------------------ references, scores

def moments_of(images, extractor, what="features", batch_size=250):
    """uint8 images (N, C, H, W) -> Moments of their features."""
    moments = Moments(extractor.dim)
    for batch in tqdm(images.split(batch_size), what, dynamic_ncols=True, mininterval=0.5, leave=False):
        moments.add(extractor(batch))
    return moments


def features_of(images, extractor, batch_size=250):
    """uint8 images (N, C, H, W) -> features (N, D) on the extractor's device."""
    return torch.cat([extractor(batch) for batch in images.split(batch_size)])


def reference_moments(dataset_name, extractor, data_dir=None, split="train", device="cpu"):
    """mu (D,), cov (D, D), n of the real images of a split; computed once (with the images on `device`), then read from the cache."""
    path = cache_dir() / f"moments-{dataset_name}{fingerprint(dataset_name, data_dir)}-{split}-{extractor.name}-{extractor.digest}.npz"
    with locked(path):
        try:
            with np.load(path) as file:
                return file["mu"], file["sigma"], int(file["n"])
        except FileNotFoundError:
            pass
        except Exception:  # np.load raises anything on a file that is cut short or foreign
            print(f"{path}: damaged, made again")
        images = load_dataset(dataset_name, split, data_dir, device).images
        moments = moments_of(images, extractor, f"moments of {dataset_name}")
        mu, cov = (a.numpy() for a in moments.mean_cov())
        atomic_write(path, lambda file: np.savez(file, mu=mu, sigma=cov, n=moments.n))
    return mu, cov, moments.n


def load_moments(path, extractor):
    """mu (D,), cov (D, D) of an .npz with `mu` and `sigma`, as EDM's fid-refs (theirs are of NVIDIA's Inception: close, not the same).

    Raises UsageError if it is none, or of another number of features than `extractor`'s.
    """
    try:
        with np.load(path) as file:
            mu, cov = file["mu"], file["sigma"]
    except Exception as error:  # as above
        raise UsageError(f"--reference {path}: not an .npz with `mu` and `sigma` ({type(error).__name__})") from None
    if cov.shape != (extractor.dim, extractor.dim):
        raise UsageError(f"--reference {path}: moments of {len(mu)} features, {extractor.name} has {extractor.dim}")
    return mu, cov


def labels_for(seeds, label_dim, device):
    """Class k % K (B,) for the image of seed k, K = label_dim: uniform classes, as the usual FIDs ask; None without classes."""
    return torch.as_tensor(seeds, device=device) % label_dim if label_dim else None


@torch.no_grad()
def generate(sampler, seeds, shape, device, batch_size=256, label_dim=0, what="sampling"):
    """x0 (len(seeds), *shape), float32 in about [-1, 1], on the CPU: what `sampler(noise, labels)` makes of each seed.

    noise: unit Gaussian (B, *shape), float64 on `device`; labels: `labels_for` the seeds. Image k depends on seeds[k] alone.
    Raises UsageError if the sampler's values are not finite.
    """
    images = torch.empty(len(seeds), *shape)
    with tqdm(total=len(seeds), desc=what, dynamic_ncols=True, mininterval=0.5, leave=False) as bar:
        for start in range(0, len(seeds), batch_size):
            part = seeds[start:start + batch_size]
            x0 = sampler(noise_from_seeds(part, shape, device), labels_for(part, label_dim, device))
            if not x0.isfinite().all():
                raise UsageError(f"{what}: the sampler gave values that are not finite, images {start} to {start + len(part) - 1}")
            images[start:start + batch_size] = x0
            bar.update(len(part))
    return images


def fid_of_images(images, extractor, reference):
    """Frechet distance of uint8 images (N, C, H, W) to a reference (mu, cov, ...) of the same feature extractor."""
    return frechet_distance(*moments_of(images, extractor).mean_cov(), *reference[:2])


def precision_recall(real, fake, k=3, batch_size=1000):
    """Shares of fake features (N, D) among the real ones (M, D), and of real among fake (Kynkaanniemi et al. 2019, arXiv:1904.06991).

    A point is among a set if it lies in the ball around one of its points whose radius is the distance to that point's k-th nearest
    neighbour in the set. Precision falls when images are wrong, recall when kinds of images are missing.
    """
    real, fake = real.double(), fake.double()

    def share(points, x):
        radii = torch.cat([torch.cdist(part, x).kthvalue(k + 1).values for part in x.split(batch_size)])  # the nearest is itself
        return torch.cat([(torch.cdist(part, x) <= radii).any(1) for part in points.split(batch_size)]).double().mean().item()

    return share(fake, real), share(real, fake)


@dataclass
class Judge:
    """Feature extractors and the moments of the real images in their spaces: the FID columns of every row of metrics.json."""
    extractor: FeatureExtractor
    reference: tuple
    unseen: "Judge | None" = None  # the same in a second space, for methods whose loss looks at features
    real: torch.Tensor | None = None  # features of the real images (M, D), for precision and recall

    def row(self, x0):
        """`fid`, `fid_features` and `fid_n` of generated images x0 (n, C, H, W) in [-1, 1], judged as the uint8 images they become.

        With a second space also `fid_unseen` and `fid_unseen_features`. Precision and recall, if asked for, are those of the second.
        """
        row = {"fid": fid_of_images(to_uint8(x0), self.extractor, self.reference), "fid_features": self.extractor.name, "fid_n": len(x0)}
        if self.unseen:
            second = self.unseen.row(x0)
            row.update(fid_unseen=second["fid"], fid_unseen_features=second["fid_features"])
            row.update({name: value for name, value in second.items() if not name.startswith("fid")})
        if self.real is not None:
            row["precision"], row["recall"] = precision_recall(self.real, features_of(to_uint8(x0), self.extractor))
            row["precision_recall_features"] = self.extractor.name
        return row


def make_judge(dataset_name, device, data_dir=None, inception=None, reference=None, smoke=False, unseen=False, recall=False):
    """The Judge of a data set. Make it before any long work: data or weights that cannot be had are found out here.

    `inception`: as in `feature_extractor`; `reference`: an .npz of moments instead of those of the training images; `unseen`: measure
    also with a classifier of the same data trained from another seed, whose features no loss has seen; `recall`: also precision and
    recall, against at most 50,000 training images.
    """
    steps = 5 if smoke else None
    extractor = feature_extractor(dataset_name, device, inception, data_dir, steps)
    second = None
    if unseen:
        other = classifier_features(dataset_name, device, data_dir, steps, seed=1)
        second = Judge(other, reference_moments(dataset_name, other, data_dir))
    reference = load_moments(reference, extractor) if reference else reference_moments(dataset_name, extractor, data_dir)
    judge = Judge(extractor, reference, second)
    if recall:
        images = load_dataset(dataset_name, "train", data_dir).images[:50_000]
        (second or judge).real = features_of(images, (second or judge).extractor)
    return judge
