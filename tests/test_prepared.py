import errno
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from netdyno.bench.data import prepared, synthetic
from netdyno.bench.data.prepared import ensure, load, new_set, verify, write_arrays, write_folders
from netdyno.bench.errors import UserError

FLOWERS = ("daisy", "dandelion", "rose", "sunflower", "tulip")


def write_mnist(root: Path, train: int = 12, test: int = 6, **facts: object) -> Path:
    rng = np.random.default_rng(0)
    arrays = {
        split: (rng.integers(0, 256, (count, 28, 28, 1), np.uint8), np.arange(count, dtype=np.int64) % 10)
        for split, count in (("train", train), ("test", test))
    }
    with new_set("mnist", root) as folder:
        write_arrays(folder, "mnist", arrays, **{"split": "official", "note": "made by a test", **facts})
    return root / "mnist"


def write_jpeg(path: Path, width: int, height: int, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=85)


def write_flowers(root: Path) -> Path:
    with new_set("flowers", root) as folder:
        for split, count in (("train", 3), ("test", 1)):
            for kind in FLOWERS:
                for index in range(count):
                    write_jpeg(folder / split / kind / f"{index:04d}.jpg", 40, 30, index)
        write_folders(folder, "flowers", FLOWERS, split="own", note="made by a test")
    return root / "flowers"


def write_faces(root: Path, count: int) -> Path:
    with new_set("anime_faces", root) as folder:
        for index in range(count):
            write_jpeg(folder / "train" / f"{index:05d}.jpg", 64, 64, index)
        write_folders(folder, "anime_faces", [], split="own", note="made by a test")
    return root / "anime_faces"


def edit_manifest(folder: Path, edit: Callable[[dict], object]) -> None:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def test_arrays_come_back_memory_mapped_and_read_only(tmp_path: Path) -> None:
    folder = write_mnist(tmp_path)
    found = load("mnist", "train", tmp_path)
    assert (found.name, found.split, len(found), found.classes) == ("mnist", "train", 12, 10)
    assert (found.label, found.synthetic, found.files) == ("official", False, None)
    assert isinstance(found.images, np.memmap)
    assert not found.images.flags.writeable
    assert found.labels is not None
    assert found.labels.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert found.sha256 == prepared.sha256_of(np.load(folder / "train.images.npy"))
    assert len(load("mnist", "test", tmp_path)) == 6


def test_files_come_back_by_class_then_name(tmp_path: Path) -> None:
    folder = write_flowers(tmp_path)
    found = load("flowers", "train", tmp_path)
    assert found.files is not None
    assert found.labels is not None
    assert [path.relative_to(folder).as_posix() for path in found.files[:4]] == [
        "train/daisy/0000.jpg",
        "train/daisy/0001.jpg",
        "train/daisy/0002.jpg",
        "train/dandelion/0000.jpg",
    ]
    assert found.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]
    assert found.images is None
    assert found.sha256 == json.loads((folder / "manifest.json").read_text())["splits"]["train"]["files_sha256"]


def test_folder_digest_changes_with_a_name_and_with_a_byte(tmp_path: Path) -> None:
    folder = write_flowers(tmp_path)
    before = load("flowers", "train", tmp_path).sha256
    first = folder / "train" / "daisy" / "0000.jpg"
    first.rename(first.with_name("0009.jpg"))
    renamed = load("flowers", "train", tmp_path).sha256
    write_jpeg(first.with_name("0009.jpg"), 40, 30, seed=77)
    assert len({before, renamed, load("flowers", "train", tmp_path).sha256}) == 3


def test_the_last_faces_by_name_are_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepared, "HELD_OUT", 4)
    write_faces(tmp_path, 10)
    train, test = (load("anime_faces", split, tmp_path) for split in ("train", "test"))
    assert train.files is not None
    assert test.files is not None
    assert [path.name for path in test.files] == ["00006.jpg", "00007.jpg", "00008.jpg", "00009.jpg"]
    assert [path.name for path in train.files] == [f"{index:05d}.jpg" for index in range(6)]
    assert train.labels is None
    assert train.classes == 0


