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
from common.datasets import evenly, fingerprint, is_downsampled, load_dataset, locked, shape_of, to_float, to_uint8
from common.training import (UsageError, atomic_write, cache_dir, download, gather_rows, noise_from_seeds, rank_and_world, share_of,
                             sum_over_ranks)

INCEPTION_FILE = "pt_inception-2015-12-05-6726825d.pth"  # its last 8 hex digits are the head of its SHA-256
INCEPTION_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{INCEPTION_FILE}"
EDM_REFERENCES = {"cifar10": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/cifar10-32x32.npz",
                  "imagenet64": "https://nvlabs-fi-cdn.nvidia.com/edm/fid-refs/imagenet-64x64.npz"}


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
    """Mean and covariance of features that arrive in batches: float64 on `device`, merged by Chan's formula, so that nothing cancels."""

    def __init__(self, dim, device="cpu"):
        self.n, self.mean = 0, torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, features):
        """Take in a batch (B, D)."""
        features = features.detach().double()
        mean = features.mean(0)
        centred = features - mean
        self._merge(len(features), mean.to(self.mean), (centred.T @ centred).to(self.mean))

    def _merge(self, n, mean, scatter):
        delta = mean - self.mean
        self.scatter += scatter + delta.outer(delta) * (self.n * n / (self.n + n))
        self.mean += delta * (n / (self.n + n))
        self.n += n

    def of_all_ranks(self):
        """Moments of what all ranks have taken in, the same on every rank."""
        total = Moments(len(self.mean), self.mean.device)
        counts = gather_rows(torch.tensor([self.n], device=self.mean.device)).tolist()
        for n, mean, scatter in zip(counts, gather_rows(self.mean[None]), gather_rows(self.scatter[None])):
            if n:
                total._merge(n, mean, scatter)
        return total

    def mean_cov(self):
        """mu (D,), cov (D, D) with n - 1 in the denominator, as np.cov; float64."""
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
    logits: Callable | None = None  # features -> what Inception Score takes the softmax of

    @torch.no_grad()
    def __call__(self, images):
        return self.features(images.to(self.device)).float()


class Inception(nn.Module):
    """The Inception-v3 of the TensorFlow FID graph: uint8 images (B, 3, H, W) -> pool3 features (B, 2048).

    Against torchvision's: 1008 classes, no auxiliary head, and other pools in the pool branches: averages that leave the padding out,
    and in the very last block a maximum. `weights` is pytorch-fid's state dict; unlike pytorch-fid, images come in as in the graph.
    """

    def __init__(self, weights):
        super().__init__()
        from torchvision.models import inception_v3
        self.net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
        self.net.load_state_dict(weights)
        self.register_buffer("classes", self.net.fc.weight.detach().clone(), persistent=False)
        self.net.fc = nn.Identity()
        for name in ("5b", "5c", "5d", "6b", "6c", "6d", "6e", "7b"):
            _replace_pool(self.net.get_submodule(f"Mixed_{name}"), lambda x: F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False))
        _replace_pool(self.net.Mixed_7c, lambda x: F.max_pool2d(x, 3, 1, padding=1))
        self.eval().requires_grad_(False)

    def forward(self, images):
        return self.net((old_resize(old_resize(images.float(), 299).mT, 299).mT - 128) / 128)

    def logits(self, features):
        """Those of the Inception Score, (B, 1008): without the bias (Salimans et al. 2016, their code)."""
        return features @ self.classes.T


def old_resize(x, size):
    """(..., H, W) -> (..., H, size), linear, as TensorFlow 1's resize_bilinear: place i looks at i W / size, with no half-pixel shift."""
    width = x.shape[-1]
    place = torch.arange(size, device=x.device, dtype=torch.float64) * width / size
    left = place.long()
    return torch.lerp(x[..., left], x[..., (left + 1).clamp(max=width - 1)], (place - left).to(x))


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
    if shape_of(dataset_name, data_dir)[0] == 3:
        weights = _inception_weights(inception, fetch=dataset_name in ("cifar10", "imagenet64"))
        if weights is not None:
            try:
                net = Inception(weights).to(device)
            except (RuntimeError, TypeError, KeyError, AttributeError):
                raise UsageError(f"--inception {inception}: not the weights of FID's Inception; right is {INCEPTION_URL}") from None
            return FeatureExtractor("inception", _digest(net), 2048, device, net, net.logits)
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

def features_of(images, extractor, batch_size=250):
    """uint8 images (N, C, H, W) -> features (N, D) on the extractor's device."""
    return torch.cat([extractor(batch) for batch in images.split(batch_size)])


