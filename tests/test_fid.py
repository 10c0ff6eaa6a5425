"""common/fid.py: the distance, the features of the FID network, images that belong to seeds."""

import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy import linalg
from torch import nn

from common import UsageError, fid
from common.classifier import Classifier
from common.datasets import load_dataset, to_float, to_uint8
from common.diffusion import noise_from_seeds
from common.fid import (
    Evaluator, Metrics, Moments, feature_extractor, features_of, frechet_distance, load_moments,
    make_evaluator, precision_recall, reference_moments,
)
from common.machinery import inception
from common.machinery.inception import Inception, old_resize
from common.machinery.options import Options

pytestmark = pytest.mark.usefixtures("cache")


def random_moments(seed, dim=12, n=40):
    x = np.random.default_rng(seed).normal(size=(n, dim))
    x = x @ np.random.default_rng(seed + 1).normal(size=(dim, dim))
    return x.mean(0), np.cov(x, rowvar=False)


def factor(seed, n, dim=12):
    """The rows whose products sum to the covariance of random_moments."""
    x = np.random.default_rng(seed).normal(size=(n, dim))
    x = x @ np.random.default_rng(seed + 1).normal(size=(dim, dim))
    return (x - x.mean(0)) / np.sqrt(n - 1)


# --------------------------------------------------------------------------- the distance


def test_distance_is_that_of_the_formula():
    (mu1, cov1), (mu2, cov2) = random_moments(0), random_moments(5)
    expected = ((mu1 - mu2) ** 2).sum() + np.trace(cov1 + cov2 - 2 * linalg.sqrtm(cov1 @ cov2).real)
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-10)
    # And symmetric, whatever the type.
    tensors = [torch.from_numpy(a) for a in (mu2, cov2, mu1, cov1)]
    assert frechet_distance(*tensors) == pytest.approx(expected, rel=1e-10)


def test_distance_is_that_of_pytorch_fid():
    score = pytest.importorskip("pytorch_fid.fid_score")
    (mu1, cov1), (mu2, cov2) = random_moments(2), random_moments(8)
    try:
        expected = score.calculate_frechet_distance(mu1, cov1, mu2, cov2)
    except TypeError:
        pytest.skip(
            "this pytorch-fid calls scipy's sqrtm with an argument that this scipy no longer has"
        )
    assert frechet_distance(mu1, cov1, mu2, cov2) == pytest.approx(expected, rel=1e-8)


def test_distance_of_commuting_gaussians_is_elementary():
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    a, b = np.array([4.0, 1, 0, 9, 0.25, 0]), np.array([1.0, 1, 4, 0, 2.25, 0])  # both singular
    mu1, mu2 = np.arange(6.0), np.ones(6)
    expected = ((mu1 - mu2) ** 2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    found = frechet_distance(mu1, basis * a @ basis.T, mu2, basis * b @ basis.T)
    assert found == pytest.approx(expected, abs=1e-6)
    nothing = np.zeros((6, 6))
    found = frechet_distance(mu1, nothing, mu2, nothing)
    assert found == pytest.approx(((mu1 - mu2) ** 2).sum())


def test_distance_to_itself_is_zero():
    for n in (40, 5):  # 5 images in 12 dimensions: singular
        mu, cov = random_moments(3, n=n)
        assert 0 <= frechet_distance(mu, cov, mu, cov) < 1e-5
        assert frechet_distance(mu, cov, mu + 1, cov) == pytest.approx(12, abs=1e-5)


@pytest.mark.parametrize("images", [40, 12, 5])
def test_distance_with_singular_covariances(images):
    """Of either, of both, and of none: the nuclear norm of A^T B, cov1 = A A^T, cov2 = B B^T.

    12 images in 12 dimensions: singular, but rounding can leave a Cholesky factor.
    """
    for n in (images, 40):
        (mu1, _), (mu2, _) = moments = random_moments(0, n=images), random_moments(5, n=n)
        x, y = (factor(seed, n) for seed, n in ((0, images), (5, n)))
        np.testing.assert_allclose(x.T @ x, moments[0][1], atol=1e-12)
        cross = np.linalg.svd(x @ y.T, compute_uv=False).sum()
        expected = ((mu1 - mu2) ** 2).sum() + (x**2).sum() + (y**2).sum() - 2 * cross
        for pair in (moments, moments[::-1]):
            assert frechet_distance(*pair[0], *pair[1]) == pytest.approx(expected, rel=1e-6)


def test_moments_that_do_not_fit_are_refused():
    mu, cov = random_moments(0)
    for wrong in ((mu[:-1], cov[:-1, :-1]), (mu, cov[:-1]), (mu[:-1], cov)):
        with pytest.raises(ValueError, match="do not fit"):
            frechet_distance(mu, cov, *wrong)


@pytest.mark.parametrize("sizes", [[50], [1] * 50, [7, 1, 30, 12]])
def test_moments_are_those_of_numpy_however_they_arrive(sizes):
    x = torch.randn(50, 5, generator=torch.Generator().manual_seed(0))
    x = x * torch.tensor([1.0, 2, 3, 4, 5]) + 1000  # far from 0
    moments = Moments(5)
    for part in x.split(sizes):
        moments.add(part)
    mu, cov = moments.mean_cov()
    assert moments.n == 50 and mu.dtype == cov.dtype == torch.float64
    np.testing.assert_allclose(mu, x.double().mean(0), rtol=1e-13)
    expected = np.cov(x.double().numpy(), rowvar=False)
    np.testing.assert_allclose(cov, expected, rtol=1e-10, atol=1e-10)


def test_numbers_that_are_not_finite_are_said_and_an_empty_batch_is_nothing():
    """max(0.0, nan) is 0.0: a perfect score for broken moments."""
    mu, cov = random_moments(0)
    for bad in (np.nan, np.inf):
        for wrong in ((mu * bad, cov), (mu, cov * bad)):
            with pytest.raises(ValueError, match="not finite"):
                frechet_distance(*wrong, *wrong)
    moments = Moments(3)
    with pytest.raises(ValueError, match="images 0 .* not finite"):
        moments.add(torch.tensor([[0.0, np.nan, 0]]))
    for batch in (torch.zeros(0, 3), torch.eye(3), torch.zeros(0, 3)):
        moments.add(batch)
    np.testing.assert_allclose(moments.mean_cov()[1], np.cov(np.eye(3)))


def test_one_image_has_no_covariance():
    moments = Moments(2)
    moments.add(torch.ones(1, 2))
    with pytest.raises(ValueError, match="1 images"):
        moments.mean_cov()


# ------------------------------------------------------------- kernel distance, standard errors


def test_the_kernel_distance_is_the_sum_over_all_pairs():
    """Binkowski et al. 2018, equation 4: U-statistics, pair by pair."""
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(23, 5)), 0.5 + rng.normal(size=(17, 5))
    k = lambda a, b: (a @ b / 5 + 1) ** 3
    within = lambda x: np.mean([k(a, b) for i, a in enumerate(x) for b in np.delete(x, i, 0)])
    mmd = lambda x, y: within(x) + within(y) - 2 * np.mean([k(a, b) for a in x for b in y])
    value, error = fid.kernel_distance(*map(torch.from_numpy, (real, fake)))
    assert value == pytest.approx(mmd(real, fake))
    tenths = [np.array_split(np.arange(len(x)), 10) for x in (real, fake)]
    others = [mmd(np.delete(real, a, 0), np.delete(fake, b, 0)) for a, b in zip(*tenths)]
    assert error == pytest.approx(np.sqrt(9 / 10 * np.square(others - np.mean(others)).sum()))
    assert fid.kernel_distance(torch.ones(2, 3), torch.zeros(2, 3)) == (7, None)