def test_too_few_faces_to_hold_any_out(tmp_path: Path) -> None:
    write_faces(tmp_path, 3)
    with pytest.raises(UserError, match=r"3 images, but the last 1000"):
        load("anime_faces", "train", tmp_path)


def test_unknown_name_and_split_list_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="unknown data set 'cats'; known are mnist, cifar10"):
        load("cats", "train", tmp_path)
    with pytest.raises(UserError, match="unknown split 'valid'"):
        load("mnist", "valid", tmp_path)


def test_an_absent_set_says_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="netdyno data fetch mnist"):
        load("mnist", "train", tmp_path)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def save(array: np.ndarray, **options: bool) -> Callable[[Path], None]:
    return lambda path: np.save(path, array, **options)


def zipped(array: np.ndarray) -> bytes:
    content = io.BytesIO()
    np.savez(content, array)
    return content.getvalue()


IMAGES = np.zeros((12, 28, 28, 1), np.uint8)
LABELS = np.zeros(12, np.int64)


@pytest.mark.fault("a damaged or hostile array file, pickles among them")
@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("train.images.npy", truncate, "is truncated"),
        ("train.images.npy", lambda path: path.write_bytes(b""), "is truncated"),
        ("train.images.npy", lambda path: path.write_bytes(b"\x93NUMPY\x01\x00\x76\x00{'descr'"), "is truncated"),
        ("train.images.npy", lambda path: path.write_bytes(path.read_bytes() + b"more"), "4 bytes after"),
        ("train.images.npy", Path.unlink, "is missing"),
        ("train.images.npy", save(IMAGES.astype(np.float32)), r"float32 \[12, 28, 28, 1\].*says uint8"),
        ("train.images.npy", save(IMAGES[..., 0]), r"uint8 \[12, 28, 28\].*says uint8 \[12, 28, 28, 1\]"),
        ("train.images.npy", save(IMAGES[:11]), r"uint8 \[11, 28, 28, 1\]"),
        ("train.images.npy", save(np.asfortranarray(IMAGES)), "Fortran"),
        ("train.images.npy", save(np.array([{}]), allow_pickle=True), "or not a .npy file"),
        ("train.images.npy", lambda path: path.write_bytes(zipped(IMAGES)), "or not a .npy file"),
        ("train.labels.npy", truncate, "is truncated"),
        ("train.labels.npy", save(LABELS.astype(np.int32)), "int32"),
        ("train.labels.npy", save(LABELS[:11]), r"int64 \[11\]"),
        ("train.labels.npy", save(LABELS + 10), "labels from 10 to 10; 10 classes"),
        ("train.labels.npy", save(LABELS - 1), "labels from -1 to -1"),
    ],
)
def test_a_damaged_array_is_named(tmp_path: Path, file: str, damage: Callable[[Path], None], message: str) -> None:
    path = write_mnist(tmp_path) / file
    damage(path)
    with pytest.raises(UserError, match=message) as caught:
        load("mnist", "train", tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert any(str(path) in problem for problem in verify("mnist", tmp_path))
    load("mnist", "test", tmp_path)  # the other split is whole


@pytest.mark.fault("a damaged or hostile array file, pickles among them")
def test_a_pickle_in_an_array_file_is_never_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return Path.touch, (tmp_path / "exploded",)

    path = write_mnist(tmp_path) / "train.labels.npy"
    np.save(path, np.array([Bomb()]), allow_pickle=True)
    with pytest.raises(UserError):
        load("mnist", "train", tmp_path)
    assert verify("mnist", tmp_path)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.fault("a manifest that lies")
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m.update(name="cifar10"), "its name is 'cifar10'"),
        (lambda m: m.update(kind="folders"), "its kind is 'folders'"),
        (lambda m: m.pop("split"), "'split' is missing"),
        (lambda m: m["splits"].pop("test"), "its splits are not"),
        (lambda m: m["splits"]["train"].update(images=-1), "train.images is -1"),
        (lambda m: m["splits"]["train"].update(images="12"), "train.images is '12'"),
        (lambda m: m["splits"]["train"].update(images=True), "train.images is True"),
        (lambda m: m["splits"]["train"].update(images=13), r"says uint8 \[13, 28, 28, 1\]"),
        (lambda m: m["splits"]["train"].update(shape=[32, 32, 3]), "train.shape is"),
        (lambda m: m["splits"]["train"].update(classes=9), "train.classes is 9"),
        (lambda m: m["splits"]["train"].pop("sha256"), "train.sha256 is missing"),
        (lambda m: m["splits"]["train"].update(images=10**30), r"says uint8 \[1000000000000000000000000000000, 28"),
        (lambda m: m.update(split="official\n## another"), "'split' is missing or no short text"),
    ],
)
def test_every_number_of_a_manifest_is_checked(tmp_path: Path, edit: Callable[[dict], object], message: str) -> None:
    folder = write_mnist(tmp_path)
    edit_manifest(folder, edit)
    with pytest.raises(UserError, match=message) as caught:
        load("mnist", "train", tmp_path)
    assert str(folder) in str(caught.value)
    assert verify("mnist", tmp_path)