def reference_moments(dataset_name, extractor, data_dir=None, split="train"):
    """mu (D,), cov (D, D), n of the real images of a split; computed once, then read from the cache."""
    images = f"{dataset_name}{fingerprint(dataset_name, data_dir, exact=True)}-{split}"
    path = cache_dir() / f"moments-{images}-{extractor.name}-{extractor.digest}.npz"
    with locked(path):
        try:
            with np.load(path) as file:
                return file["mu"], file["sigma"], int(file["n"])
        except FileNotFoundError:
            pass
        except Exception:  # np.load raises anything on a file that is cut short or foreign
            print(f"{path}: damaged, made again")
        moments, batches = Moments(extractor.dim, extractor.device), load_dataset(dataset_name, split, data_dir).images.split(250)
        for batch in tqdm(batches, f"moments of {dataset_name}", dynamic_ncols=True, mininterval=0.5, leave=False):
            moments.add(extractor(batch))
        mu, cov = (a.cpu().numpy() for a in moments.mean_cov())
        atomic_write(path, lambda file: np.savez(file, mu=mu, sigma=cov, n=moments.n))
    return mu, cov, moments.n


def load_moments(path, extractor):
    """mu (D,), cov (D, D) of an .npz with `mu` and `sigma`, as EDM's fid-refs.

    Raises UsageError if it is none, or of another number of features than `extractor`'s.
    """
    try:
        with np.load(path) as file:
            mu, cov = file["mu"], file["sigma"]
    except Exception as error:  # as above
        raise UsageError(f"--reference {path}: not an .npz with `mu` and `sigma` ({type(error).__name__})") from None
    if (mu.shape, cov.shape) != ((extractor.dim,), (extractor.dim, extractor.dim)):
        raise UsageError(f"--reference {path}: moments of {len(mu)} features, {extractor.name} has {extractor.dim}")
    return mu, cov


def edm_reference(dataset_name):
    """The path of EDM's moments of a data set, downloaded once; None, and a line that says so, where they cannot be had."""
    path = cache_dir() / f"edm-{EDM_REFERENCES[dataset_name].rsplit('/', 1)[1]}"
    try:
        with locked(path):
            return download(EDM_REFERENCES[dataset_name], path, "EDM's reference moments")
    except UsageError as error:
        print(f"{error}. Until then the moments are those of the training images.")
        return None


def labels_for(seeds, label_dim, device):
    """Class k % K (B,) for the image of seed k, K = label_dim: uniform classes, as the usual FIDs ask; None without classes."""
    return torch.as_tensor(seeds, device=device) % label_dim if label_dim else None


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
    against: str = "train"  # what the reference is made of: "train" images, "edm", or the path of an .npz
    unseen: "Judge | None" = None  # the same in a second space, for methods whose loss looks at features
    real: torch.Tensor | None = None  # features of the real images (M, D), for precision and recall