@pytest.mark.parametrize("shift", [0, 0.5])
def test_the_kernel_distance_is_unbiased_and_knows_its_spread(shift):
    """Of 2 Gaussians in one dimension: E (ab + 1)^3 = 1 + 3 a b + 3 a^2 b^2 + a^3 b^3 in means."""
    generator = torch.Generator().manual_seed(0)
    values = []
    for _ in range(300):
        real, fake = torch.randn(2, 40, 1, generator=generator)
        values.append(fid.kernel_distance(real, fake + shift))
    values, errors = torch.tensor(values, dtype=torch.float64).T
    moments = shift, 1 + shift**2, 3 * shift + shift**3  # of the second; of the first 0, 1, 0
    exact = 3 * moments[0] ** 2 + 3 * (moments[1] - 1) ** 2 + moments[2] ** 2
    assert values.mean().item() == pytest.approx(exact, abs=3 * values.std().item() / 300**0.5)
    assert 0.8 < errors.square().mean().sqrt() / values.std() < 1.6


def test_standard_errors_of_an_rmse_and_of_a_difference_are_those_of_repetition():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        hard = rng.exponential(size=200)  # what makes an image difficult for both
        one, two = 1.1 * hard + 0.1 * rng.exponential(size=200), hard
        found.append([*fid.paired_difference(one, 0 * one), *fid.paired_difference(one, two)])
    rmse, rmse_se, gap, gap_se = np.array(found).T
    assert rmse.mean() == pytest.approx(1.2**0.5, rel=0.01)
    assert gap.mean() == pytest.approx(1.2**0.5 - 1, rel=0.02)
    assert rmse_se.mean() == pytest.approx(rmse.std(), rel=0.1)
    assert gap_se.mean() == pytest.approx(gap.std(), rel=0.1)
    assert gap_se.mean() < rmse_se.mean() / 5
    assert fid.paired_difference(np.zeros(3), np.zeros(3)) == (0, 0)


# --------------------------------------------------------------------- feature extractors


@pytest.fixture(scope="module")
def random_inception():
    """Weights for the Inception of the FID under which no layer dies out."""
    from torchvision.models import inception_v3

    net = inception_v3(weights=None, num_classes=1008, aux_logits=False, init_weights=False)
    generator = torch.Generator().manual_seed(0)
    weights = net.state_dict()
    for name, w in weights.items():
        if w.dim() == 4:
            weights[name] = torch.randn(w.shape, generator=generator) * (2 / w[0].numel()) ** 0.5
        elif name.endswith("bn.bias"):
            weights[name] = 0.3 * torch.randn(w.shape, generator=generator)
    return weights


