from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional

from netdyno.bench.data import synthetic
from netdyno.bench.data.prepared import FORMS, load, sha256_of, verify

SMALL = {"mnist": (1000, 300), "cifar10": (2000, 500), "cifar100": (3000, 1000), "flowers": (150, 50)}


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("drawn")
    for name, sizes in SMALL.items():
        synthetic.make(name, root, sizes=sizes)
    synthetic.make("anime_faces", root, sizes=(1300, 0))
    return root


def pixels(name: str, split: str, root: Path) -> np.ndarray:
    """uint8 [N, H, W, C]; flowers at an eighth of their size, faces at half."""
    found = load(name, split, root)
    if found.images is not None:
        return np.array(found.images)
    assert found.files is not None
    factor = 8 if name == "flowers" else 2
    return np.stack([np.asarray(Image.open(path).reduce(factor)) for path in found.files])


def random_features(images: np.ndarray) -> torch.Tensor:
    """What a convolution of random patches sees, pooled to 3 x 3: float32 [N, F]."""
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    patches = functional.unfold(x[:100], 5).permute(0, 2, 1).reshape(-1, x.shape[1] * 25)
    patches = patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0))[:120]]
    patches = patches - patches.mean(1, keepdim=True)
    filters = functional.normalize(patches + 1e-6, dim=1).reshape(-1, x.shape[1], 5, 5)
    response = torch.cat([functional.conv2d(part, filters, stride=2) for part in x.split(500)])
    both = torch.cat([functional.relu(response - 0.1), functional.relu(-response - 0.1)], 1)
    return functional.adaptive_avg_pool2d(both, 3).flatten(1)


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("mnist", 0.90, 1.0), ("cifar10", 0.35, 0.95), ("cifar100", 0.08, 0.95), ("flowers", 0.6, 1.0)],
)
def test_a_linear_layer_over_random_convolutions_learns_it(drawn: Path, name: str, least: float, most: float) -> None:
    """A ridge regression in closed form: it reaches several times chance, and does not find the labels for free."""
    images = np.concatenate([pixels(name, split, drawn) for split in ("train", "test")])
    labels = torch.from_numpy(np.concatenate([load(name, split, drawn).labels for split in ("train", "test")]))
    features = random_features(images)
    count = SMALL[name][0]
    features = (features - features[:count].mean(0)) / (features[:count].std(0) + 1e-3)
    train, test = features[:count], features[count:]
    targets = functional.one_hot(labels[:count], FORMS[name].classes).float()
    kernel = train @ train.T + 0.1 * train.shape[1] * torch.eye(count)
    prediction = test @ (train.T @ torch.linalg.solve(kernel, targets - targets.mean(0)))
    accuracy = (prediction.argmax(1) == labels[count:]).float().mean().item()
    assert least < accuracy <= most


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100"])
def test_no_single_pixel_gives_the_class_away(drawn: Path, name: str) -> None:
    images, labels = pixels(name, "train", drawn), load(name, "train", drawn).labels
    assert labels is not None
    brightness = images.mean(3).reshape(len(images), -1)
    classes = FORMS[name].classes
    spread = np.stack([brightness[labels == label].mean(0) for label in range(classes)]).var(0)
    explained = spread / (brightness.var(0) + 1)
    assert explained.max() < 0.6


def test_faces_share_a_structure_that_generalises(drawn: Path) -> None:
    """32 principal components of training faces explain most of what varies in others; of noise it would be 3 %."""
    train, test = (
        pixels("anime_faces", s, drawn).reshape(-1, 32 * 32 * 3).astype(np.float32) for s in ("train", "test")
    )
    mean = train.mean(0)
    _, _, axes = np.linalg.svd(train - mean, full_matrices=False)
    rest = (test - mean) - (test - mean) @ axes[:32].T @ axes[:32]
    explained = 1 - rest.var() / (test - mean).var()
    assert 0.6 < explained < 0.99


@pytest.mark.parametrize("name", [*FORMS])
def test_sets_are_whole_marked_and_balanced(drawn: Path, name: str) -> None:
    assert verify(name, drawn) == []
    for split in ("train", "test"):
        found = load(name, split, drawn)
        assert (found.synthetic, found.label) == (True, "synthetic")
        if found.labels is not None:
            counts = np.bincount(found.labels, minlength=FORMS[name].classes)
            assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("name", [*FORMS])
def test_no_image_occurs_twice(drawn: Path, name: str) -> None:
    images = [sha256_of(image) for split in ("train", "test") for image in pixels(name, split, drawn)]
    assert len({*images}) == len(images)


@pytest.mark.parametrize("name", [*FORMS])
def test_the_seed_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("netdyno.bench.data.prepared.HELD_OUT", 2)
    digests = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        synthetic.make(name, tmp_path / folder, sizes=(10, 0 if name == "anime_faces" else 5), seed=seed)
        digests.append([load(name, split, tmp_path / folder).sha256 for split in ("train", "test")])
    assert digests[0] == digests[1]
    assert digests[0][0] != digests[2][0]
    assert digests[0][1] != digests[2][1]


def test_digits_are_centred_light_ink_on_black(drawn: Path) -> None:
    images = pixels("mnist", "train", drawn)
    border = np.concatenate([images[:, [0, -1]], images[:, :, [0, -1]].transpose(0, 2, 1, 3)], 2)
    assert border.mean() < 1
    assert 0.05 < (images > 64).mean() < 0.25
    assert (images.max((1, 2, 3)) > 150).all()


def test_flowers_are_jpeg_of_240_by_320(drawn: Path) -> None:
    found = load("flowers", "test", drawn)
    assert found.files is not None
    with Image.open(found.files[0]) as image:
        assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (320, 240))


def test_default_sizes_hold_out_a_thousand_faces() -> None:
    assert set(synthetic.SIZES) == set(FORMS)
    assert synthetic.SIZES["anime_faces"][0] > 2000
