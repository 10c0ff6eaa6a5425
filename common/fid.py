"""Images -> features -> moments -> Frechet distance (Heusel et al. 2017, arXiv:1706.08500).

`measure` samples and measures. The feature space is Inception's where its weights can be had and
the images are in colour, else that of the data set's own classifier: such numbers compare methods
on one data set with one classifier, never with a paper. Each number carries its feature space.
"""
import argparse
import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from common import UsageError
from common.classifier import SHIPPED, ImageNetFeatures, load_classifier
from common.datasets import (
    ASSETS, SHAPES, class_shares, evenly, fingerprint, has_test_images, is_edms,
    load_dataset, shape_of, to_float, to_uint8,
)
from common.diffusion import noise_from_seeds
from common.machinery.files import (
    BAR, atomic_write, cache_dir, locked, read_npz, weights_digest,
)
from common.machinery.foreign import refusing
from common.machinery.inception import EDM_REFERENCES, edm_reference, load_inception
from common.machinery.options import cli, require, takes_gpu
from common.machinery.ranks import gather_rows, rank_and_world, share_of, sum_over_ranks
from common.machinery.run import pick_device
from common.precision import tf32

# -------------------------------------------------------------------------------- the distance


def frechet_distance(mu1, cov1, mu2, cov2):
    """|mu1 - mu2|^2 + tr(cov1 + cov2 - 2 sqrt(cov1 cov2)); mu (D,), cov (D, D); float64.

    tr sqrt(cov1 cov2) is the sum of the roots of the eigenvalues of L^T cov2 L, L L^T = cov1: a
    symmetric matrix, so no complex parts, and singular covariances do no harm. L is Cholesky's;
    where rounding leaves a singular cov1 without one, from its eigenvectors. Raises ValueError
    when the shapes do not fit or a value is not finite.
    """
    moments = [torch.as_tensor(a).detach().to("cpu", torch.float64) for a in (mu1, cov1, mu2, cov2)]
    mu1, cov1, mu2, cov2 = moments
    if not (mu1.shape == mu2.shape and cov1.shape == cov2.shape == (*mu1.shape, *mu1.shape)):
        shapes = [tuple(a.shape) for a in moments]
        raise ValueError(f"moments of shapes {shapes} do not fit together")
    if not all(a.isfinite().all() for a in moments):
        raise ValueError("moments with values that are not finite have no distance")
    root, failed = torch.linalg.cholesky_ex(cov1)
    if failed:
        values, vectors = torch.linalg.eigh(cov1)
        root = vectors * values.clamp(min=0).sqrt()
    cross = torch.linalg.eigvalsh(root.T @ cov2 @ root).clamp(min=0).sqrt().sum()
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    return max(0.0, float(distance))  # rounding can give -1e-14


class Moments:
    """Mean and covariance of features that arrive in batches, in float64.

    Batches are merged by Chan's formula, so that nothing cancels.
    """

    def __init__(self, dim, device="cpu"):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        """Take in a batch (B, D)."""
        features = features.detach().double()
        if not features.isfinite().all():
            raise ValueError(f"features of images {self.n} ... have values that are not finite")
        if not len(features):
            return
        mean = features.mean(0)
        centred = features - mean
        scatter = centred.T @ centred
        self._merge(len(features), mean.to(self.mean), scatter.to(self.mean))

    def _merge(self, n, mean, scatter):
        delta = mean - self.mean
        self.scatter += scatter + delta.outer(delta) * (self.n * n / (self.n + n))
        self.mean += delta * (n / (self.n + n))
        self.n += n

    def of_all_ranks(self):
        """Moments of what all ranks have taken in, the same on every rank."""
        total = Moments(len(self.mean), self.mean.device)
        counts = gather_rows(torch.tensor([self.n], device=self.mean.device)).tolist()
        means, scatters = gather_rows(self.mean[None]), gather_rows(self.scatter[None])
        for n, mean, scatter in zip(counts, means, scatters):
            if n:
                total._merge(n, mean, scatter)
        return total

    def mean_cov(self):
        """mu (D,), cov (D, D) with n - 1 in the denominator, as np.cov; float64."""
        if self.n < 2:
            raise ValueError(f"a covariance of {self.n} images")
        return self.mean, self.scatter / (self.n - 1)