def test_inception_gives_the_features_of_pytorch_fid(random_inception, monkeypatch):
    """The network is theirs, the resize is TensorFlow's, which theirs only approximates."""
    theirs = pytest.importorskip("pytorch_fid.inception")
    monkeypatch.setattr(
        theirs, "load_state_dict_from_url", lambda *args, **kwargs: random_inception
    )
    generator = torch.Generator().manual_seed(1)
    images = torch.randint(0, 256, (2, 3, 9, 9), dtype=torch.uint8, generator=generator)
    ours = Inception(random_inception)
    as_in_the_graph = (old_resize(old_resize(images.double(), 299).mT, 299).mT - 128) / 128
    with torch.no_grad():
        net = theirs.InceptionV3(resize_input=False, normalize_input=False).eval()
        expected = net(as_in_the_graph.float())[0][..., 0, 0]  # (2, 2048)
        features = ours(images)
        approximate = theirs.InceptionV3().eval()(images / 255)[0][..., 0, 0]
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4 * expected.std().item())
    assert expected.std(0).mean() > 1e-3 * expected.std()  # the images can be told apart
    assert 1e-3 * expected.std() < (features - approximate).abs().mean() < expected.std()
    # The Inception Score's logits are without the bias.
    assert torch.equal(ours.logits(features), features @ random_inception["fc.weight"].T)


def test_the_resize_is_tensorflows_old_one():
    """Place i of 299 reads i * W / 299; beyond the border the last value repeats.

    By hand, and against NVIDIA's way to write it.
    """
    x = torch.tensor([[0.0, 10.0, 40.0]])
    torch.testing.assert_close(old_resize(x, 6)[0], torch.tensor([0.0, 5, 10, 25, 40, 40]))
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    theta = torch.eye(2, 3, dtype=torch.float64)
    # The sampling points of align_corners=False, moved by their half pixels.
    theta[:, 2] += theta.diagonal() / 32 - theta.diagonal() / 299
    grid = F.affine_grid(theta.expand(2, 2, 3), (2, 3, 299, 299), align_corners=False)
    how = dict(mode="bilinear", padding_mode="border", align_corners=False)
    expected = F.grid_sample(x, grid, **how)
    found = old_resize(old_resize(x, 299).mT, 299).mT
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.fixture
def small(monkeypatch):
    """Stand-ins for what is large: Inception, which a GPU fetches, and a CIFAR-10 classifier."""

    class Small(nn.Module):
        def __init__(self, weights):
            super().__init__()
            self.scale = nn.Parameter(weights["scale"])

        def forward(self, images):
            return images.double().mean((2, 3)) * self.scale

        def logits(self, features):
            return features / 50

    torch.manual_seed(0)
    net = Classifier(32, 3, 10, 2).eval().requires_grad_(False)
    monkeypatch.setattr(inception, "Inception", Small)
    monkeypatch.setattr(fid, "load_classifier", lambda *args, **kwargs: net)
    monkeypatch.setattr(fid, "takes_gpu", lambda device: True)
    monkeypatch.setattr(fid, "SHIPPED", {})
    return net


def test_features_of_digits_are_their_classifiers():
    extractor, images = feature_extractor("digits", "cpu"), load_dataset("digits").images[:9]
    assert extractor.name == "digits-classifier" and extractor.dim == 64
    features = extractor(images)
    assert features.shape == (9, 64) and features.dtype == torch.float32
    assert not features.requires_grad
    torch.testing.assert_close(features, fid.load_classifier("digits", "cpu")(to_float(images))[0])


def test_given_inception_weights_are_used(tmp_path, small):
    torch.save({"scale": torch.full((3,), 2.0)}, tmp_path / "weights.pth")
    torch.save({"scale": torch.full((3,), 3.0)}, tmp_path / "others.pth")
    extractor, other = (
        feature_extractor("cifar10", "cpu", tmp_path / f"{name}.pth")
        for name in ("weights", "others")
    )
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8)
    torch.testing.assert_close(extractor(images), 2 * images.float().mean((2, 3)))
    assert not extractor(images).requires_grad
    assert extractor.name == other.name == "inception" and extractor.digest != other.digest
    with pytest.raises(UsageError, match="--inception .*colour images only"):
        feature_extractor("digits", "cpu", tmp_path / "weights.pth")


def large_file(path):
    path.touch()
    os.truncate(path, 2**33)


@pytest.mark.parametrize("make, said", [
    (lambda path: path.touch(), "it has 0 bytes"),
    (lambda path: torch.save({"fc.weight": torch.ones(3)}, path), "not the weights of FID's Inc"),
    (lambda path: torch.save({"scale": torch.full((3,), np.nan)}, path), "values that are not fin"),
    (os.mkfifo, "it is not a file"),  # opening it would wait
    (large_file, "it has 8,589,934,592"),
])
def test_what_holds_no_inception_is_refused(tmp_path, small, make, said):
    make(tmp_path / "weights.pth")
    with pytest.raises(UsageError, match=f"--inception .*weights.pth: .*{said}"):
        feature_extractor("cifar10", "cpu", tmp_path / "weights.pth")


def test_without_inception_the_classifier_stands_in_and_is_named(small, monkeypatch, capsys, cache):
    def fail(url, path, what):
        raise UsageError(f"could not download {url}; put it at {path}")

    monkeypatch.setattr(inception, "download", fail)
    extractor = feature_extractor("cifar10", "cpu")
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert inception.URL in printed and str(cache / inception.FILE) in printed
    images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    torch.testing.assert_close(extractor(images), small(to_float(images))[0])
    # Trained on this machine: not the next one's.
    assert extractor.name == f"cifar10-classifier-{extractor.digest[:6]}"
    small.head.bias += 1
    assert feature_extractor("cifar10", "cpu").digest != extractor.digest


