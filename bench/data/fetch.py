"""Fetches image sets over the internet and converts them to the prepared format.

An archive that lies in <root>/downloads is used instead of being downloaded, so a machine without a network, or a set
that needs an account, is served by copying a file there. Every archive is checked before it is opened, and the names
inside it are never used as paths.

Sources:
    mnist              torchvision.datasets: its addresses, MD5 sums and reader
    cifar10, cifar100  the authors' binary archives: their Python ones hold pickles, which nothing here opens
    flowers            TensorFlow's flower_photos: 3,670 photographs under Creative Commons licences, 5 classes
    anime_faces        Kaggle, splcher/animefacedataset; needs an account
"""

import contextlib
import hashlib
import http.client
import io
import lzma
import queue
import shutil
import tarfile
import threading
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from .prepared import BROKEN, FORMS, HELD_OUT, decoding, locate, new_set, sha256_of, write_arrays, write_folders

Report = Callable[[str], None]

ANSWER_S = 10.0  # for an address to answer: name look-up, connection and redirections together
STALL_S = 20.0  # without a byte

MNIST_SHA256 = {  # of the arrays in the prepared format, made from the original files
    "train": (
        "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
        "e474323ac02fc156161b0bbb1f8c9cfeb327a74bcd9f9680a8385269a24f566c",
    ),
    "test": (
        "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
        "2fd8de6bdb8d11780b4b96dc57847bcfe6953f7c32aa48bfcd8237c3b7847243",
    ),
}

CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """The authors' binary archive of a CIFAR set: files of rows, each of label bytes and 3 × 32 × 32 pixels."""

    archive: str
    sha256: str  # as TensorFlow Datasets has it
    folder: str
    splits: dict[str, tuple[str, ...]]
    labels: int  # bytes of labels before the pixels of an image; the last is the one we take
    title: str


CIFAR = {
    "cifar10": Cifar(
        archive="cifar-10-binary.tar.gz",
        sha256="c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
        folder="cifar-10-batches-bin",
        splits={"train": tuple(f"data_batch_{n}.bin" for n in range(1, 6)), "test": ("test_batch.bin",)},
        labels=1,
        title="CIFAR-10",
    ),
    "cifar100": Cifar(
        archive="cifar-100-binary.tar.gz",
        sha256="58a81ae192c23a4be8b1804d68e518ed807d710a4eb253b1f2a199162a40d8ec",
        folder="cifar-100-binary",
        splits={"train": ("train.bin",), "test": ("test.bin",)},
        labels=2,  # coarse, fine
        title="CIFAR-100 with fine labels",
    ),
}

FLOWERS_URL = "https://storage.googleapis.com/download.tensorflow.org/example_images/flower_photos.tgz"
FLOWERS_SHA256 = "4c54ace7911aaffe13a365c34f650e71dd5bf1be0a58b464e5a7183e3e595d9c"  # TensorFlow Datasets, tf_flowers
FLOWERS_CLASSES = {  # folder in the archive → class
    "daisy": "daisy",
    "dandelion": "dandelion",
    "roses": "rose",
    "sunflowers": "sunflower",
    "tulips": "tulip",
}

FACES_PAGE = "https://www.kaggle.com/datasets/splcher/animefacedataset"
FACES_ARCHIVE = "anime_faces.zip"
BAD_ZIP: tuple[type[Exception], ...] = (  # what a damaged or hostile zip file makes its reader raise
    *(zipfile.BadZipFile, lzma.LZMAError, NotImplementedError, RuntimeError),
    *BROKEN,
)
FACES_ENTRY_MIB = 16  # more for one small face is not an image of this set


@dataclass(frozen=True, kw_only=True)
class _Job:
    name: str
    root: Path
    folder: Path  # the set that is being built
    scratch: Path
    report: Report


def fetch(name: str, root: Path, report: Report) -> None:
    """Downloads one set below `root` and converts it; a set that is there already is left alone.

    Args:
        report: called with one line for each thing worth telling: what is downloaded, how far it is, where it is.

    Raises:
        UserError: for an unknown name, no network, an account that is needed, an archive that is not the known one, no
            disk space. Nothing half done is left behind.
    """
    present = locate(name, root)
    if present == root / name:
        report(f"{name}: already in {present}")
        return
    with new_set(name, root) as folder:
        scratch = folder.parent / "scratch"  # in the same temporary folder as the set: gone when that is
        scratch.mkdir()
        {
            "mnist": _fetch_mnist,
            "cifar10": _fetch_cifar,
            "cifar100": _fetch_cifar,
            "flowers": _fetch_flowers,
            "anime_faces": _fetch_faces,
        }[name](_Job(name=name, root=root, folder=folder, scratch=scratch, report=report))
    report(f"{name}: ready in {root / name}")