@lru_cache(2)  # those of the real images are asked for again with every row
def radii(x, k, batch_size):
    """(N,): the distance of each of the points x (N, D) to the k-th nearest of the others."""
    x = x.double()  # the nearest is the point itself
    return torch.cat([torch.cdist(p, x).kthvalue(k + 1).values for p in x.split(batch_size)])


def precision_recall(real, fake, k=3, batch_size=1000):
    """Kynkaanniemi et al. 2019, arXiv:1904.06991, of features real (M, D) and fake (N, D).

    Precision: the share of fake points inside a ball around a real point whose radius is the
    distance to that point's k-th nearest real neighbour; recall: with the roles swapped.
    Precision falls when images are wrong, recall when kinds of images are missing.
    """

    def share(points, x):
        radius, x = radii(x, k, batch_size), x.double()
        inside = [(torch.cdist(p, x) <= radius).any(1) for p in points.double().split(batch_size)]
        return torch.cat(inside).double().mean().item()

    return share(fake, real), share(real, fake)


def kernel_distance(real, fake, blocks=10):
    """KID (Binkowski et al. 2018, arXiv:1801.01401) of features (M, D), (N, D): value, its error.

    The unbiased estimate of E k(a, a') + E k(b, b') - 2 E k(a, b) with a, a' real and b, b'
    generated, k(a, b) = (a.b / D + 1)^3: around 0 (also below) where the two are the same, for
    any number of images, while a Frechet distance shrinks as their number grows. Its standard
    error is the jackknife's, which leaves out a tenth of both at a time; None for less than three.
    """
    real, fake = real.double().to(fake.device), fake.double()
    blocks = min(blocks, len(real), len(fake))

    def pairs(x, y):
        """[i, j]: sum of k over an image of block i of x and another one of block j of y."""
        sums = torch.zeros(blocks, blocks, dtype=torch.float64)
        for i, a in enumerate(x.tensor_split(blocks)):
            for j, b in enumerate(y.tensor_split(blocks)):
                k = (a @ b.T / a.shape[1] + 1) ** 3
                sums[i, j] = k.sum() - (k.trace() if x is y and i == j else 0)
        return sums

    all_blocks = torch.ones(1, blocks, dtype=torch.float64)
    keep = torch.cat([all_blocks, all_blocks - torch.eye(blocks)])  # all of them, all but one, ...
    m, n = (keep @ torch.tensor([len(b) for b in x.tensor_split(blocks)]).double()
            for x in (real, fake))
    within_real, within_fake, between = (
        ((keep @ pairs(x, y)) * keep).sum(1) for x, y in ((real, real), (fake, fake), (real, fake))
    )
    value, *others = (
        within_real / (m * (m - 1)) + within_fake / (n * (n - 1)) - 2 * between / (m * n)
    )
    error = torch.stack(others).std(correction=0) * (blocks - 1) ** 0.5
    return value.item(), error.item() if error.isfinite() else None


def paired_difference(errors, others):
    """RMSE of one row minus that of another and its standard error, from their errors (n,).

    Those are mean squared errors of the same n images (`errors.npz`), so that what makes an image
    difficult for both does not count. Without `others`, zeros: one RMSE and its standard error.
    """
    parts = [torch.as_tensor(e, dtype=torch.float64) for e in (errors, others)]
    roots = [part.mean().sqrt() for part in parts]
    # the delta method: sqrt(mean) changes by 1 / (2 sqrt(mean)) of what the mean changes by
    first, second = (part / (2 * root) if root else part for part, root in zip(parts, roots))
    error = (first - second).std() / len(first) ** 0.5
    return (roots[0] - roots[1]).item(), error.item()


# ------------------------------------------------------------------------------------ features


@dataclass
class FeatureExtractor:
    """uint8 images (B, C, H, W), wherever they are -> features (B, dim) float32 on `device`."""

    name: str  # printed with every number
    digest: str  # of the weights: reference moments are kept per digest
    dim: int
    device: torch.device
    features: Callable
    logits: Callable | None = None  # features -> logits of the Inception Score
    most: int = 10**9  # real images that its moments are taken from, where it is slow

    @torch.no_grad()
    def __call__(self, images):
        return self.features(images.to(self.device)).float()