def test_on_a_cpu_cifar10_has_its_shipped_classifier_and_nothing_is_fetched(monkeypatch, cache):
    monkeypatch.setattr(inception, "download", lambda *args: pytest.fail("a download"))
    assert feature_extractor("cifar10", "cpu").name == "cifar10-classifier"


def test_a_damaged_inception_file_is_not_used(small, cache, capsys):
    cache.mkdir()
    (cache / inception.FILE).write_bytes(b"half of it")
    assert feature_extractor("cifar10", "cpu").name.startswith("cifar10-classifier")
    assert "damaged" in capsys.readouterr().out


def test_the_downloaded_inception_file_is_checked_and_used(small, monkeypatch, cache):
    def download(url, path, what):
        assert url == inception.URL and path == cache / inception.FILE
        torch.save({"scale": torch.ones(3)}, path)

    monkeypatch.setattr(inception, "download", download)
    digests = iter(["6726825d" + "0" * 56, "0" * 64])
    monkeypatch.setattr(fid, "weights_digest", lambda net: "net" * 3)

    class Hash:
        def __init__(self, data):
            self.hexdigest = lambda: next(digests)

    monkeypatch.setattr(inception.hashlib, "sha256", Hash)
    assert feature_extractor("cifar10", "cpu").name == "inception"
    # The second digest is wrong.
    assert feature_extractor("cifar10", "cpu").name.startswith("cifar10-classifier")


# ----------------------------------------------------------------- references and metrics