@pytest.mark.fault("a manifest that lies")
@pytest.mark.parametrize("text", ["", "{", "[]", "\x80", "[" * 100_000, "1" * 5_000])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    path = write_mnist(tmp_path) / "manifest.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match=r"manifest\.json"):
        load("mnist", "train", tmp_path)


@pytest.mark.fault("a manifest that lies")
@pytest.mark.parametrize(
    "classes",
    [
        *(None, 5, [*FLOWERS[:4]], [*FLOWERS[:4], "daisy"], [*FLOWERS[:4], ["tulip"]]),
        *([*FLOWERS[:4], last] for last in ("../tulip", "..", ".", "", "/", "a/b", "tu\0lip", "t" * 300)),
    ],
)
def test_class_folders_must_be_five_plain_names(tmp_path: Path, classes: list[str] | None) -> None:
    edit_manifest(write_flowers(tmp_path), lambda m: m.update(classes=classes))
    with pytest.raises(UserError, match="'classes' does not name 5 folders"):
        load("flowers", "train", tmp_path)


def test_a_missing_class_folder_is_named(tmp_path: Path) -> None:
    folder = write_flowers(tmp_path)
    (folder / "train" / "rose").rename(folder / "train" / "roses")
    with pytest.raises(UserError, match=r"train/rose is missing"):
        load("flowers", "train", tmp_path)


def test_a_lost_image_is_noticed(tmp_path: Path) -> None:
    folder = write_flowers(tmp_path)
    (folder / "train" / "rose" / "0001.jpg").unlink()
    with pytest.raises(UserError, match=r"train holds 14 JPEG images; its manifest says 15"):
        load("flowers", "train", tmp_path)
    assert len(verify("flowers", tmp_path)) == 1


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


RED = Image.new("RGB", (40, 30), (200, 30, 30))
JPEG = encoded(RED, "JPEG")
SIZE = JPEG.index(b"\xff\xc0") + 5  # of the frame header: height and width, two bytes each
STRANGE = {
    "no bytes": (b"", "truncated or not a JPEG"),
    "a PNG under another name": (encoded(RED, "PNG"), "truncated or not a JPEG"),
    "an animated GIF": (encoded(RED, "GIF", save_all=True, append_images=[Image.new("RGB", (40, 30))]), "not a JPEG"),
    "16 bits": (encoded(Image.new("I;16", (40, 30), 40_000), "PNG"), "truncated or not a JPEG"),
    "12 bits": (JPEG[: SIZE - 1] + b"\x0c" + JPEG[SIZE:], "cannot be decoded"),
    "printers' colours": (encoded(RED.convert("CMYK"), "JPEG"), "JPEG image in CMYK"),
    "a thumbnail with an end": (JPEG[:2] + b"\xff\xe1\x00\x06\xff\xd8\xff\xd9" + JPEG[2:-40], "truncated"),
    "4 gigapixels": (JPEG[:SIZE] + b"\xff\xff\xff\xff" + JPEG[SIZE + 4 :], "cannot be decoded"),
    "no pixels": (JPEG[:SIZE] + bytes(4) + JPEG[SIZE + 4 :], "cannot be decoded"),
}


