import gzip
import hashlib
import http.server
import io
import json
import re
import socket
import struct
import tarfile
import threading
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from netdyno.bench.data import fetch as module
from netdyno.bench.data import prepared
from netdyno.bench.data.fetch import fetch
from netdyno.bench.data.prepared import load, sha256_of, verify
from netdyno.bench.errors import UserError

RNG = np.random.default_rng(0)


def quiet(line: str) -> None:
    assert "\n" not in line


def md5(content: bytes) -> str:
    return hashlib.md5(content, usedforsecurity=False).hexdigest()


@pytest.fixture
def site(tmp_path: Path) -> Path:
    folder = tmp_path / "site"
    folder.mkdir()
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "root"


@pytest.fixture
def closed_port() -> str:
    """An address on this machine where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/"


def assert_nothing_left(root: Path) -> None:
    assert [path for path in root.iterdir() if path.name != "downloads"] == []


# --- MNIST ---


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    return gzip.compress(header + array.tobytes())


@pytest.fixture
def mnist(site: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A small MNIST in the original form, which torchvision and fetch take for the real one."""
    arrays = {
        split: (RNG.integers(0, 256, (count, 28, 28), np.uint8), RNG.integers(0, 10, count).astype(np.uint8))
        for split, count in (("train", 20), ("t10k", 10))
    }
    resources = []
    for split, (images, labels) in arrays.items():
        for file, array in ((f"{split}-images-idx3-ubyte.gz", images), (f"{split}-labels-idx1-ubyte.gz", labels)):
            (site / file).write_bytes(idx(array))
            resources.append((file, md5((site / file).read_bytes())))
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [site.as_uri() + "/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", resources)
    renamed = {"train": arrays["train"], "test": arrays["t10k"]}
    known = {s: (sha256_of(images), sha256_of(labels.astype(np.int64))) for s, (images, labels) in renamed.items()}
    monkeypatch.setattr(module, "MNIST_SHA256", known)
    return renamed


def test_mnist_is_converted(root: Path, mnist: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    lines: list[str] = []
    fetch("mnist", root, lines.append)
    for split, (images, labels) in mnist.items():
        found = load("mnist", split, root)
        assert found.label == "official"
        np.testing.assert_array_equal(found.images, images[..., None])
        np.testing.assert_array_equal(found.labels, labels)
    assert verify("mnist", root) == []
    assert [path.name for path in root.iterdir()] == ["mnist"]
    assert any("downloading" in line for line in lines)
    assert lines[-1] == f"mnist: ready in {root / 'mnist'}"


def test_a_set_that_is_there_is_left_alone(root: Path, mnist: object, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch("mnist", root, quiet)
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [])
    lines: list[str] = []
    fetch("mnist", root, lines.append)
    assert lines == [f"mnist: already in {root / 'mnist'}"]


def test_the_second_mirror_is_tried(
    root: Path, mnist: object, closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_port, *torchvision.datasets.MNIST.mirrors])
    fetch("mnist", root, quiet)
    assert len(load("mnist", "train", root)) == 20


