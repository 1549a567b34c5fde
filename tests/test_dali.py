"""DALI's loaders beyond the common rules of test_loader.py: super-batches, augmentation, broken files."""

import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from netdyno.bench.data import dali
from netdyno.bench.data.loader import Batch, Loader
from netdyno.bench.errors import UserError
from netdyno.bench.workloads import Preprocess

CPU = torch.device("cpu")
PLAIN = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
SQUARE = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0), image_size=16)


def arrays(images: np.ndarray, preprocess: Preprocess = PLAIN, device: torch.device = CPU, **changes) -> Loader:
    arguments = {"batch_size": 4, "train": True, "seed": 0, "dtype": torch.float32, **changes}
    return dali.array_loader(images, np.arange(len(images)), preprocess=preprocess, device=device, **arguments)


def jpegs(files: list[Path], preprocess: Preprocess = SQUARE, device: torch.device = CPU, **changes) -> Loader:
    arguments = {"batch_size": 4, "train": True, "seed": 0, "dtype": torch.float32, **changes}
    return dali.jpeg_loader(files, np.arange(len(files)), preprocess=preprocess, device=device, **arguments)


@pytest.fixture
def noise() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (50, 8, 8, 3), np.uint8)


@pytest.fixture
def photographs(tmp_path: Path) -> list[Path]:
    """Twelve JPEGs, 32×32: smooth, each of another colour and brighter to the right."""
    files = []
    for i in range(12):
        ramp = np.linspace(20 + 5 * i, 180 + 5 * i, 32).astype(np.uint8)
        image = np.stack([np.tile(ramp, (32, 1)), np.full((32, 32), 20 * i), np.full((32, 32), 90)], axis=2)
        files.append(tmp_path / f"{i:02}.jpg")
        Image.fromarray(image.astype(np.uint8)).save(files[-1], quality=95)
    return files


def stream(monkeypatch: pytest.MonkeyPatch, super_batch: int) -> None:
    """No set stays on the device from now on; super-batches are of so many images at most."""
    monkeypatch.setattr(dali, "RESIDENT_BYTES", 0)
    monkeypatch.setattr(dali, "SUPER_BATCH_IMAGES", super_batch)


@pytest.mark.parametrize("train", [True, False])
def test_neither_residence_nor_the_size_of_super_batches_changes_anything_but_speed(
    noise: np.ndarray, monkeypatch: pytest.MonkeyPatch, train: bool
) -> None:
    preprocess = Preprocess(mean=PLAIN.mean, std=PLAIN.std, crop_padding=2, flip=True)
    loaders = [arrays(noise, preprocess, train=train)]
    monkeypatch.setattr(dali, "SUPER_BATCH_IMAGES", 20)  # of a set that stays: it is brought in three parts
    loaders.append(arrays(noise, preprocess, train=train))
    for super_batch in (1_000, 20):
        stream(monkeypatch, super_batch)
        loaders.append(arrays(noise, preprocess, train=train))
    for _ in range(3):
        for first, *others in zip(*(loader.epoch() for loader in loaders), strict=True):
            for other in others:
                assert torch.equal(first.images, other.images)
                assert torch.equal(first.labels, other.labels)
                assert first.valid == other.valid