@pytest.mark.fault("a damaged or hostile image")
@pytest.mark.parametrize("kind", STRANGE)
def test_an_image_that_is_none_of_the_set_is_named(tmp_path: Path, kind: str) -> None:
    content, message = STRANGE[kind]
    path = write_flowers(tmp_path) / "train" / "rose" / "0001.jpg"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"rose/0001\.jpg .*{message}") as caught:
        load("flowers", "train", tmp_path)
    assert "\n" not in str(caught.value)
    (problem,) = verify("flowers", tmp_path)
    assert problem == str(caught.value)  # one rule


def test_a_grey_jpeg_is_an_image_like_others(tmp_path: Path) -> None:
    folder = write_flowers(tmp_path)
    (folder / "train" / "rose" / "0001.jpg").write_bytes(encoded(RED.convert("L"), "JPEG"))
    edit_manifest(folder, lambda m: m["splits"]["train"].pop("files_sha256"))
    assert len(load("flowers", "train", tmp_path)) == 15
    assert verify("flowers", tmp_path) == []


@pytest.mark.fault("a damaged or hostile image")
@pytest.mark.parametrize("content", [None, b"", b"GIF89a", b"\xff\xd8 and no end"])
def test_a_truncated_jpeg_is_named(tmp_path: Path, content: bytes | None) -> None:
    path = write_flowers(tmp_path) / "train" / "rose" / "0001.jpg"
    path.write_bytes(path.read_bytes()[:-300] if content is None else content)
    with pytest.raises(UserError, match=r"rose/0001\.jpg is truncated or not a JPEG image"):
        load("flowers", "train", tmp_path)
    (problem,) = verify("flowers", tmp_path)
    assert str(path) in problem