def feature_extractor(dataset_name, device, inception=None, data_dir=None, steps=None):
    """Inception for colour images if its weights can be had, else the data set's classifier.

    inception: path of the weights; without it the cache is tried, and on a GPU, for cifar10 and
    imagenet64, they are downloaded. steps: shortens the training of a classifier (a smoke test).
    """
    if shape_of(dataset_name, data_dir)[0] == 3:
        fetch = dataset_name in ("cifar10", "imagenet64") and takes_gpu(device)
        net = load_inception(inception, fetch=fetch)
        if net is not None:
            net = net.to(device)
            digest = weights_digest(net)
            return FeatureExtractor("inception", digest, 2048, device, net, net.logits)
    elif inception is not None:
        raise UsageError(
            f"--inception {inception}: Inception sees colour images only, "
            f"and {dataset_name} is grey; leave it out"
        )
    return classifier_features(dataset_name, device, data_dir, steps)


def classifier_features(dataset_name, device, data_dir=None, steps=None, seed=0):
    """Features of the data set's own classifier, trained from `seed`.

    The name of one that was trained on this machine ends in a part of its digest.
    """
    net = load_classifier(dataset_name, device, seed, data_dir, steps)
    digest = weights_digest(net)
    name = f"{dataset_name}-classifier"
    if seed:
        name += f"-seed{seed}"
    if (dataset_name, seed) not in SHIPPED:
        name += f"-{digest[:6]}"

    def features(images):
        return net(to_float(images))[0]

    return FeatureExtractor(name, digest, net.head.in_features, device, features)


def imagenet_features(device):
    """Features of EfficientNet-Lite0, trained on ImageNet by others: for `fd`, which is no FID."""
    net = ImageNetFeatures("lite0", "fd", "leave it out", resize="bicubic").to(device)

    def features(images):
        return torch.cat([net(to_float(part))[0] for part in images.split(50)])

    digest = weights_digest(net)
    return FeatureExtractor("efficientnet-lite0", digest, 1280, device, features, most=10_000)


def features_of(images, extractor, batch_size=250):
    """uint8 images (N, C, H, W) -> features (N, D) on the extractor's device.

    Behind a progress bar where it takes seconds: 50,000 images take two minutes of a core.
    """
    hidden = rank_and_world()[0] > 0
    bar = tqdm(images.split(batch_size), "features", delay=2, leave=False, disable=hidden, **BAR)
    return torch.cat([extractor(batch) for batch in bar])


# ----------------------------------------------------------------------------------- references

KID_REAL, KID_FAKE = 2000, 10_000  # at most so many images on either side of a kernel distance
# All test images of a data set, in the features of shipped classifiers. Of digits they are of
# other writers; 297 of the training images have a FID of 0.7, for being few.
HELD_OUT = {
    "digits-classifier": {"fid": 1.414, "kid": 0.0243, "n": 297},
    "mnist-classifier": {"fid": 0.0286, "kid": 0.00128, "n": 10_000},
    "cifar10-classifier": {"fid": 0.0448, "kid": -0.00017, "n": 10_000},
    "cifar10-classifier-seed1": {"fid": 0.0462, "kid": -0.00013, "n": 10_000},
}


def real_row(config, evaluator):
    """FID, KID and number of real, held-out images; None where there are none at hand."""
    name, data_dir, space = config.dataset, config.data_dir, evaluator.extractor
    if evaluator.against == "train" and space.name in HELD_OUT:
        return HELD_OUT[space.name]
    if not has_test_images(name, data_dir):
        return None
    mu, cov, n, features = reference_moments(name, space, data_dir, "test")
    row = {"fid": frechet_distance(mu, cov, *evaluator.reference[:2]), "n": n}
    if evaluator.reference[3:]:
        row["kid"] = kernel_distance(evaluator.reference[3], features)[0]
    return row


def reference_fids(config, evaluator, noise):
    """{"fid": {"noise", "real", "real_n"}, ...}: what a FID or KID is to be compared with.

    noise: the row of images of pure noise.
    """
    found = {}
    for space, *names in evaluator.spaces():
        real = real_row(config, space) or {}
        for metric, name in zip(("fid", "kid"), names):
            if name in noise:
                found[name] = {"noise": noise[name]}
                if metric in real:
                    found[name] |= {"real": real[metric], "real_n": real["n"]}
    return found