def _fetch_mnist(job: _Job) -> None:
    from torchvision.datasets import MNIST  # imports torch: seconds that nobody else here should wait for

    raw = job.scratch / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for file, md5 in MNIST.resources:
        _obtain(job, raw / file, [mirror + file for mirror in MNIST.mirrors], "md5", md5)
    arrays = {}
    for split, known in MNIST_SHA256.items():
        source = MNIST(
            job.scratch, train=split == "train", download=True
        )  # finds the archives, checks and unpacks them
        images, labels = source.data.numpy()[..., None], source.targets.numpy().astype(np.int64)
        if (sha256_of(images), sha256_of(labels)) != known:
            raise UserError(f"mnist: the {split} arrays are not those of the original files (SHA-256 differs)")
        arrays[split] = images, labels
    write_arrays(job.folder, "mnist", arrays, split="official", note="The original MNIST files, bit-exact.")


def _fetch_cifar(job: _Job) -> None:
    cifar = CIFAR[job.name]
    archive = job.scratch / cifar.archive
    _obtain(job, archive, [CIFAR_URL + cifar.archive], "sha256", cifar.sha256)
    arrays = {}
    try:
        with tarfile.open(archive) as tar:
            for split, files in cifar.splits.items():
                members = [tar.extractfile(f"{cifar.folder}/{file}") for file in files]
                content = b"".join(member.read() for member in members if member)
                rows = np.frombuffer(content, np.uint8).reshape(-1, cifar.labels + 3 * 32 * 32)
                images = rows[:, cifar.labels :].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
                arrays[split] = np.ascontiguousarray(images), rows[:, cifar.labels - 1].astype(np.int64)
    except (tarfile.TarError, KeyError, ValueError) as error:
        raise UserError(f"{job.name}: {cifar.archive} does not hold what it should: {error}") from error
    note = f"{cifar.title}, official split and order, from the authors' binary archive (SHA-256 {cifar.sha256})."
    write_arrays(job.folder, job.name, arrays, split="official", note=note)