def test_mnist_with_other_pixels_is_refused(root: Path, mnist: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MNIST_SHA256", {"train": ("0", "0"), "test": ("0", "0")})
    with pytest.raises(UserError, match="the train arrays are not those of the original files"):
        fetch("mnist", root, quiet)
    assert_nothing_left(root)


def test_known_hashes_are_those_of_the_real_files(data_root: Path) -> None:
    manifest = json.loads((data_root / "mnist" / "manifest.json").read_text())["splits"]
    found = {split: (facts["sha256"], facts["labels_sha256"]) for split, facts in manifest.items()}
    assert found == module.MNIST_SHA256


# --- CIFAR ---


def pack(target: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(target, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture(params=["cifar10", "cifar100"])
def cifar(request: pytest.FixtureRequest, site: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A small CIFAR in the authors' form: rows of one or two labels and 3,072 pixels, a plane a colour."""
    known = module.CIFAR[request.param]
    files, images, labels = {}, {}, {}
    for file in known.splits["train"] + known.splits["test"]:
        images[file] = RNG.integers(0, 256, (4, 3, 32, 32), np.uint8)
        numbers = RNG.integers(0, 10, (4, known.labels), np.uint8)
        labels[file] = numbers[:, -1]
        files[f"{known.folder}/{file}"] = np.hstack([numbers, images[file].reshape(4, -1)]).tobytes()
    archive = site / known.archive
    pack(archive, files)
    monkeypatch.setattr(module, "CIFAR_URL", site.as_uri() + "/")
    take(monkeypatch, request.param, archive)
    return {"name": request.param, "images": images, "labels": labels, "archive": archive}


def take(monkeypatch: pytest.MonkeyPatch, name: str, archive: Path) -> None:
    """Makes fetch take `archive` for the known one."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(module.CIFAR, name, replace(module.CIFAR[name], sha256=digest))


def test_cifar_is_converted(root: Path, cifar: dict[str, Any]) -> None:
    name = cifar["name"]
    fetch(name, root, quiet)
    for split, batches in module.CIFAR[name].splits.items():
        found = load(name, split, root)
        images = np.concatenate([cifar["images"][file] for file in batches]).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(found.images, images)
        np.testing.assert_array_equal(found.labels, np.concatenate([cifar["labels"][file] for file in batches]))
        assert found.label == "official"
    assert verify(name, root) == []
    assert [path.name for path in root.iterdir()] == [name]


@pytest.mark.parametrize("change", ["a file too few", "half a row"])
@pytest.mark.fault("a damaged or hostile archive")
def test_an_archive_with_other_files_is_refused(
    root: Path, cifar: dict[str, Any], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    known = module.CIFAR[cifar["name"]]
    rows = bytes(2 * (known.labels + 3072))
    files = {f"{known.folder}/{file}": rows for file in known.splits["train"] + known.splits["test"]}
    if change == "half a row":
        files[f"{known.folder}/{known.splits['test'][0]}"] = rows[:-7]
    else:
        files.popitem()
    pack(cifar["archive"], files)
    take(monkeypatch, cifar["name"], cifar["archive"])
    with pytest.raises(UserError, match=rf"{re.escape(known.archive)} does not hold what it should"):
        fetch(cifar["name"], root, quiet)
    assert_nothing_left(root)


@pytest.mark.fault("a damaged or hostile archive")
def test_a_changed_archive_is_refused_before_it_is_opened(root: Path, cifar: dict[str, Any]) -> None:
    cifar["archive"].write_bytes(cifar["archive"].read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match="is not the known archive: sha256") as caught:
        fetch(cifar["name"], root, quiet)
    assert cifar["archive"].name in str(caught.value)
    assert_nothing_left(root)


def test_an_archive_in_downloads_needs_no_network(
    root: Path, cifar: dict[str, Any], closed_port: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CIFAR_URL", closed_port)
    (root / "downloads").mkdir(parents=True)
    kept = root / "downloads" / cifar["archive"].name
    kept.write_bytes(cifar["archive"].read_bytes())
    fetch(cifar["name"], root, quiet)
    assert len(load(cifar["name"], "test", root)) == 4
    assert kept.is_file()


# --- flowers ---


def jpeg(width: int, height: int, seed: int, kind: str = "JPEG") -> bytes:
    content = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


@pytest.fixture
def flowers(site: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[bytes]]:
    """Ten photographs a class, one of them twice, and entries that try to leave their folder."""
    images = {
        label: [jpeg(40 + i, 30, 100 * n + i) for i in range(10)] for n, label in enumerate(module.FLOWERS_CLASSES)
    }
    files = {f"flower_photos/{label}/{i}.jpg": image for label, all_ in images.items() for i, image in enumerate(all_)}
    files["flower_photos/LICENSE.txt"] = b"CC-BY"
    files["flower_photos/roses/again.jpg"] = images["roses"][0]
    files["../../tulips/../../escaped.jpg"] = b"not wanted"
    files["/flower_photos/orchids/0.jpg"] = b"not wanted either"
    archive = site / "flower_photos.tgz"
    pack(archive, files)
    monkeypatch.setattr(module, "FLOWERS_URL", archive.as_uri())
    monkeypatch.setattr(module, "FLOWERS_SHA256", hashlib.sha256(archive.read_bytes()).hexdigest())
    return images


@pytest.mark.fault("a damaged or hostile archive")
def test_flowers_are_split_by_content(root: Path, flowers: dict[str, list[bytes]]) -> None:
    fetch("flowers", root, quiet)
    content = {}
    for split, count in (("train", 40), ("test", 10)):
        found = load("flowers", split, root)
        assert found.files is not None
        assert found.labels is not None
        assert (len(found), found.label) == (count, "own")
        assert np.bincount(found.labels).tolist() == [count // 5] * 5
        content[split] = {path.read_bytes(): label for path, label in zip(found.files, found.labels, strict=True)}
    assert not content["train"].keys() & content["test"].keys()
    expected = {image: number for number, images in enumerate(flowers.values()) for image in images}
    assert content["train"] | content["test"] == expected
    manifest = json.loads((root / "flowers" / "manifest.json").read_text())
    assert manifest["classes"] == ["daisy", "dandelion", "rose", "sunflower", "tulip"]
    assert manifest["source_sha256"] == module.FLOWERS_SHA256
    assert verify("flowers", root) == []
    assert not [*root.parent.rglob("escaped*")]


# --- faces ---


def pack_faces(root: Path, files: dict[str, bytes]) -> Path:
    archive = root / "downloads" / "anime_faces.zip"
    archive.parent.mkdir(parents=True)
    with zipfile.ZipFile(archive, "w") as target:
        for name, content in files.items():
            target.writestr(name, content)
    return archive


def test_faces_without_an_archive_say_where_to_get_it(root: Path) -> None:
    with pytest.raises(
        UserError, match=r"account.*kaggle\.com/datasets/splcher/animefacedataset.*anime_faces\.zip"
    ) as caught:
        fetch("anime_faces", root, quiet)
    assert str(root / "downloads" / "anime_faces.zip") in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.fault("a damaged or hostile archive")
def test_faces_are_kept_or_resized(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (module, prepared):
        monkeypatch.setattr(where, "HELD_OUT", 1)
    exact = jpeg(64, 64, 0)
    grey = io.BytesIO()
    Image.new("L", (64, 64), 90).save(grey, "JPEG")
    files = {
        "images/0.jpg": exact,
        "images/1.jpg": jpeg(90, 100, 1),
        "../../images/2.png": jpeg(64, 64, 2, "PNG"),
        "images/3.jpg": grey.getvalue(),
        "images/readme.txt": b"no image",
    }
    archive = pack_faces(root, files)
    fetch("anime_faces", root, quiet)
    faces = sorted((root / "anime_faces" / "train").iterdir())
    assert [path.name for path in faces] == [f"{i:05d}.jpg" for i in range(4)]
    for path in faces:
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (64, 64))
    assert faces[1].read_bytes() == exact  # '../../images/2.png' sorts before it
    assert len(load("anime_faces", "train", root)) == 3
    assert verify("anime_faces", root) == []
    manifest = json.loads((root / "anime_faces" / "manifest.json").read_text())
    assert manifest["source_sha256"] == hashlib.sha256(archive.read_bytes()).hexdigest()
    assert not [*root.parent.rglob("2.png")]


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    content = io.BytesIO()
    image.save(content, kind, **options)
    return content.getvalue()


GREY = Image.new("L", (64, 64), 90)


@pytest.mark.fault("a damaged or hostile image")
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"images/0.jpg": b"no image"}, r"'images/0\.jpg' in .* cannot be decoded"),
        ({"images/0.jpg": b""}, r"'images/0\.jpg' in .* cannot be decoded"),
        ({"images/0.png": encoded(GREY, "GIF")}, r"'images/0\.png' in .* cannot be decoded"),
        ({"images/0.png": encoded(Image.new("I;16", (64, 64), 40_000), "PNG")}, r"0\.png' in .* more than 8 bits"),
        (
            {"images/0.png": encoded(GREY, "PNG", save_all=True, append_images=[Image.new("L", (64, 64), 91)])},
            r"0\.png' in .* is animated",
        ),
        ({"images/0.jpg": jpeg(90, 90, 0)[:-400]}, r"'images/0\.jpg' in .* cannot be decoded"),
        ({"images/0.jpg": bytes(17 << 20)}, r"'images/0\.jpg' in .* larger than 16 MiB"),
        ({"images/0.jpg": jpeg(64, 64, 0)}, r"holds 1 images, but the last 1000 are held out"),
    ],
)
def test_bad_faces_are_named(root: Path, files: dict[str, bytes], message: str) -> None:
    pack_faces(root, files)
    with pytest.raises(UserError, match=message):
        fetch("anime_faces", root, quiet)
    assert_nothing_left(root)


def test_printers_colours_and_palettes_are_converted(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for where in (module, prepared):
        monkeypatch.setattr(where, "HELD_OUT", 1)
    red = Image.new("RGB", (64, 64), (200, 30, 30))
    pack_faces(
        root,
        {
            "0.jpg": encoded(red.convert("CMYK"), "JPEG"),
            "1.png": encoded(red.convert("P", palette=Image.Palette.ADAPTIVE), "PNG"),
            "2.png": encoded(red.convert("RGBA"), "PNG"),
        },
    )
    fetch("anime_faces", root, quiet)
    for path in (root / "anime_faces" / "train").iterdir():
        with Image.open(path) as image:
            assert np.abs(np.asarray(image).astype(int) - np.asarray(red)).max() < 12
    assert verify("anime_faces", root) == []


@pytest.mark.fault("a damaged or hostile archive")
def test_a_damaged_zip_is_named(root: Path) -> None:
    archive = pack_faces(root, {"images/0.jpg": jpeg(64, 64, 0)})
    for content in (b"", archive.read_bytes()[:-30], archive.read_bytes().replace(b"\xff\xd8", b"\xff\xd7", 1)):
        archive.write_bytes(content)
        with pytest.raises(UserError, match=r"anime_faces\.zip cannot be read as a zip archive"):
            fetch("anime_faces", root, quiet)
    assert_nothing_left(root)


# --- the network ---


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "flowers"])
def test_no_network_is_one_line_and_soon(
    root: Path, closed_port: str, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [closed_port])
    monkeypatch.setattr(module, "CIFAR_URL", closed_port)
    monkeypatch.setattr(module, "FLOWERS_URL", closed_port)
    begun = time.monotonic()
    with pytest.raises(UserError, match=r"cannot download .*refused.*check the network, or put it at ") as caught:
        fetch(name, root, quiet)
    assert time.monotonic() - begun < 10
    assert "\n" not in str(caught.value)
    assert str(root / "downloads") in str(caught.value)
    assert_nothing_left(root)


def test_a_host_that_never_answers_is_given_up(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(module, "FLOWERS_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/flower_photos.tgz")
        monkeypatch.setattr(module, "ANSWER_S", 0.3)
        monkeypatch.setattr(module, "STALL_S", 0.6)
        with pytest.raises(UserError, match="no answer within"):
            fetch("flowers", root, quiet)
        time.sleep(0.5)  # the thread that waits ends before its socket does


@pytest.fixture
def stalling_server() -> Iterator[str]:
    """Promises 1,000 bytes, sends 10 and hangs up; for /none it has nothing."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path == "/none":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b"0123456789")

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.mark.fault("a download that breaks off")
def test_a_broken_download_is_refused(root: Path, stalling_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FLOWERS_URL", f"{stalling_server}/flower_photos.tgz")
    with pytest.raises(UserError, match=r"flower_photos\.tgz.*10 bytes.*is not the known archive: sha256"):
        fetch("flowers", root, quiet)
    monkeypatch.setattr(module, "FLOWERS_URL", f"{stalling_server}/none")
    with pytest.raises(UserError, match="Not Found"):
        fetch("flowers", root, quiet)
    assert_nothing_left(root)


def test_an_unknown_set_lists_the_known_ones(root: Path) -> None:
    with pytest.raises(UserError, match="unknown data set 'cats'; known are mnist"):
        fetch("cats", root, quiet)


def test_a_full_disk_is_one_line(root: Path, mnist: object, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*mnist: No space left on device"):
        fetch("mnist", root, quiet)
    assert_nothing_left(root)