def test_reference_moments_are_kept_per_split_and_features(monkeypatch, cache, capsys):
    extractor = feature_extractor("digits", "cpu")
    mu, cov, n, some = reference_moments("digits", extractor)
    features = extractor(load_dataset("digits").images).double().numpy()
    np.testing.assert_allclose(mu, features.mean(0), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(cov, np.cov(features, rowvar=False), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(some, features, rtol=1e-3, atol=1e-3)  # all, rounded to fp16
    assert n == 1500 and reference_moments("digits", extractor, split="test")[2] == 297
    with monkeypatch.context() as patch:
        patch.setattr(fid, "load_dataset", None)
        again = reference_moments("digits", extractor)  # from the cache
        assert np.array_equal(again[0], mu) and np.array_equal(again[1], cov) and again[2] == 1500
        extractor.digest = "other"
        with pytest.raises(TypeError):
            reference_moments("digits", extractor)
    extractor.digest = feature_extractor("digits", "cpu").digest
    (file,) = cache.glob("moments-digits-train-digits-classifier-*.npz")
    np.testing.assert_array_equal(load_moments(file, extractor)[1], cov)
    file.write_bytes(file.read_bytes()[:1000])
    assert np.array_equal(reference_moments("digits", extractor)[0], mu)
    assert "damaged" in capsys.readouterr().out


def test_moments_of_edm_are_read(tmp_path):
    mu, cov = random_moments(0)
    np.savez(tmp_path / "ref.npz", mu=mu, sigma=cov)
    extractor = SimpleNamespace(dim=len(mu), name="some-features")
    found = load_moments(tmp_path / "ref.npz", extractor)
    assert np.array_equal(found[0], mu) and np.array_equal(found[1], cov)
    np.savez(tmp_path / "wrong.npz", mu=mu)
    np.savez(tmp_path / "short.npz", mu=mu[1:], sigma=cov)
    with pytest.raises(UsageError, match="short.npz.* features"):
        load_moments(tmp_path / "short.npz", extractor)
    for name in ("wrong.npz", "none.npz"):
        with pytest.raises(UsageError, match=f"{name}.*`mu` and `sigma`"):
            load_moments(tmp_path / name, extractor)
    for kind in (">f8", "f4", np.longdouble):  # of another machine
        np.savez(tmp_path / "other.npz", mu=mu.astype(kind), sigma=cov.astype(kind))
        found = load_moments(tmp_path / "other.npz", extractor)
        assert found[1].dtype == np.float64 and found[1].dtype.isnative
        np.testing.assert_allclose(found[1], cov, rtol=1e-6, atol=1e-6)
    np.savez(tmp_path / "negative.npz", mu=mu, sigma=-np.eye(len(mu)))  # a FID of 0 to itself
    with pytest.raises(UsageError, match="negative.npz: .* no mean or covariance"):
        load_moments(tmp_path / "negative.npz", extractor)
    extractor.dim += 1
    pattern = f"ref.npz.* {len(mu)} features, some-features has {len(mu) + 1}"
    with pytest.raises(UsageError, match=pattern):
        load_moments(tmp_path / "ref.npz", extractor)


def row_of(evaluator, x0):
    """The columns of images x0 (n, C, H, W) that come in batches."""
    metrics = Metrics(evaluator, len(x0))
    for start in range(0, len(x0), 250):
        metrics.add(x0[start : start + 250], start)
    return metrics.row()


def measure(
    samplers, evaluator=None, n=5, batch=250, shape=(1, 4, 4), classes=0, reference=None, out=None
):
    """`fid.measure` without a Run: rows, pictures."""
    config = Options(eval_n=n, eval_batch=batch)
    run = SimpleNamespace(config=config, device=torch.device("cpu"), rank=0, out=out)
    net = SimpleNamespace(img_shape=shape, label_dim=classes)
    return fid.measure(run, samplers, net, evaluator, reference)


def test_an_image_belongs_to_its_seed_whatever_the_batch():
    seen = []

    def sampler(noise, labels):
        assert noise.dtype == torch.float64
        seen.append(len(noise))
        return 0.2 * noise + labels[:, None, None, None] - 1

    samplers = {("a", 1): sampler}
    pictures = [measure(samplers, batch=size, classes=3)[1]["a, NFE 1"] for size in (1, 2, 256)]
    assert torch.equal(pictures[0], pictures[1]) and torch.equal(pictures[0], pictures[2])
    assert seen == [1] * 5 + [2, 2, 1] + [5]
    for seed, image in enumerate(pictures[0]):
        noise = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(seed)).double()
        assert torch.equal(image, to_uint8((0.2 * noise + seed % 3 - 1).float()))
    assert len(pictures[0].flatten(1).unique(dim=0)) == 5
    assert len(measure(samplers, n=90, classes=3)[1]["a, NFE 1"]) == 16  # all there is to see
    assert fid.labels_for(range(12), 10, "cpu").tolist() == [*range(10), 0, 1]
    assert fid.labels_for([1], 0, "cpu") is None


@pytest.mark.parametrize("shares", [[0.9, 0.1], [0.0, 0.25, 0.75], [0.5, 0.5]])
def test_labels_come_in_the_shares_of_the_data(shares, monkeypatch):
    monkeypatch.setattr(fid, "class_shares", lambda *a: torch.tensor(shares, dtype=torch.float64))
    seen = []
    samplers = {("a", 1): lambda noise, labels: seen.append(labels) or noise}
    measure(samplers, Evaluator(PIXELS, (np.zeros(16), np.eye(16))), n=200, batch=7,
            classes=len(shares))
    counts = torch.cat(seen).bincount(minlength=len(shares)) / 200
    np.testing.assert_allclose(counts, shares, atol=0.01)
    monkeypatch.setattr(fid, "class_shares", lambda *a: torch.ones(7))  # another data set's
    seen.clear()
    measure(samplers, n=5, classes=3)
    assert torch.cat(seen).tolist() == [0, 1, 2, 0, 1]


def test_images_of_every_row_are_saved_for_other_metrics(tmp_path):
    config = Options(eval_n=9, eval_batch=4, save_images=6)
    run = SimpleNamespace(config=config, device=torch.device("cpu"), rank=0, out=tmp_path)
    for channels in (1, 3):
        net = SimpleNamespace(img_shape=(channels, 4, 4), label_dim=0)
        samplers = {("untrained (unipc3, cosine)", 2): lambda noise, labels: 0.3 * noise}
        fid.measure(run, samplers, net)
        files = sorted((tmp_path / "images" / "untrained-unipc3-cosine-NFE-2").iterdir())
        assert [file.name for file in files] == [f"{i:06d}.png" for i in range(6)]
        images = load_dataset("folder", "train", files[0].parent).images
        noise = noise_from_seeds(range(6), (channels, 4, 4))
        assert torch.equal(images, to_uint8((0.3 * noise).float()))


def test_fd_is_the_distance_in_imagenets_features(monkeypatch, tmp_path):
    monkeypatch.setattr(fid, "imagenet_features", lambda device: PIXELS)
    evaluator = make_evaluator(Options(fd=True), "cpu")
    x0 = to_float(load_dataset("digits", "test").images)
    row = row_of(evaluator, x0)
    pixels = load_dataset("digits").images.flatten(1)[:, :16].double().numpy()
    found = to_uint8(x0).flatten(1)[:, :16].double().numpy()
    expected = frechet_distance(pixels.mean(0), np.cov(pixels.T), found.mean(0), np.cov(found.T))
    assert row["fd"] == pytest.approx(expected) and row["fd_features"] == "pixels"
    assert row["kid_fd"] != row["kid"] and row["fid_features"] == "digits-classifier"
    plain = row_of(make_evaluator(Options(), "cpu"), x0)
    assert {k: v for k, v in row.items() if "fd" not in k} == plain
    for option, value in (("features", "lite0"), ("features", "imagenet"),
                          ("classifier", "imagenet-lite0")):
        config = Options(fd=True)
        setattr(config, option, value)
        with pytest.raises(UsageError, match=f"--fd .*the loss sees these features by --{option}"):
            make_evaluator(config, "cpu")


def test_lite0_gives_the_features_before_its_last_layer():
    pytest.importorskip("efficientnet_lite_pytorch")
    extractor = fid.imagenet_features("cpu")
    features = extractor(load_dataset("digits").images[:2])
    assert extractor.name == "efficientnet-lite0" and features.shape == (2, 1280)


def test_the_distance_of_two_sets_on_the_command_line(tmp_path, monkeypatch, capsys):
    """A data set, a folder, a zip, moments: the same images have the same distance."""
    test = load_dataset("digits", "test").images
    fid.save_pngs(tmp_path / "folder", test, 0)
    extractor = feature_extractor("digits", "cpu")
    mu, cov, *_ = reference_moments("digits", extractor, split="test")
    np.savez(tmp_path / "moments.npz", mu=mu, sigma=cov)
    found = {}
    for other in ("digits:test", str(tmp_path / "folder"), str(tmp_path / "moments.npz")):
        monkeypatch.setattr("sys.argv", ["fid.py", "digits", other])
        fid.main()
        found[other] = capsys.readouterr().out.splitlines()[-2:]
    first, second, third = found.values()
    assert first == second and third[-1] == first[0].replace("297", "?")
    assert first[0] == "fid [digits-classifier, n=1500 and 297]: 1.414"
    assert first[1].startswith("kid [digits-classifier, at most 2000 of each]: 0.02431 +- 0.0")
    write_wrong = torch.zeros(3, 1, 9, 9, dtype=torch.uint8)
    fid.save_pngs(tmp_path / "wrong", write_wrong, 0)
    monkeypatch.setattr("sys.argv", ["fid.py", "digits", str(tmp_path / "wrong")])
    with pytest.raises(UsageError, match="wrong: images of shape .1, 9, 9."):
        fid.main()


@pytest.mark.parametrize("images, options, said", [
    (1, {}, "one train image: a FID needs two"), (3, {"recall": True}, "3 images: recall needs"),
])
def test_too_few_images_are_refused_before_the_training(tmp_path, images, options, said):
    fid.save_pngs(tmp_path, load_dataset("digits").images[:images], 0)
    config = Options(dataset="folder", data_dir=str(tmp_path), smoke=True, **options)
    with pytest.raises(UsageError, match=said):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(fid, "feature_extractor", lambda *a: PIXELS)
            make_evaluator(config, "cpu")


PIXELS = fid.FeatureExtractor(
    "pixels", "0", 16, torch.device("cpu"), lambda images: images.flatten(1)[:, :16]
)


def close(row, other):
    return row.keys() == other.keys() and all(
        v == (w if isinstance(v, str) else pytest.approx(w, rel=1e-5))
        for v, w in zip(row.values(), other.values())
    )


def test_rows_are_those_of_all_images_and_the_reference_is_sampled_first(tmp_path):
    evaluator = make_evaluator(Options(smoke=True, recall=True), "cpu", unseen=True)
    order = []

    def teacher(noise, labels):
        order.append("teacher")
        return 0.5 * noise

    def ours(noise, labels):
        order.append("ours")
        return 0.4 * noise + 0.1

    samplers = {("ours", 2): ours, ("teacher", 9): teacher}
    sizes = dict(n=70, batch=32, shape=(1, 8, 8), out=tmp_path)
    rows, pictures = measure(samplers, evaluator, reference="teacher", **sizes)
    assert order == ["teacher", "ours"] * 3
    assert [(row.pop("name"), row.pop("nfe")) for row in rows] == list(samplers)
    assert list(pictures) == ["ours, NFE 2", "teacher, NFE 9"]
    noise = noise_from_seeds(range(70), (1, 8, 8))
    target = teacher(noise, None)
    for row, sampler in zip(rows, samplers.values()):
        x0 = sampler(noise, None)
        error = (x0 - target).square().mean().sqrt().item()
        assert row.pop("rmse_to_teacher") == pytest.approx(error, abs=1e-7)
        squares = (x0 - target).square().mean((1, 2, 3))  # sd(sqrt(s)) = sd(s) / (2 sqrt(mean s))
        spread = squares.std().item() / 70**0.5 / (2 * error) if error else 0
        assert row.pop("rmse_se") == pytest.approx(spread, abs=1e-7)
        with np.load(tmp_path / "errors.npz") as kept:
            label = "teacher, NFE 9" if error == 0 else "ours, NFE 2"
            np.testing.assert_allclose(kept[label], squares, atol=1e-7)
        assert close(row, row_of(evaluator, x0.float())) and row["fid_n"] == 70
        assert {"fid_unseen", "recall", "kid", "kid_se", "kid_unseen_se"} <= row.keys()
        assert row["kid"] != row["kid_unseen"]
    assert rows[0]["fid"] != rows[1]["fid"]
    order.clear()
    rows, _ = measure(samplers, evaluator, **sizes)
    assert not any("rmse_to_teacher" in row for row in rows) and order[:2] == ["ours", "teacher"]


def test_recall_is_against_images_of_all_classes(monkeypatch):
    images = torch.arange(120_000).view(-1, 1, 1, 1)
    extractor = fid.FeatureExtractor("x", "0", 1, "cpu", lambda batch: batch.flatten(1))
    monkeypatch.setattr(fid, "feature_extractor", lambda *a: extractor)
    monkeypatch.setattr(fid, "reference_moments", lambda *a: ())
    monkeypatch.setattr(fid, "load_dataset", lambda *a: SimpleNamespace(images=images))
    real = make_evaluator(Options(recall=True), "cpu").real
    assert 30_000 < len(real) <= 50_000 and real.min() < 3 and real.max() > 119_990


def test_real_images_and_noise_stand_beside_a_fid():
    """In both spaces; the constants of shipped classifiers are what their images give."""
    device = torch.device("cpu")
    spaces = [fid.classifier_features("digits", device, steps=5, seed=seed) for seed in (0, 1)]
    first, second = (Evaluator(e, fid.reference_moments("digits", e)) for e in spaces)
    second.real = torch.zeros(5, 64)  # for precision and recall, which noise has no use for
    evaluator = Evaluator(first.extractor, first.reference, unseen=second)
    run = SimpleNamespace(config=Options(eval_n=70, eval_batch=32), device=device, rank=0)
    net = SimpleNamespace(img_shape=(1, 8, 8), label_dim=0)
    sampler = {("a", 1): lambda noise, labels: 0 * noise}
    fid.measure(run, sampler, net, evaluator)
    noise = to_uint8(fid.noise_from_seeds(range(70), (1, 8, 8)))
    test = load_dataset("digits", "test").images
    for suffix, space in (("", first), ("_unseen", second)):
        found, kid = run.references[f"fid{suffix}"], run.references[f"kid{suffix}"]
        for images, which in ((noise, "noise"), (test, "real")):
            features, moments = features_of(images, space.extractor), Moments(64)
            moments.add(features)
            expected = frechet_distance(*moments.mean_cov(), *space.reference[:2])
            assert found[which] == pytest.approx(expected, rel=1e-3)
            expected = fid.kernel_distance(space.reference[3], features)[0]
            assert kid[which] == pytest.approx(expected, rel=1e-2)
        assert found["real_n"] == kid["real_n"] == 297 and found["noise"] > found["real"]
    # of another reference than the training images the constants say nothing
    other = fid.real_row(run.config, Evaluator(spaces[0], second.reference, "x.npz"))
    assert other["fid"] > 10 * fid.HELD_OUT["digits-classifier"]["fid"]


def test_without_test_images_only_noise_stands_beside_a_fid(monkeypatch):
    monkeypatch.setattr(fid, "has_test_images", lambda name, data_dir: False)
    extractor = SimpleNamespace(name="folder-classifier-abc123")
    evaluator = Evaluator(extractor, None)
    found = fid.reference_fids(Options(dataset="folder"), evaluator, {"fid": 7.0})
    assert found == {"fid": {"noise": 7.0}}


@pytest.fixture
def backends():
    """Both that have TF32, with it switched off, as in every run."""
    both = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [backend.allow_tf32 for backend in both]
    for backend in both:
        backend.allow_tf32 = False
    yield both
    for backend, value in zip(both, before):
        backend.allow_tf32 = value


def test_sampling_may_use_tf32_and_what_follows_may_not(backends):
    """Also after a sampler that fails."""
    seen = {"sampling": [], "features": []}

    def note(where):
        seen[where] += [backend.allow_tf32 for backend in backends]

    def features(images):
        note("features")
        return images.flatten(1).float()

    def sampler(noise, labels):
        note("sampling")
        if len(seen["sampling"]) > 2:
            raise UsageError("fails")
        return noise

    space = fid.FeatureExtractor("pixels", "", 64, torch.device("cpu"), features)
    evaluator = Evaluator(space, (np.zeros(64), np.eye(64)))
    measure({("a", 1): sampler}, evaluator, shape=(1, 8, 8))
    with pytest.raises(UsageError, match="fails"):
        measure({("a", 1): sampler}, evaluator, shape=(1, 8, 8))
    assert seen["sampling"] == [True] * 4 and seen["features"] and not any(seen["features"])
    assert not any(backend.allow_tf32 for backend in backends)


def test_sampling_keeps_no_graph_and_refuses_what_is_not_finite():
    scale = torch.ones(1, dtype=torch.float64, requires_grad=True)
    third = noise_from_seeds([3], (1, 2, 2))[:, :1, :1, :1]

    def sampler(noise, labels):
        x0 = scale * noise
        assert not x0.requires_grad and labels is None
        return x0 / (noise[:, :1, :1, :1] - third)

    measure({("cfd", 4): sampler}, n=3, shape=(1, 2, 2))
    with pytest.raises(UsageError, match="cfd, NFE 4.*not finite, images 2 to 3"):
        measure({("cfd", 4): sampler}, n=4, batch=2, shape=(1, 2, 2))


def inception_score(p, parts):
    """Salimans et al. 2016, their code: exp of the mean KL(p(y | x) || p(y)) of each part."""
    scores = []
    for part in np.array_split(p, parts):
        mean = part.mean(0)
        kl = [sum(q * np.log(q / m) for q, m in zip(row, mean) if q > 0) for row in part]
        scores.append(np.exp(np.mean(kl)))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("n, parts", [(40, 10), (7, 7)])
def test_inception_score_is_the_mean_over_ten_parts(small, tmp_path, n, parts):
    torch.save({"scale": torch.tensor([1.0, 2.0, 3.0])}, tmp_path / "weights.pth")
    extractor = feature_extractor("cifar10", "cpu", tmp_path / "weights.pth")
    extractor.dim = 3
    evaluator = Evaluator(extractor, (np.zeros(3), np.eye(3)))
    x0 = torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    x0 = x0 ** torch.arange(1, n + 1).view(-1, 1, 1, 1) * 2 - 1
    row = row_of(evaluator, x0)
    p = (extractor(to_uint8(x0)).double() / 50).softmax(1).numpy()
    found = row["inception_score"], row["inception_score_sd"]
    assert found == pytest.approx(inception_score(p, parts))
    batches = Metrics(evaluator, n)
    for first in range(0, n, 3):
        batches.add(x0[first : first + 3], first)
    assert close(batches.row(), row)
    without = Evaluator(replace(extractor, logits=None), evaluator.reference)
    assert "inception_score" not in row_of(without, x0)


def test_edms_moments_are_the_reference_with_inception(small, tmp_path, monkeypatch, cache, capsys):
    torch.save({"scale": torch.ones(3)}, tmp_path / "weights.pth")
    config = Options("cifar10", inception=str(tmp_path / "weights.pth"))
    monkeypatch.setattr(fid, "reference_moments", lambda *args: ("training",))
    monkeypatch.setattr(fid, "load_moments", lambda path, extractor: ("read", path))
    monkeypatch.setattr(inception, "download", lambda url, path, what: (path, url))

    def found(config):
        evaluator = make_evaluator(config, "cpu")
        return evaluator.reference, evaluator.against

    # No loss has seen Inception's features: a second space is not needed.
    assert make_evaluator(config, "cpu", unseen=True).unseen is None
    published = (cache / "edm-cifar10-32x32.npz", inception.EDM_REFERENCES["cifar10"])
    assert found(config) == (("read", published), "edm")
    config.reference = "train"
    assert found(config) == (("training",), "train")
    config.reference = "my.npz"
    assert found(config) == (("read", "my.npz"), "my.npz")
    folder = tmp_path / "imagenet"
    folder.mkdir()
    Image.new("RGB", (64, 64)).save(folder / "a.png")
    images = Options("imagenet64", data_dir=str(folder), inception=config.inception)
    assert found(images)[1] == "train"  # by another tool than EDM's, other images perhaps
    (folder / "dataset.json").write_text('{"labels": null}')
    assert found(images)[1] == "edm"

    def fail(url, path, what):
        raise UsageError(f"{what}: no {url}")

    monkeypatch.setattr(inception, "download", fail)
    config.reference = None
    assert found(config)[1] == "train"
    assert "those of the training images" in capsys.readouterr().out
    monkeypatch.setattr(fid, "edm_reference", lambda name: "not for the classifier")
    monkeypatch.setattr(inception, "FILE", "none")
    config.inception = None
    assert found(config)[0] == ("training",)  # the classifier's features are not EDM's


def test_fid_of_images_falls_as_they_get_better():
    extractor = feature_extractor("digits", "cpu")
    reference = reference_moments("digits", extractor)
    x = to_float(load_dataset("digits").images)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    evaluator = Evaluator(extractor, reference)
    fids = [row_of(evaluator, x + level * noise)["fid"] for level in (0, 0.1, 0.3, 1)]
    assert fids[0] < 1e-4 and fids == sorted(fids) and fids[1] > 0.1 and fids[3] > 10
    features = extractor(to_uint8(x + 0.3 * noise)).double().numpy()
    expected = frechet_distance(features.mean(0), np.cov(features, rowvar=False), *reference[:2])
    assert fids[2] == pytest.approx(expected, rel=1e-4)


# ------------------------------------------------------------------- precision and recall


def brute_force(real, fake, k):
    """Kynkaanniemi et al. 2019, section 3.1, point by point."""

    def share(points, x):
        radius = []
        for i, a in enumerate(x):
            distances = [float(np.linalg.norm(a - b)) for j, b in enumerate(x) if j != i]
            radius.append(sorted(distances)[k - 1])
        return np.mean([any(np.linalg.norm(p - a) <= r for a, r in zip(x, radius)) for p in points])

    return share(fake, real), share(real, fake)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("batch_size", [7, 1000])
def test_precision_and_recall_are_those_of_the_definition(k, batch_size):
    rng = np.random.default_rng(0)
    for shift, scale in ((0, 1), (1, 0.5), (0, 3)):
        real, fake = rng.normal(size=(40, 6)), shift + scale * rng.normal(size=(50, 6))
        features = torch.from_numpy(real).float(), torch.from_numpy(fake).float()
        found = precision_recall(*features, k, batch_size)
        assert found == pytest.approx(brute_force(real, fake, k))
        assert 0 < max(found) and found[0] != found[1]


def test_precision_sees_wrong_images_and_recall_missing_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 4, generator=generator)
    assert precision_recall(x, x) == (1, 1) and precision_recall(x, x + 100) == (0, 0)
    precision, recall = precision_recall(x, x[:100])  # some kinds of images are missing
    assert precision == 1 and 0.3 < recall < 1
    precision, recall = precision_recall(x, torch.cat([x, x + 100]))  # half of the images are wrong
    assert precision == 0.5 and recall == 1


def test_recall_is_given_in_the_space_that_no_loss_has_seen():
    # The second classifier is one after 5 steps.
    evaluator = make_evaluator(Options(smoke=True, recall=True), "cpu", unseen=True)
    real = load_dataset("digits").images
    x0 = to_float(load_dataset("digits", "test").images)
    row = row_of(evaluator, x0)
    extractor = evaluator.unseen.extractor
    expected = precision_recall(extractor(real), extractor(to_uint8(x0)))
    assert (row["precision"], row["recall"]) == pytest.approx(expected)
    assert 0 < row["recall"] != row["precision"] < 1
    assert row["precision_recall_features"] == row["fid_unseen_features"] != row["fid_features"]
    plain = row_of(make_evaluator(Options(), "cpu"), x0)
    assert row["fid"] == plain["fid"] != row["fid_unseen"]
    alone = row_of(make_evaluator(Options(recall=True), "cpu"), x0)
    assert alone["precision_recall_features"] == "digits-classifier"
    assert alone["recall"] != row["recall"] and "fid_unseen" not in alone
    assert "recall" not in row_of(make_evaluator(Options(smoke=True), "cpu", unseen=True), x0)