@pytest.mark.parametrize("resident", [True, False])
def test_an_epochs_first_batches_are_made_behind_the_last_ones_before(
    noise: np.ndarray, monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    """Not twice, and not where an epoch was left half-way: the next one begins anew."""
    if not resident:
        stream(monkeypatch, 20)
    apart, expected = arrays(noise), []
    for _ in range(4):
        expected.append([batch.labels.tolist() for batch in apart.epoch()])
    made = []
    original = dali.augment
    monkeypatch.setattr(dali, "augment", lambda *given: made.append(len(given[1])) or original(*given))
    loader = arrays(noise)
    assert [batch.labels.tolist() for batch in loader.epoch()] == expected[0]
    assert len(made) == len(expected[0]) + 1
    batches = loader.epoch()
    assert next(batches).labels.tolist() == expected[1][0]
    assert len(made) == len(expected[0]) + 1
    assert next(loader.epoch()).labels.tolist() == expected[2][0]  # that one was left half-way
    assert len(made) == len(expected[0]) + 2
    assert [batch.labels.tolist() for batch in loader.epoch()] == expected[3]


@pytest.mark.parametrize("kind", ["resident", "streamed", "jpegs"])
def test_what_an_epoch_brings_is_drawn_within_it(
    noise: np.ndarray, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """DALI's first run, when a loader is made, is a rehearsal: it saves the first epoch none of its own work."""
    if kind == "streamed":
        stream(monkeypatch, 20)
    drawn = []
    original = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or original(seed))
    loader = jpegs(photographs) if kind == "jpegs" else arrays(noise)
    time.sleep(0.2)  # whatever a thread would do
    assert drawn == []
    next(loader.epoch())
    assert drawn[0] == (0, 0)
    loader.close()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("kind", ["arrays", "jpegs"])
def test_after_an_epoch_dali_works_on_nothing(
    noise: np.ndarray, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, kind: str, train: bool
) -> None:
    """What it decoded between two epochs nobody would time, or the epoch of another loader would pay for it."""
    stream(monkeypatch, 20)
    loader = arrays(noise, train=train) if kind == "arrays" else jpegs(photographs, train=train)
    for _ in range(3):
        assert not all([loader._pipeline.empty() for _ in loader.epoch()])  # type: ignore[attr-defined]
        assert loader._pipeline.empty()  # type: ignore[attr-defined]
    loader.close()


def test_no_batch_is_made_ahead_of_an_evaluation(noise: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    original = dali.augment
    monkeypatch.setattr(dali, "augment", lambda *given: made.append(len(given[1])) or original(*given))
    assert len(list(arrays(noise, train=False).epoch())) == len(made) == 13


def test_batches_come_into_the_same_memory_over_the_border_of_epochs(noise: np.ndarray) -> None:
    """As captured graphs read it: each is whole until the next one is asked for."""
    place = Batch(torch.empty(12, 8, 8, 3).permute(0, 3, 1, 2), torch.empty(12, dtype=torch.int64), 12, 3)
    apart, together = arrays(noise), arrays(noise, into=place)
    for _ in range(3):
        expected = list(apart.epoch())
        done = 0
        for batch in together.epoch():
            assert batch.images.data_ptr() == place.images.data_ptr()
            part = expected[done : done + batch.batches]
            assert torch.equal(batch.images, torch.cat([one.images for one in part]))
            assert torch.equal(batch.labels, torch.cat([one.labels for one in part]))
            done += batch.batches
        assert done == len(expected)


def test_a_set_stays_on_the_device_up_to_a_bound(noise: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "RESIDENT_BYTES", noise.nbytes)
    assert dali.is_resident(noise)
    assert not dali.is_resident(np.repeat(noise, 2, axis=0))


def test_super_batches_are_bounded_in_bytes_and_evenly_filled(
    noise: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = dali._orders

    def spy(*arguments, size: int, **options):
        sizes.append(size)
        return original(*arguments, size=size, **options)

    stream(monkeypatch, 1_000)
    monkeypatch.setattr(dali, "_orders", spy)
    monkeypatch.setattr(dali, "SUPER_BATCH_BYTES", 45 * noise[0].nbytes)
    arrays(noise).close()  # 12 batches of 4; at most 11 fit: 6 and 6 rather than 11 and 1
    arrays(noise, batch_size=50).close()  # a batch beyond the bound is a super-batch of its own
    assert sizes == [24, 50]


def test_strided_views_are_loaded(noise: np.ndarray) -> None:
    loader = arrays(noise[::2], train=False)
    got = torch.cat([batch.images[: batch.valid] for batch in loader.epoch()])
    np.testing.assert_allclose(got.permute(0, 2, 3, 1), noise[::2] / 255, atol=1e-6)


def test_crops_and_flips_are_those_of_the_padded_image_and_vary(noise: np.ndarray) -> None:
    pad = 2
    loader = arrays(noise, Preprocess(mean=PLAIN.mean, std=PLAIN.std, crop_padding=pad, flip=True))
    padded = np.pad(noise, ((0, 0), (pad, pad), (pad, pad), (0, 0)), mode="reflect")
    found = []
    for _ in range(2):
        moves = {}
        for batch in loader.epoch():
            for image, label in zip(
                batch.images.permute(0, 2, 3, 1).mul(255).round().byte(), batch.labels, strict=True
            ):
                matches = [
                    (y, x, flip)
                    for y in range(2 * pad + 1)
                    for x in range(2 * pad + 1)
                    for flip in (1, -1)
                    if np.array_equal(image.numpy(), padded[label, y : y + 8, x : x + 8][:, ::flip])
                ]
                assert len(matches) == 1
                moves[int(label)] = matches[0]
        found.append(moves)
    y, x, flip = (set(values) for values in zip(*found[0].values(), strict=True))
    assert y == x == set(range(2 * pad + 1))  # both extremes are drawn
    assert flip == {1, -1}
    assert sum(found[0][label] == found[1].get(label) for label in found[0]) < 10  # drawn anew at each epoch


def test_flips_by_turns(noise: np.ndarray) -> None:
    """Half of the images in the first epoch, the others in the next, and so on; no test image ever."""
    by_turns = Preprocess(mean=PLAIN.mean, std=PLAIN.std, flip="by turns")

    def mirrored(loader: Loader) -> dict[int, bool]:
        found = {}
        for batch in loader.epoch():
            shown = batch.images.permute(0, 2, 3, 1).mul(255).round().byte().numpy()
            for image, label in zip(shown, batch.labels.tolist(), strict=True):
                found[label] = np.array_equal(image, noise[label][:, ::-1])
                assert found[label] or np.array_equal(image, noise[label])
        return found

    loader = arrays(noise, by_turns, batch_size=5)
    epochs = [mirrored(loader) for _ in range(3)]
    assert epochs[0] == epochs[2] == {label: not flipped for label, flipped in epochs[1].items()}
    assert 10 < sum(epochs[0].values()) < 40
    assert not any(mirrored(arrays(noise, by_turns, batch_size=5, train=False)).values())


@pytest.mark.parametrize("resident", [True, False])
def test_an_overtaken_epoch_cannot_go_on(noise: np.ndarray, monkeypatch: pytest.MonkeyPatch, resident: bool) -> None:
    """And leaves the later ones what is theirs."""
    if not resident:
        stream(monkeypatch, 4)
    (_, *expected) = [[batch.labels.tolist() for batch in epoch] for epoch in three_epochs(arrays(noise))]
    loader = arrays(noise)
    first = loader.epoch()
    next(first)
    second = loader.epoch()
    got = [next(second).labels.tolist()]
    if not resident:  # of a set that stays, an epoch has all that it needs when it begins
        with pytest.raises(RuntimeError, match="later one"):
            list(first)
    else:
        list(first)
    got += [batch.labels.tolist() for batch in second]
    assert [got, [batch.labels.tolist() for batch in loader.epoch()]] == expected


def test_an_older_epoch_begun_late_leaves_the_newer_one_what_is_its(noise: np.ndarray) -> None:
    (_, expected, _) = [[batch.labels.tolist() for batch in epoch] for epoch in three_epochs(arrays(noise))]
    loader = arrays(noise)
    first, second = loader.epoch(), loader.epoch()
    got = [next(second).labels.tolist()]
    with pytest.raises(RuntimeError, match="later one"):
        next(first)
    assert got + [batch.labels.tolist() for batch in second] == expected


def test_an_epoch_of_jpegs_left_half_way_disturbs_no_later_one(photographs: list[Path]) -> None:
    """What had arrived for it is passed over; DALI never has more than its queue, and in the end one fewer is ready."""
    apart = jpegs(photographs, batch_size=2)
    expected = [[batch.labels.tolist() for batch in apart.epoch()] for _ in range(4)]
    loader = jpegs(photographs, batch_size=2)
    assert [batch.labels.tolist() for batch in loader.epoch()] == expected[0]
    assert next(loader.epoch()).labels.tolist() == expected[1][0]
    for epoch in (2, 3):
        got = []
        for batch in loader.epoch():
            got.append(batch.labels.tolist())
            assert loader._begun + len(loader._arrived) <= dali.JPEG_QUEUE  # type: ignore[attr-defined]
        assert got == expected[epoch]
        assert 1 + len(loader._arrived) == dali.JPEG_QUEUE - 1  # type: ignore[attr-defined]


def three_epochs(loader: Loader) -> list:
    return [list(loader.epoch()) for _ in range(3)]


def test_a_closed_loader_ends(noise: np.ndarray) -> None:
    loader = arrays(noise)
    epoch = loader.epoch()
    next(epoch)
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        next(epoch)


def test_affine_maps() -> None:
    preprocess = Preprocess(mean=(0.0,), std=(1.0,), image_size=10, shear_deg=20, zoom=0.25, flip=True)
    maps = dali._affine_maps(500, preprocess, np.random.default_rng(0)).astype(float)
    assert maps.shape == (500, 2, 3)
    np.testing.assert_allclose(maps @ [5, 5, 1], np.full((500, 2), 5.0), atol=1e-5)  # the centre stays
    zoom = 1 / maps[:, 1, 1]
    mirror = np.sign(maps[:, 0, 0])
    angle = np.degrees(np.arctan(maps[:, 0, 1] * zoom * mirror))
    np.testing.assert_allclose(np.abs(maps[:, 0, 0]), 1 / zoom, rtol=1e-6)
    assert 0.75 <= zoom.min() < 0.78 < 1.22 < zoom.max() <= 1.25
    assert -20.001 <= angle.min() < -18 < 18 < angle.max() <= 20.001
    assert 200 < (mirror == -1).sum() < 300
    still = dali._affine_maps(3, SQUARE, np.random.default_rng(0))
    np.testing.assert_array_equal(still, np.tile(np.eye(2, 3), (3, 1, 1)))


def test_mirrored_photographs_are_exact_and_warped_ones_vary(photographs: list[Path]) -> None:
    plain = next(jpegs(photographs, train=False, batch_size=12).epoch()).images
    mirrored = Preprocess(mean=SQUARE.mean, std=SQUARE.std, image_size=16, flip=True)
    batch = next(jpegs(photographs, mirrored, batch_size=12).epoch())
    flips = [
        (torch.equal(image, plain[label]), torch.equal(image, plain[label].flip(-1)))
        for image, label in zip(batch.images, batch.labels, strict=True)
    ]
    assert all(as_is != flipped for as_is, flipped in flips)
    assert {as_is for as_is, _ in flips} == {True, False}

    warped = Preprocess(mean=SQUARE.mean, std=SQUARE.std, image_size=16, shear_deg=15, zoom=0.3)
    loader = jpegs(photographs, warped, batch_size=12)
    first, second = (next(loader.epoch()) for _ in range(2))
    a, b = first.images[first.labels.argsort()], second.images[second.labels.argsort()]
    assert ((a - plain).abs().amax((1, 2, 3)) > 0.02).all()
    assert ((a - b).abs().amax((1, 2, 3)) > 0.02).sum() > 6
    assert (a - plain).abs().mean() < 0.1  # and yet the same photographs, with no black border
    assert a[:, 2].min() > 0.3


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[: len(data) // 2],
        lambda data: data[:-2],
        lambda data: b"this is no photograph, whatever its name may say",
        lambda data: b"\xff\xd8" + bytes(range(256)) + b"\xff\xd9",
        lambda data: data[: len(data) // 2] + data[-2:],
    ],
    ids=["empty", "half", "no-end", "text", "garbage", "hole"],
)
def test_a_broken_jpeg_is_named(photographs: list[Path], damage) -> None:
    photographs[7].write_bytes(damage(photographs[7].read_bytes()))
    with pytest.raises(UserError, match=r"07\.jpg (is truncated or not a JPEG image|cannot be decoded: )") as caught:
        list(jpegs(photographs).epoch())
    assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"07\.jpg"):
        dali.decode(photographs, CPU)


def test_a_missing_jpeg_is_named(photographs: list[Path]) -> None:
    photographs[3].unlink()
    with pytest.raises(UserError, match=r"03\.jpg cannot be read"):
        jpegs(photographs)


def test_decode(photographs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dali, "DECODE_CHUNK", 5)  # 5 + 5 + 2
    images = dali.decode(photographs, CPU)
    assert images.shape == (12, 32, 32, 3)
    assert images.dtype == np.uint8
    expected = np.stack([np.asarray(Image.open(file)) for file in photographs])
    assert np.abs(images.astype(int) - expected).mean() < 1

    Image.new("RGB", (16, 32)).save(photographs[11])
    with pytest.raises(UserError, match=r"11\.jpg: \(32, 16\) pixels"):
        dali.decode(photographs, CPU)
    with pytest.raises(UserError, match="no JPEG files"):
        dali.decode([], CPU)


def test_without_dali_the_user_is_told_how_to_install_it(
    noise: np.ndarray, photographs: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    for use in (lambda: arrays(noise), lambda: jpegs(photographs), lambda: dali.decode(photographs, CPU)):
        with pytest.raises(UserError, match="pip install nvidia-dali-cuda120"):
            use()


def test_real_faces_decode_to_one_array(data_root: Path) -> None:
    files = sorted((data_root / "anime_faces" / "train").glob("*.jpg"))[:300]
    images = dali.decode(files, CPU)
    assert images.shape == (300, 64, 64, 3)
    assert np.abs(images[299].astype(int) - np.asarray(Image.open(files[299]).convert("RGB"))).mean() < 1


@pytest.mark.gpu
@pytest.mark.parametrize("resident", [True, False])
def test_gpu_brings_the_batches_of_the_cpu(
    noise: np.ndarray, photographs: list[Path], monkeypatch: pytest.MonkeyPatch, resident: bool
) -> None:
    if not resident:
        stream(monkeypatch, 20)
    gpu = torch.device("cuda")
    moved = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), crop_padding=2, flip=True)
    warped = Preprocess(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), image_size=16, shear_deg=15, zoom=0.3, flip=True)
    for on_gpu, on_cpu, tolerance in [
        (arrays(noise, moved, gpu), arrays(noise, moved), 1e-5),
        (jpegs(photographs, warped, gpu), jpegs(photographs, warped), 0.2),  # decoders differ by some grey levels
    ]:
        for _ in range(3):
            for a, b in zip(on_gpu.epoch(), on_cpu.epoch(), strict=True):
                assert a.images.is_cuda
                assert a.labels.is_cuda
                assert a.images.stride() == b.images.stride()
                assert torch.equal(a.labels.cpu(), b.labels)
                torch.testing.assert_close(a.images.cpu(), b.images, atol=tolerance, rtol=0)


@pytest.mark.gpu
def test_gpu_copies_do_not_overtake_a_busy_stream(noise: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    stream(monkeypatch, 4)  # an iteration a batch: buffers are used again and again
    loader = arrays(noise, device=torch.device("cuda"), train=False)
    kept = []
    for _ in range(20):
        torch.cuda._sleep(5_000_000)  # some ms, so that the host runs far ahead
        kept += [batch.images[: batch.valid].clone() for batch in loader.epoch()]
    got = torch.cat(kept).cpu().permute(0, 2, 3, 1)
    np.testing.assert_allclose(got, np.tile(noise / 255, (20, 1, 1, 1)), atol=1e-6)


@pytest.mark.gpu
def test_gpu_names_a_broken_jpeg(photographs: list[Path]) -> None:
    data = photographs[7].read_bytes()
    photographs[7].write_bytes(b"\xff\xd8" + bytes(range(256)) + data[-2:])
    with pytest.raises(UserError, match=r"07\.jpg"):
        list(jpegs(photographs, device=torch.device("cuda")).epoch())