def test_verify_finds_nothing_wrong_with_whole_sets(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    write_flowers(tmp_path)
    write_faces(tmp_path, 3)
    assert [verify(name, tmp_path) for name in ("mnist", "flowers", "anime_faces")] == [[], [], []]


@pytest.mark.parametrize("file", ["train.images.npy", "test.labels.npy"])
def test_verify_finds_one_changed_value_that_load_cannot_see(tmp_path: Path, file: str) -> None:
    path = write_mnist(tmp_path) / file
    array = np.load(path)
    array.flat[5] ^= 1
    np.save(path, array)
    load("mnist", file.split(".")[0], tmp_path)
    (problem,) = verify("mnist", tmp_path)
    assert problem.startswith(f"{path}: SHA-256 is {prepared.sha256_of(array)}")


def test_verify_finds_an_exchanged_image(tmp_path: Path) -> None:
    folder = write_flowers(tmp_path)
    write_jpeg(folder / "test" / "rose" / "0000.jpg", 40, 30, seed=99)
    (problem,) = verify("flowers", tmp_path)
    assert problem.startswith(f"{folder / 'test'}: SHA-256")


def test_verify_decodes_each_jpeg_also_without_a_digest(tmp_path: Path) -> None:
    folder = write_flowers(tmp_path)
    edit_manifest(folder, lambda m: [facts.pop("files_sha256") for facts in m["splits"].values()])
    path = folder / "train" / "tulip" / "0002.jpg"
    content = path.read_bytes()
    path.write_bytes(content[:200] + content[-2:])  # both markers, nothing between them that could be decoded
    (problem,) = verify("flowers", tmp_path)
    assert problem.startswith(f"{path} cannot be decoded")


def test_verify_finds_a_face_of_another_size(tmp_path: Path) -> None:
    folder = write_faces(tmp_path, 3)
    write_jpeg(folder / "train" / "00001.jpg", 32, 64, 0)
    assert verify("anime_faces", tmp_path) == [f"{folder / 'train' / '00001.jpg'}: 32 x 64 pixels, not 64 x 64"]


def test_verify_of_an_absent_set_names_its_folder(tmp_path: Path) -> None:
    assert verify("mnist", tmp_path) == [f"{tmp_path / 'mnist'}: there is no such set"]


def test_a_set_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    def interrupted() -> None:
        with new_set("mnist", tmp_path) as folder:
            (folder / "train.images.npy").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [*tmp_path.iterdir()] == []


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".mnist-abcdefgh"
    (left / "mnist").mkdir(parents=True)
    with new_set("mnist", tmp_path) as folder:
        assert not left.exists()
        with new_set("mnist", tmp_path):  # another writer at work
            pass
        assert folder.is_dir()


def test_the_quicker_of_two_writers_wins(tmp_path: Path) -> None:
    with new_set("mnist", tmp_path) as folder:
        (folder / "manifest.json").write_text("late")
        quick = write_mnist(tmp_path)
    assert load("mnist", "train", tmp_path).label == "official"
    assert [*tmp_path.iterdir()] == [quick]


def test_a_full_disk_and_an_unusable_folder_are_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot write .*mnist: No space left on device"), new_set("mnist", tmp_path):
        raise OSError(errno.ENOSPC, "No space left on device")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write"), new_set("mnist", tmp_path / "file"):
        pass


def test_a_folder_without_a_manifest_is_not_replaced_by_a_stand_in(tmp_path: Path) -> None:
    (tmp_path / "mnist").mkdir()
    for attempt in (lambda: load("mnist", "train", tmp_path), lambda: ensure("mnist", tmp_path)):
        with pytest.raises(UserError, match=r"no manifest\.json"):
            attempt()


def test_ensure_keeps_to_real_data_where_there_is_some(tmp_path: Path) -> None:
    write_mnist(tmp_path)
    assert ensure("mnist", tmp_path) is True
    assert not (tmp_path / "synthetic").exists()


def test_ensure_draws_a_stand_in_once_and_marks_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(synthetic.SIZES, "mnist", (20, 10))
    assert ensure("mnist", tmp_path) is False
    manifest = tmp_path / "synthetic" / "mnist" / "manifest.json"
    written = manifest.stat().st_mtime_ns
    assert ensure("mnist", tmp_path) is False
    assert manifest.stat().st_mtime_ns == written
    found = load("mnist", "train", tmp_path)
    assert (found.synthetic, found.label, len(found)) == (True, "synthetic", 20)
    assert [path.name for path in tmp_path.iterdir()] == ["synthetic"]
    write_mnist(tmp_path)  # real data arrive: from now on they are used
    assert load("mnist", "train", tmp_path).synthetic is False


def test_the_default_root_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETDYNO_DATA", "~/sets")
    assert prepared.default_root() == tmp_path / "sets"
    monkeypatch.setenv("NETDYNO_DATA", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert prepared.default_root() == tmp_path / "cache" / "netdyno" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert prepared.default_root() == tmp_path / ".cache" / "netdyno" / "data"


@pytest.mark.parametrize(
    ("name", "train", "test", "label"),
    [
        ("mnist", 60_000, 10_000, "official"),
        ("cifar10", 50_000, 10_000, "official"),
        ("cifar100", 50_000, 10_000, "re-split"),
        ("flowers", 800, 200, "own"),
        ("anime_faces", 5_500, 1_000, "own"),
    ],
)
def test_real_sets_load_and_verify(data_root: Path, name: str, train: int, test: int, label: str) -> None:
    splits = [load(name, split, data_root) for split in ("train", "test")]
    assert [len(split) for split in splits] == [train, test]
    assert {(split.label, split.synthetic) for split in splits} == {(label, False)}
    assert splits[0].sha256 != splits[1].sha256
    assert verify(name, data_root) == []


def test_real_cifar10_has_every_class_equally_often(data_root: Path) -> None:
    found = load("cifar10", "test", data_root)
    assert found.labels is not None
    assert np.bincount(found.labels).tolist() == [1000] * 10


def test_a_jpeg_with_padding_after_its_end_is_whole(tmp_path: Path) -> None:
    path = write_flowers(tmp_path) / "train" / "rose" / "0001.jpg"
    path.write_bytes(path.read_bytes() + bytes(16))
    assert len(load("flowers", "train", tmp_path)) == 15
    with Image.open(io.BytesIO(path.read_bytes())) as image:
        image.load()