def reference_moments(dataset_name, extractor, data_dir=None, split="train"):
    """mu (D,), cov (D, D), n of the real images of a split: shipped, or computed once.

    And the features (M, D) of at most KID_REAL of them, evenly from all.
    """
    images = f"{dataset_name}{fingerprint(dataset_name, data_dir, exact=True)}-{split}"
    name = f"moments-{images}-{extractor.name}-{extractor.digest}.npz"
    if (ASSETS / name).exists():
        return _read_moments(ASSETS / name)
    path = cache_dir() / name
    with locked(path):
        try:
            return _read_moments(path)
        except FileNotFoundError:
            pass
        except Exception:  # np.load raises anything on a file that is cut short or foreign
            print(f"{path}: damaged or of an older version, made again")
        moments = Moments(extractor.dim, extractor.device)
        images = evenly(load_dataset(dataset_name, split, data_dir).images, extractor.most)
        if len(images) < 2:
            raise UsageError(f"--dataset {dataset_name}: one {split} image: a FID needs two")
        for batch in tqdm(images.split(250), f"moments of {dataset_name}", leave=False, **BAR):
            moments.add(extractor(batch))
        mu, cov = (a.cpu().numpy() for a in moments.mean_cov())
        some = features_of(evenly(images, KID_REAL), extractor).half().cpu().numpy()
        arrays = {"mu": mu, "sigma": cov, "n": moments.n, "features": some}
        atomic_write(path, lambda file: np.savez(file, **arrays))
        return _read_moments(path)


def _read_moments(path):
    with np.load(path) as file:
        return file["mu"], file["sigma"], int(file["n"]), torch.from_numpy(file["features"])


def load_moments(path, extractor):
    """mu (D,), cov (D, D) of an .npz with `mu` and `sigma`, as EDM's fid-refs.

    Raises UsageError if it is none, not finite, or of another number of features than
    `extractor`'s.
    """
    with refusing(f"--reference {path}: not an .npz with `mu` and `sigma`"):
        arrays = read_npz(path, ("mu", "sigma"), most=2**28)
        mu, cov = (np.array(a, np.float64) for a in arrays)
    if (mu.shape, cov.shape) != ((extractor.dim,), (extractor.dim, extractor.dim)):
        raise UsageError(
            f"--reference {path}: moments of {mu.size} features, "
            f"{extractor.name} has {extractor.dim}"
        )
    size = np.abs(cov).max()
    fits = np.isfinite([size, *mu]).all() and np.allclose(cov, cov.T, 1e-3, 1e-6 * size)
    if not fits or np.linalg.eigvalsh(cov).min() < -1e-3 * size:
        raise UsageError(f"--reference {path}: `mu` or `sigma` is no mean or covariance matrix")
    return mu, cov


@dataclass
class Evaluator:
    """A feature space and the moments of the real images in it."""

    extractor: FeatureExtractor
    reference: tuple  # mu, cov; of the data set's own images also n and some features, for KID
    against: str = "train"  # of what: "train" images, "edm", or the path of an .npz
    unseen: "Evaluator | None" = None  # a second space, for methods whose loss sees features
    imagenet: "Evaluator | None" = None  # and ImageNet's, with --fd
    real: torch.Tensor | None = None  # features of real images (M, D), for precision and recall

    def spaces(self):
        """[(Evaluator, what its columns `fid` and `kid` are called in metrics.json)]"""
        own, unseen = (self, "fid", "kid"), (self.unseen, "fid_unseen", "kid_unseen")
        return [row for row in (own, unseen, (self.imagenet, "fd", "kid_fd")) if row[0]]