def _fetch_flowers(job: _Job) -> None:
    archive = job.scratch / "flower_photos.tgz"
    _obtain(job, archive, [FLOWERS_URL], "sha256", FLOWERS_SHA256)
    job.report("flowers: converting")
    files: dict[str, set[str]] = {label: set() for label in FLOWERS_CLASSES.values()}
    for split in ("train", "test"):
        for label in files:
            (job.folder / split / label).mkdir(parents=True)
    with tarfile.open(archive) as tar:
        for entry in tar:
            source = Path(entry.name)
            kind = FLOWERS_CLASSES.get(source.parent.name)
            data = tar.extractfile(entry) if source.suffix == ".jpg" else None
            if kind and data:
                # Called by its content: an image that occurs twice is there once, and no name is trusted.
                content = data.read()
                file = f"{hashlib.sha256(content).hexdigest()[:20]}.jpg"
                (job.folder / "train" / kind / file).write_bytes(content)
                files[kind].add(file)
    for label, found in files.items():
        for file in sorted(found)[: len(found) // 5]:
            (job.folder / "train" / label / file).rename(job.folder / "test" / label / file)
    note = (
        "TensorFlow's flower_photos, unchanged. The source has no split: in each class the fifth with the lowest "
        "SHA-256 is the test split, so accuracies do not compare with those on other flower sets."
    )
    facts = {"split": "own", "note": note, "source": FLOWERS_URL, "source_sha256": FLOWERS_SHA256}
    write_folders(job.folder, "flowers", [*FLOWERS_CLASSES.values()], **facts)


def _fetch_faces(job: _Job) -> None:
    archive = job.root / "downloads" / FACES_ARCHIVE
    if not archive.is_file():
        raise UserError(
            f"anime_faces: Kaggle gives this set only to people with an account: download the zip in a browser from "
            f"{FACES_PAGE}, put it at {archive} and fetch again"
        )
    job.report(f"anime_faces: converting {archive}")
    train = job.folder / "train"
    train.mkdir()
    with contextlib.ExitStack() as stack:
        with _readable(archive):
            source = stack.enter_context(zipfile.ZipFile(archive))
        endings = (".jpg", ".jpeg", ".png")
        entries = [entry for entry in source.infolist() if entry.filename.lower().endswith(endings)]
        for index, entry in enumerate(sorted(entries, key=lambda entry: entry.filename)):
            what = f"anime_faces: {entry.filename!r} in {archive}"
            if entry.file_size > FACES_ENTRY_MIB << 20:
                raise UserError(f"{what} is larger than {FACES_ENTRY_MIB} MiB")
            with _readable(archive):
                content = source.read(entry)
            (train / f"{index:05d}.jpg").write_bytes(_as_face(content, what))
    if len(entries) <= HELD_OUT:
        raise UserError(f"anime_faces: {archive} holds {len(entries)} images, but the last {HELD_OUT} are held out")
    note = (
        f"{len(entries):,} faces of 'Anime-Face-Dataset', from an archive that the user supplied. Those that were not "
        "64 x 64 JPEG were resized and saved as JPEG, quality 95. No checksum of the archive is published; the one "
        "here is what was seen."
    )
    facts = {"split": "own", "note": note, "source": FACES_PAGE, "source_sha256": _digest(archive, "sha256")}
    write_folders(job.folder, "anime_faces", [], **facts)


@contextlib.contextmanager
def _readable(archive: Path) -> Iterator[None]:
    try:
        yield
    except BAD_ZIP as error:
        raise UserError(f"anime_faces: {archive} cannot be read as a zip archive: {error}") from error


def _as_face(content: bytes, what: str) -> bytes:
    """A 64 x 64 RGB JPEG: `content` itself if it is one, else resized and encoded anew."""
    height, width = (FORMS["anime_faces"].shape or (0, 0, 0))[:2]
    with decoding(what), Image.open(io.BytesIO(content), formats=["JPEG", "PNG"]) as image:
        if getattr(image, "n_frames", 1) != 1:
            raise UserError(f"{what} is animated")
        image.load()
        if image.format == "JPEG" and image.mode == "RGB" and image.size == (width, height):
            return content
        if image.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255, and so make it white
            raise UserError(f"{what} has more than 8 bits a channel")
        face = image.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
    encoded = io.BytesIO()
    face.save(encoded, "JPEG", quality=95)
    return encoded.getvalue()


def _digest(path: Path, algorithm: str) -> str:
    digest = hashlib.new(algorithm, usedforsecurity=algorithm != "md5")
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _obtain(job: _Job, to: Path, urls: Sequence[str], algorithm: str, checksum: str) -> None:
    """Puts an archive at `to`, from <root>/downloads or the first of `urls` that has it, and checks it."""
    local = job.root / "downloads" / to.name
    failures = []
    if local.is_file():
        job.report(f"{job.name}: using {local}")
        shutil.copyfile(local, to)
    else:
        for url in urls:
            try:
                _download(url, to, job)
                break
            except urllib.error.URLError as error:
                failures.append(f"{url}: {error.reason}")
        else:
            why = "; ".join(failures)
            raise UserError(f"{job.name}: cannot download {to.name} ({why}); check the network, or put it at {local}")
    if (found := _digest(to, algorithm)) != checksum:
        which = local if local.is_file() else f"what was downloaded as {to.name}, {to.stat().st_size:,} bytes,"
        raise UserError(f"{job.name}: {which} is not the known archive: {algorithm} {found}, not {checksum}")


def _download(url: str, to: Path, job: _Job) -> None:
    """Writes what `url` holds to the file `to`, reporting every quarter of a large one; URLError when it cannot."""
    with _open(url) as response, to.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0)
        job.report(f"{job.name}: downloading {url}" + (f" ({size / 2**20:.1f} MiB)" if size else ""))
        done = told = 0
        while True:
            try:
                chunk = response.read(1 << 18)
            except (OSError, http.client.HTTPException) as error:
                raise urllib.error.URLError(f"broke off after {done:,} bytes: {error}") from error
            if not chunk:
                return
            file.write(chunk)
            done += len(chunk)
            if size > 1 << 24 and 4 * done // size > told:
                told = 4 * done // size
                job.report(f"{job.name}: {done / 2**20:.0f} of {size / 2**20:.0f} MiB")


def _open(url: str) -> Any:
    """The open response of `url`, or URLError after ANSWER_S.

    In a thread of its own, because neither name look-up nor a host with many silent addresses keeps to the timeout
    that urlopen is given.
    """
    answer: queue.Queue[Any] = queue.Queue()

    def attempt() -> None:
        request = urllib.request.Request(url, headers={"User-Agent": "netdyno"})
        try:
            answer.put(urllib.request.urlopen(request, timeout=STALL_S))  # addresses are constants here  # nosec B310
        except Exception as error:  # whatever it is belongs to the caller, who waits for it
            answer.put(error)

    threading.Thread(target=attempt, daemon=True).start()
    try:
        result = answer.get(timeout=ANSWER_S)
    except queue.Empty:
        raise urllib.error.URLError(f"no answer within {ANSWER_S:.0f} s") from None
    if isinstance(result, urllib.error.HTTPError):
        result.close()  # it is an open response too
    if isinstance(result, urllib.error.URLError):
        raise result
    if isinstance(result, Exception):
        raise urllib.error.URLError(str(result))
    return result