class Score:
    """What a Judge has seen of n generated images so far: moments, and features only where precision and recall are asked for."""

    def __init__(self, judge, n):
        self.judge, self.n = judge, n
        space = judge.extractor
        self.moments = Moments(space.dim, space.device)
        self.unseen = Score(judge.unseen, n) if judge.unseen else None
        nothing = torch.zeros(0, space.dim, device=space.device)
        self.features = [nothing]
        if space.logits:  # for each tenth of the images: the sums of p (K,) and of p log p, and their number
            self.tenths = torch.zeros(10, space.logits(nothing).shape[1] + 2, dtype=torch.float64, device=space.device)

    def add(self, x0, first):
        """Take in x0 (B, C, H, W) in [-1, 1], the images first, first + 1, ... of the n; judged as the uint8 images they become."""
        space, images = self.judge.extractor, to_uint8(x0)
        features = space(images)
        self.moments.add(features)
        if self.unseen:
            self.unseen.add(x0, first)
        if self.judge.real is not None:
            self.features.append(features)
        if space.logits:
            log_p = space.logits(features).double().log_softmax(1)  # (B, K)
            sums = torch.cat([log_p.exp(), (log_p.exp() * log_p).sum(1, keepdim=True), torch.ones_like(log_p[:, :1])], 1)
            self.tenths.index_add_(0, torch.arange(first, first + len(x0), device=space.device) * 10 // self.n, sums)

    def row(self):
        """`fid`, `fid_features`, `fid_reference`, `fid_n`; with a second space also `fid_unseen` and `fid_unseen_features`; of all ranks.

        By Inception also `inception_score`, mean and deviation of ten parts of the images (Salimans et al. 2016, arXiv:1606.03498).
        Precision and recall, if asked for, are those of the second space, if there is one.
        """
        judge, moments = self.judge, self.moments.of_all_ranks()
        row = {"fid": frechet_distance(*moments.mean_cov(), *judge.reference[:2]), "fid_features": judge.extractor.name,
               "fid_reference": judge.against, "fid_n": moments.n}
        if self.unseen:
            second = self.unseen.row()
            row.update(fid_unseen=second["fid"], fid_unseen_features=second["fid_features"])
            row.update({name: value for name, value in second.items() if not name.startswith("fid")})
        if judge.extractor.logits:
            tenths = sum_over_ranks(self.tenths.clone())
            tenths = tenths[tenths[:, -1] > 0]
            p, p_log_p = tenths[:, :-2] / tenths[:, -1:], tenths[:, -2] / tenths[:, -1]
            scores = (p_log_p - torch.special.xlogy(p, p).sum(1)).exp()  # exp E KL(p(y | x) || p(y)), (10,)
            row["inception_score"], row["inception_score_sd"] = scores.mean().item(), scores.std(correction=0).item()
        if judge.real is not None:
            row["precision"], row["recall"] = precision_recall(judge.real, gather_rows(torch.cat(self.features)))
            row["precision_recall_features"] = judge.extractor.name
        return row


def make_judge(config, device, unseen=False):
    """The Judge of a script's Options. Make it before any long work: data or weights that cannot be had are found out here.

    `unseen`: where a classifier judges, measure also with one of another seed, whose features no loss has seen (nor Inception's).
    Precision and recall are against at most 50,000 training images, taken evenly from all.
    """
    name, data_dir, steps = config.dataset, config.data_dir, 5 if config.smoke else None
    extractor = feature_extractor(name, device, config.inception, data_dir, steps)
    digests = gather_rows(torch.tensor([int(extractor.digest, 16)])) if rank_and_world()[1] > 1 else ()
    if len(set(map(int, digests))) > 1:
        raise UsageError("the ranks judge with different networks: let FEWSTEP_CACHE be a folder that all of them see")
    against = path = config.reference
    if path is None and extractor.name == "inception" and name in EDM_REFERENCES and not is_downsampled(data_dir):
        against, path = "edm", edm_reference(name)
    if path in (None, "train"):
        judge = Judge(extractor, reference_moments(name, extractor, data_dir))
    else:
        judge = Judge(extractor, load_moments(path, extractor), against)
    if unseen and extractor.name != "inception":
        other = classifier_features(name, device, data_dir, steps, seed=1)
        judge.unseen = Judge(other, reference_moments(name, other, data_dir))
    if config.recall:
        last = judge.unseen or judge
        last.real = features_of(evenly(load_dataset(name, "train", data_dir).images, 50_000), last.extractor)
    return judge


@torch.no_grad()
def measure(samplers, config, shape, device, judge=None, label_dim=0, truth=False):
    """What samplers {(name, nfe): sampler(noise, labels) -> x0} make of the same noise, that of seeds 0 ... config.eval_n - 1.

    noise: unit Gaussian (B, *shape), float64 on `device`; labels: `labels_for` the seeds. Returns rows for metrics.json and {"name nfe":
    the first 16 images, uint8}. A row has the columns of `Score` and, if the first sampler is the `truth`, `rmse_to_teacher`: the root
    mean square difference from its images, over images and pixels in [-1, 1]. Batch by batch: no images are kept. Under torchrun every
    rank samples its share of the seeds, and all return the same rows. Without a judge there are only the pictures.
    Raises UsageError if a sampler's values are not finite.
    """
    n = config.eval_n if judge else min(16, config.eval_n)
    mine = share_of(n)
    samplers = {f"{name} {nfe}": (name, nfe, sampler) for (name, nfe), sampler in samplers.items()}
    scores, pictures = {label: Score(judge, n) for label in samplers} if judge else {}, {label: [] for label in samplers}
    squares, true = torch.zeros(len(samplers), dtype=torch.float64, device=device), None
    with tqdm(total=(mine.stop - mine.start) * len(samplers), desc="sampling", disable=rank_and_world()[0] > 0, dynamic_ncols=True,
              mininterval=0.5, leave=False) as bar:
        for first in range(mine.start, mine.stop, config.eval_batch):
            seeds = range(first, min(first + config.eval_batch, mine.stop))
            noise, labels = noise_from_seeds(seeds, shape, device), labels_for(seeds, label_dim, device)
            for i, (label, (_, _, sampler)) in enumerate(samplers.items()):
                bar.set_postfix_str(label, refresh=False)
                x0 = sampler(noise, labels).float()
                if not x0.isfinite().all():
                    raise UsageError(f"{label}: the sampler gave values that are not finite, images {first} to {seeds[-1]}")
                if truth:
                    true = x0 if i == 0 else true
                    squares[i] += (x0 - true).double().square().sum()
                if judge:
                    scores[label].add(x0, first)
                if first < mine.start + 16:
                    pictures[label].append(to_uint8(x0[:16]).cpu())
                bar.update(len(seeds))
    rmse = (sum_over_ranks(squares) / (n * torch.Size(shape).numel())).sqrt().tolist() if truth else ()
    rows = [{"name": name, "nfe": nfe, **(scores[label].row() if judge else {})} for label, (name, nfe, _) in samplers.items()]
    for row, error in zip(rows, rmse):
        row["rmse_to_teacher"] = error
    nothing = torch.zeros(0, *shape, dtype=torch.uint8)  # on a rank without images
    return rows, {label: torch.cat([nothing, *parts])[:16] for label, parts in pictures.items()}