def make_evaluator(config, device, unseen=False):
    """The Evaluator of a script's Options, made before long work: missing files are found here.

    unseen: where the features are a classifier's, measure also with one of another seed, whose
    features no loss has seen. Precision and recall are against at most 50,000 training images.
    """
    name, data_dir = config.dataset, config.data_dir
    steps = config.classifier_steps
    extractor = feature_extractor(name, device, config.inception, data_dir, steps)
    if rank_and_world()[1] > 1:
        digests = gather_rows(torch.tensor([int(extractor.digest, 16)]))
        if len(digests.unique()) > 1:
            raise UsageError(
                "the ranks measure with different networks: "
                "let FEWSTEP_CACHE be a folder that all of them see"
            )
    against = path = config.reference
    published = extractor.name == "inception" and name in EDM_REFERENCES
    if path is None and published and is_edms(name, data_dir):
        against, path = "edm", edm_reference(name)
    if path in (None, "train"):
        evaluator = Evaluator(extractor, reference_moments(name, extractor, data_dir))
    else:
        evaluator = Evaluator(extractor, load_moments(path, extractor), against)
    if unseen and extractor.name != "inception":
        other = classifier_features(name, device, data_dir, steps, seed=1)
        evaluator.unseen = Evaluator(other, reference_moments(name, other, data_dir))
    if config.fd:
        for option_name, value in vars(config).items():
            message = f"the loss sees these features by --{option_name.replace('_', '-')} {value}"
            sees = value in ("lite0", "imagenet", "imagenet-lite0")  # of GDD and of CFD
            require(not sees, "fd", "", message)
        other = imagenet_features(device)
        evaluator.imagenet = Evaluator(other, reference_moments(name, other, data_dir))
    if config.recall:
        last = evaluator.unseen or evaluator
        images = evenly(load_dataset(name, "train", data_dir).images, 50_000)
        if len(images) < 4:
            raise UsageError(f"--dataset {name}: {len(images)} images: recall needs at least four")
        last.real = features_of(images, last.extractor)
    return evaluator


class Metrics:
    """What is known of the generated images so far: moments, and features for KID and recall."""

    def __init__(self, evaluator, n):
        self.evaluator, self.n = evaluator, n
        space = evaluator.extractor
        self.moments = Moments(space.dim, space.device)
        self.others = [(Metrics(space, n), *names) for space, *names in evaluator.spaces()[1:]]
        nothing = torch.zeros(0, space.dim, device=space.device)
        self.features = [nothing]
        if space.logits:  # for each tenth of the images: sums of p (K,) and of p log p, the count
            size = space.logits(nothing).shape[1] + 2
            self.tenths = torch.zeros(10, size, dtype=torch.float64, device=space.device)

    def add(self, x0, first):
        """Take in x0 (B, C, H, W) in [-1, 1], the images first, first + 1, ... of the n.

        What is measured is the uint8 images that they become.
        """
        space, images = self.evaluator.extractor, to_uint8(x0)
        features = space(images)
        self.moments.add(features)
        for other, *_ in self.others:
            other.add(x0, first)
        if self.evaluator.real is not None or self.evaluator.reference[3:] and first < KID_FAKE:
            self.features.append(features)
        if space.logits:
            log_p = space.logits(features).double().log_softmax(1)  # (B, K)
            p_log_p = (log_p.exp() * log_p).sum(1, keepdim=True)
            sums = torch.cat([log_p.exp(), p_log_p, torch.ones_like(p_log_p)], 1)
            tenth = torch.arange(first, first + len(x0), device=space.device) * 10 // self.n
            self.tenths.index_add_(0, tenth, sums)

    def row(self):
        """Columns of metrics.json, of all ranks together.

        `fid` with its feature space, n and reference, `kid` in the same features with its
        standard error; in a second space `fid_unseen`, `kid_unseen`, in ImageNet's `fd`,
        `kid_fd`; with Inception also the Inception Score (Salimans et al. 2016,
        arXiv:1606.03498). Precision and recall are those of the unseen space, if there is one.
        """
        evaluator, moments = self.evaluator, self.moments.of_all_ranks()
        fake = gather_rows(torch.cat(self.features))
        row = {
            "fid": frechet_distance(*moments.mean_cov(), *evaluator.reference[:2]),
            "fid_features": evaluator.extractor.name,
            "fid_reference": evaluator.against,
            "fid_n": moments.n,
        }
        if evaluator.reference[3:]:
            real = evaluator.reference[3]
            row["kid"], row["kid_se"] = kernel_distance(real, fake[:KID_FAKE])
        for other, fid, kid in self.others:
            for name, value in other.row().items():
                if name not in ("fid_reference", "fid_n"):
                    row[name.replace("fid", fid).replace("kid", kid)] = value
        if evaluator.extractor.logits:
            scores = self._inception_scores()
            row["inception_score"] = scores.mean().item()
            row["inception_score_sd"] = scores.std(correction=0).item()
        if evaluator.real is not None:
            row["precision"], row["recall"] = precision_recall(evaluator.real, fake)
            row["precision_recall_features"] = evaluator.extractor.name
        return row

    def _inception_scores(self):
        """exp E KL(p(y | x) || p(y)) of each tenth of the images, (10,)."""
        tenths = sum_over_ranks(self.tenths.clone())
        tenths = tenths[tenths[:, -1] > 0]
        p, p_log_p = tenths[:, :-2] / tenths[:, -1:], tenths[:, -2] / tenths[:, -1]
        return (p_log_p - torch.special.xlogy(p, p).sum(1)).exp()


# ---------------------------------------------------------------------------- sample and measure


def labels_for(seeds, label_dim, device, shares=None):
    """Class k % K (B,) for the image of seed k, K = label_dim; None without classes.

    shares (K,): how often a class occurs in the data. Where they differ, image k has the class
    at place k g (mod 1) of their cumulative sum, g the golden ratio: so they are kept.
    """
    if not label_dim:
        return None
    k = torch.as_tensor(seeds, device=device)
    if shares is None or len(shares) != label_dim or shares.min() == shares.max():
        return k % label_dim
    place = k.double() * (5**0.5 - 1) / 2 % 1
    classes = torch.searchsorted(shares.to(device).cumsum(0), place, right=True)
    return classes.clamp(max=label_dim - 1)  # rounding may leave the last sum below 1


def save_pngs(folder, images, first):
    """Write uint8 images (n, C, H, W) as folder/000007.png, ..., numbered from `first` on."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(images.cpu().numpy(), first):
        pixels = Image.fromarray(image.transpose(1, 2, 0).squeeze(-1 if len(image) == 1 else ()))
        pixels.save(folder / f"{i:06d}.png")


@torch.no_grad()
def measure(run, samplers, net, evaluator=None, reference=None):
    """Sample run.config.eval_n images from the noise of seeds 0, 1, 2, ...; measure them.

    samplers: {(name, nfe): sampler(noise, labels) -> x0}; noise is unit Gaussian (B, C, H, W),
    float64; labels are `labels_for` the seeds, in the shares of a `folder`'s classes. net: gives
    img_shape and label_dim. Returns the rows of metrics.json in the order of `samplers`, and
    pictures {"name, NFE n": 16 images, uint8}.

    A row has the columns of `Metrics.row` and, if `reference` names one of the samplers,
    `rmse_to_teacher`: the root mean square difference from its images, over images and pixels in
    [-1, 1], and `rmse_se`, its standard error. Each image's mean square stays in errors.npz, for
    `paired_difference`. Under torchrun every rank samples its share. Without an evaluator: only
    pictures. In a classifier's features `run.references` gets FID and KID of real images and of
    pure noise. The first --save-images of a row become images/NAME/000000.png, ... Raises
    UsageError if a sampler's values are not finite.
    """
    config, device, shape = run.config, run.device, net.img_shape
    n = config.eval_n if evaluator else min(16, config.eval_n)
    share = share_of(n)
    labelled = {f"{k[0]}, NFE {k[1]}": (*k, sampler) for k, sampler in samplers.items()}
    first_ones = [label for label, (name, _, _) in labelled.items() if name == reference]
    order = [*first_ones, *(label for label in labelled if label not in first_ones)]
    metrics = {label: Metrics(evaluator, n) for label in order} if evaluator else {}
    pure_noise = None
    if evaluator and evaluator.extractor.name != "inception":
        second = evaluator.unseen and dataclasses.replace(evaluator.unseen, real=None)
        pure_noise = Metrics(dataclasses.replace(evaluator, unseen=second, real=None), n)
    shares = class_shares(config.dataset, config.data_dir)
    pictures = {label: [torch.zeros(0, *shape, dtype=torch.uint8)] for label in labelled}
    errors, target = torch.zeros(len(order), n, dtype=torch.float64, device=device), None
    total = (share.stop - share.start) * len(order)
    with tqdm(total=total, desc="sampling", disable=run.rank > 0, leave=False, **BAR) as bar:
        for first in range(share.start, share.stop, config.eval_batch):
            seeds = range(first, min(first + config.eval_batch, share.stop))
            noise = noise_from_seeds(seeds, shape, device)
            labels = labels_for(seeds, net.label_dim, device, shares)
            if pure_noise:
                pure_noise.add(noise, first)
            for i, label in enumerate(order):
                bar.set_postfix_str(label, refresh=False)
                with tf32():
                    x0 = labelled[label][2](noise, labels).float()
                if not x0.isfinite().all():
                    raise UsageError(
                        f"{label}: the sampler gave values that are not finite, "
                        f"images {first} to {seeds[-1]}"
                    )
                if reference:
                    target = x0 if i == 0 else target
                    squares = (x0 - target).double().square()
                    errors[i, first : seeds.stop] = squares.flatten(1).mean(1)
                if evaluator:
                    metrics[label].add(x0, first)
                if config.save_images and first < config.save_images:
                    folder = run.out / "images" / re.sub(r"[^\w.]+", "-", label)
                    save_pngs(folder, to_uint8(x0)[: config.save_images - first], first)
                if first < share.start + 16:
                    pictures[label].append(to_uint8(x0[:16]).cpu())
                bar.update(len(seeds))
    errors = dict(zip(order, sum_over_ranks(errors).cpu().numpy()))
    if reference and run.rank == 0:
        atomic_write(run.out / "errors.npz", lambda file: np.savez_compressed(file, **errors))
    if pure_noise:
        run.references = reference_fids(config, evaluator, pure_noise.row())
    rows = []
    for label, (name, nfe, _) in labelled.items():
        rows.append({"name": name, "nfe": nfe, **(metrics[label].row() if evaluator else {})})
        if reference:
            rmse, error = paired_difference(errors[label], 0 * errors[label])
            rows[-1] |= {"rmse_to_teacher": rmse, "rmse_se": error}
    return rows, {label: torch.cat(parts)[:16] for label, parts in pictures.items()}


def moments_of(what, extractor):
    """(mu, cov, n, features) of a data set, NAME or NAME:test, a folder or a zip of images.

    Of an .npz with moments mu and cov alone. Raises UsageError.
    """
    name, _, split = what.partition(":")
    if name in SHAPES and name != "imagenet64":
        return reference_moments(name, extractor, None, split or "train")
    if what.endswith(".npz"):
        return load_moments(what, extractor)
    try:
        return reference_moments("folder", extractor, what)
    except ValueError as error:  # a classifier of images of another shape
        raise UsageError(f"{what}: {error}") from None


def main():
    parser = argparse.ArgumentParser(description="The Frechet distance, and KID, of two sets.")
    parser.add_argument("sets", nargs=2, help="two of: digits, mnist:test, a folder, zip or .npz")
    parser.add_argument("--features", help="digits, mnist or cifar10: of FIDs on it; lite0: of "
                        "ImageNet (default: of the data set among the two, else lite0)")
    parser.add_argument("--inception", help="FID weights of Inception, for cifar10")
    given = parser.parse_args()
    device, _ = pick_device()
    known = [name for what in given.sets if (name := what.partition(":")[0]) in SHAPES]
    space = given.features or [*known, "lite0"][0]
    require(space in SHAPES or space == "lite0", "features", space, "choose a data set, or lite0")
    lite0 = space == "lite0"
    extractor = imagenet_features(device) if lite0 else feature_extractor(
        space, device, given.inception)
    first, second = (moments_of(what, extractor) for what in given.sets)
    n = " and ".join(str(m[2]) if m[2:] else "?" for m in (first, second))
    distance = frechet_distance(*first[:2], *second[:2])
    print(f"{'fd' if lite0 else 'fid'} [{extractor.name}, n={n}]: {distance:.5g}")
    if first[3:] and second[3:]:
        value, error = kernel_distance(first[3], second[3])
        print(f"kid [{extractor.name}, at most {KID_REAL} of each]: {value:.4g} +- {error:.2g}")


if __name__ == "__main__":
    cli(main)
