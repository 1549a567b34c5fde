"""The prepared format: what a fetched, unpacked or drawn image set looks like on disk.

    <root>/<name>/manifest.json
    array sets     {train,test}.images.npy  uint8 [N, H, W, C]   {train,test}.labels.npy  int64 [N]
    folder sets    {train,test}/<class>/*.jpg, or, without labels, train/*.jpg

A stand-in lies in <root>/synthetic/<name>, never where a real set would. The manifest is written last and the
folder gets its name when it is complete, so a set is there whole or not at all.
"""

import fcntl
import hashlib
import io
import json
import os
import re
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, UnidentifiedImageError

from ..errors import UserError

CLASS = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. +-]{0,99}")  # what becomes part of a path
# What Pillow raises for images that are broken, or so large that decoding them would take all memory.
BROKEN: tuple[type[Exception], ...] = (
    *(OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, OverflowError, struct.error, zlib.error),
    *(Image.DecompressionBombError, Image.DecompressionBombWarning),
)
HELD_OUT = 1000  # images at the end of an unlabelled set's train/ that make its "test" split


@dataclass(frozen=True, kw_only=True)
class Form:
    """What every set of one name has in common, real or drawn."""

    kind: str  # "arrays" | "folders"
    shape: tuple[int, int, int] | None  # [H, W, C] of each image; None where sizes differ
    classes: int  # 0 without labels


FORMS = {
    "mnist": Form(kind="arrays", shape=(28, 28, 1), classes=10),
    "cifar10": Form(kind="arrays", shape=(32, 32, 3), classes=10),
    "cifar100": Form(kind="arrays", shape=(32, 32, 3), classes=100),
    "anime_faces": Form(kind="folders", shape=(64, 64, 3), classes=0),
    "flowers": Form(kind="folders", shape=None, classes=5),
}


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """One split of a prepared set. Exactly one of `images` and `files` is there."""

    name: str
    split: str  # "train" | "test"
    images: np.ndarray | None  # uint8 [N, H, W, C], memory-mapped, read-only
    files: tuple[Path, ...] | None  # JPEG files, sorted by class, then name
    labels: np.ndarray | None  # int64 [N]; None where the set has no labels
    classes: int  # 0 without labels
    synthetic: bool
    label: str  # which data an accuracy is for: "official", "re-split", "own" or "synthetic"
    sha256: str  # of the images' bytes, or of the names and bytes of the files

    def __len__(self) -> int:
        return len(self.images) if self.images is not None else len(self.files or ())


def default_root() -> Path:
    """$NETDYNO_DATA, else netdyno/data in the user's cache folder."""
    if named := os.environ.get("NETDYNO_DATA"):
        return Path(named).expanduser()
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "netdyno" / "data"


def locate(name: str, root: Path) -> Path | None:
    """The folder of a set: the real one, else its stand-in, else None.

    Raises:
        UserError: for an unknown name, and for a folder without a manifest, which nobody finished writing.
    """
    if name not in FORMS:
        raise UserError(f"unknown data set {name!r}; known are {', '.join(FORMS)}")
    for folder in (root / name, root / "synthetic" / name):
        if (folder / "manifest.json").is_file():
            return folder
        if folder.exists():
            raise UserError(
                f"{folder} has no manifest.json, so the set is not complete; remove the folder and try again"
            )
    return None


def read_manifest(folder: Path, name: str) -> dict[str, Any]:
    """The manifest in `folder`, its types and fixed facts checked against FORMS[name]; UserError where they differ."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    form = FORMS[name]

    def expect(condition: bool, what: str) -> None:
        if not condition:
            raise UserError(f"{path} is not a manifest of {name}: {what}")

    expect(isinstance(manifest, dict), "it is not an object")
    expect(manifest.get("name") == name, f"its name is {manifest.get('name')!r}")
    expect(manifest.get("kind") == form.kind, f"its kind is {manifest.get('kind')!r}, not {form.kind!r}")
    split = manifest.get("split")
    expect(isinstance(split, str) and len(split) <= 100 and split.isprintable(), "'split' is missing or no short text")
    splits = manifest.get("splits")
    required = {"train", "test"} if form.classes else {"train"}
    expect(isinstance(splits, dict) and set(splits) == required, f"its splits are not {sorted(required)}")
    for split, facts in splits.items():
        expect(isinstance(facts, dict), f"{split} is not an object")
        expect(type(facts.get("images")) is int and facts["images"] > 0, f"{split}.images is {facts.get('images')!r}")
        if form.kind == "arrays" and form.shape:
            expect(facts.get("shape") == [*form.shape], f"{split}.shape is {facts.get('shape')!r}")
            expect(facts.get("classes") == form.classes, f"{split}.classes is {facts.get('classes')!r}")
            for key in ("sha256", "labels_sha256"):
                expect(isinstance(facts.get(key), str), f"{split}.{key} is missing")
    if form.kind == "folders" and form.classes:
        classes = manifest.get("classes")
        plain = isinstance(classes, list) and all(isinstance(name, str) and CLASS.fullmatch(name) for name in classes)
        expect(plain and len(set(classes)) == form.classes, f"'classes' does not name {form.classes} folders")
    return manifest


def load(name: str, split: str, root: Path) -> ImageSet:
    """One split of a set below `root`, with every number of its manifest checked against the files.

    Sizes, shapes, types and label ranges are checked, and that each JPEG is whole; array hashes are left to `verify`.

    Raises:
        UserError: names the file or folder that is missing, truncated or not what the manifest says.
    """
    if split not in ("train", "test"):
        raise UserError(f"unknown split {split!r}; known are train, test")
    folder = locate(name, root)
    if folder is None:
        raise UserError(
            f"no {name} in {root}; get it with `netdyno data fetch {name}`, or point NETDYNO_DATA elsewhere"
        )
    manifest = read_manifest(folder, name)
    form = FORMS[name]
    images = files = labels = None
    if form.kind == "arrays":
        images, labels = _open_arrays(folder, split, form, manifest["splits"][split])
        sha256 = manifest["splits"][split]["sha256"]
    else:
        stored = split if split in manifest["splits"] else "train"
        files, labels = _list_files(folder, stored, manifest)
        if not form.classes:
            if len(files) <= HELD_OUT:
                raise UserError(f"{folder / stored}: {len(files)} images, but the last {HELD_OUT} alone are held out")
            files = files[-HELD_OUT:] if split == "test" else files[:-HELD_OUT]
        sha256 = _digest_files(files, folder)
    return ImageSet(
        name=name,
        split=split,
        images=images,
        files=files,
        labels=labels,
        classes=form.classes,
        synthetic=manifest.get("synthetic") is True,
        label=manifest["split"],
        sha256=sha256,
    )


def ensure(name: str, root: Path) -> bool:
    """True if the real set is below `root`; else draws the stand-in, unless it is there already, and returns False."""
    folder = locate(name, root)
    if folder == root / name:
        return True
    if folder is None:
        from .synthetic import make  # it imports this module

        make(name, root)
    return False


def verify(name: str, root: Path) -> list[str]:
    """Every problem of a set, each naming its file; an empty list says that the set is what its manifest promises.

    Arrays: SHA-256 of images and labels. Folders: each JPEG is decoded, and names and bytes are compared with
    `files_sha256` where the manifest has it.
    """
    try:
        folder = locate(name, root)
        if folder is None:
            return [f"{root / name}: there is no such set"]
        manifest = read_manifest(folder, name)
    except UserError as error:
        return [str(error)]
    problems = []
    for split, facts in manifest["splits"].items():
        try:
            if FORMS[name].kind == "arrays":
                problems += _verify_arrays(folder, split, FORMS[name], facts)
            else:
                problems += _verify_files(folder, split, FORMS[name], manifest)
        except UserError as error:
            problems.append(str(error))
    return problems


@contextmanager
def new_set(name: str, parent: Path) -> Iterator[Path]:
    """An empty folder to build a set in. It becomes parent/name when the block ends well, and vanishes otherwise.

    The folder above it is temporary too and may hold downloads.

    Raises:
        UserError: when the disk is full or the folder cannot be written.
    """
    target = parent / name
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _temporary(parent, f".{name}-") as temporary:
            folder = temporary / name
            folder.mkdir()
            yield folder
            try:
                folder.rename(target)
            except OSError:
                if not (target / "manifest.json").is_file():  # else another process has just finished the same set
                    raise
    except OSError as error:
        raise UserError(f"cannot write {target}: {error.strerror or error}") from error


@contextmanager
def _temporary(parent: Path, prefix: str) -> Iterator[Path]:
    """A temporary folder, locked while it is in use; those that processes left when they were killed are removed."""
    for left in parent.glob(f"{prefix}*"):
        with suppress(OSError), _open(left) as descriptor:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(left, ignore_errors=True)
    while True:
        with (
            tempfile.TemporaryDirectory(dir=parent, prefix=prefix, ignore_cleanup_errors=True) as name,
            ExitStack() as held,
        ):
            folder = Path(name)
            with suppress(OSError):  # a file system without locks: there nothing is taken for left over
                fcntl.flock(held.enter_context(_open(folder)), fcntl.LOCK_EX)
            if folder.exists():  # else it was removed in the moment before it had its lock
                yield folder
                return


@contextmanager
def _open(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def write_arrays(folder: Path, name: str, arrays: Mapping[str, tuple[np.ndarray, np.ndarray]], **facts: object) -> None:
    """Writes an array set: `arrays` maps a split to images, uint8 [N, H, W, C], and labels, int64 [N].

    `facts` go into the manifest as they are; `split` and `note` belong there.
    """
    splits = {}
    for split, (images, labels) in arrays.items():
        np.save(folder / f"{split}.images.npy", images)
        np.save(folder / f"{split}.labels.npy", labels)
        splits[split] = {
            "images": len(images),
            "shape": [*images.shape[1:]],
            "classes": FORMS[name].classes,
            "sha256": sha256_of(images),
            "labels_sha256": sha256_of(labels),
        }
    _write_manifest(folder, {"name": name, "kind": "arrays", **facts, "splits": splits})


def write_folders(folder: Path, name: str, classes: Sequence[str], **facts: object) -> None:
    """Writes the manifest over the JPEG files that already lie in `folder`; `classes` is empty without labels."""
    splits = {}
    for split in ("train", "test") if classes else ("train",):
        files = _sorted_jpegs(folder / split, classes)
        splits[split] = {"images": len(files), "files_sha256": _digest_files(files, folder)}
    named = {"classes": [*classes]} if classes else {}
    _write_manifest(folder, {"name": name, "kind": "folders", **facts, **named, "splits": splits})


def sha256_of(array: np.ndarray) -> str:
    """SHA-256 of the array's bytes in C order, without a header."""
    return hashlib.sha256(np.ascontiguousarray(array).data).hexdigest()


def _write_manifest(folder: Path, manifest: Mapping[str, object]) -> None:
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _open_array(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    try:
        array = np.lib.format.open_memmap(path, mode="r")  # reads .npy only, and never a pickle
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing") from error
    except Exception as error:  # NumPy raises many kinds for a damaged header
        raise UserError(f"{path} is truncated or not a .npy file: {error}") from error
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        order = "" if array.flags.c_contiguous else " in Fortran order"
        expected = f"{np.dtype(dtype)} {[*shape]}"
        raise UserError(f"{path} holds {array.dtype} {[*array.shape]}{order}; its manifest says {expected}")
    surplus = path.stat().st_size - array.offset - array.nbytes
    if surplus:
        raise UserError(f"{path} has {surplus} bytes after its array")
    return array


def _open_arrays(folder: Path, split: str, form: Form, facts: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    count = facts["images"]
    images = _open_array(folder / f"{split}.images.npy", np.uint8, (count, *facts["shape"]))
    path = folder / f"{split}.labels.npy"
    labels = np.array(_open_array(path, np.int64, (count,)))
    if labels.min() < 0 or labels.max() >= form.classes:
        raise UserError(f"{path} has labels from {labels.min()} to {labels.max()}; {form.classes} classes start at 0")
    return images, labels


def _sorted_jpegs(folder: Path, classes: Sequence[str]) -> tuple[Path, ...]:
    folders = [folder / name for name in classes] if classes else [folder]
    for each in folders:
        if not each.is_dir():
            raise UserError(f"{each} is missing")
    return tuple(path for each in folders for path in sorted(each.glob("*.jpg")))


def _list_files(folder: Path, split: str, manifest: Mapping[str, Any]) -> tuple[tuple[Path, ...], np.ndarray | None]:
    classes = manifest.get("classes", [])
    files = _sorted_jpegs(folder / split, classes)
    expected = manifest["splits"][split]["images"]
    if len(files) != expected:
        raise UserError(f"{folder / split} holds {len(files)} JPEG images; its manifest says {expected}")
    if not classes:
        return files, None
    number = {name: index for index, name in enumerate(classes)}
    return files, np.array([number[path.parent.name] for path in files], np.int64)


def read_jpeg(path: Path) -> bytes:
    """The content of a JPEG file; UserError naming it unless it is one that every decoder makes the same RGB image of.

    The one rule for sets, DALI and verification: whole, and in RGB or grey of 8 bits. Its pixels are not decoded here.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error
    # GPU decoders pass over a missing end. Some cameras append padding, so the end marker is looked for, not expected
    # in the last two bytes; a thumbnail in the header has one too, but in the first half.
    if not content.startswith(b"\xff\xd8") or content.find(b"\xff\xd9", len(content) // 2) < 0:
        raise UserError(f"{path} is truncated or not a JPEG image")
    with decoding(path), Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        if image.mode not in ("L", "RGB"):  # what decoders make of printers' colours differs
            raise UserError(f"{path} is a JPEG image in {image.mode}; convert it to RGB")
    return content


def check_decodes(path: Path) -> tuple[int, int]:
    """Width and height of a JPEG file that `read_jpeg` takes and that can be decoded; UserError naming it otherwise."""
    content = read_jpeg(path)
    with decoding(path), Image.open(io.BytesIO(content), formats=["JPEG"]) as image:
        image.load()
        return image.size


@contextmanager
def decoding(what: object) -> Iterator[None]:
    """Whatever Pillow says of a broken image becomes one line, with `what` in it."""
    try:
        yield
    except UnidentifiedImageError as error:  # its text names an object in memory
        raise UserError(f"{what} cannot be decoded: its beginning is damaged, or it is no image") from error
    except BROKEN as error:
        raise UserError(f"{what} cannot be decoded: {error}") from error


def _digest_files(files: Iterable[Path], base: Path) -> str:
    """SHA-256 over each file's name relative to `base` and the SHA-256 of its bytes; UserError for a broken JPEG."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.relative_to(base).as_posix().encode() + b"\0" + hashlib.sha256(read_jpeg(path)).digest())
    return digest.hexdigest()


def _verify_arrays(folder: Path, split: str, form: Form, facts: Mapping[str, Any]) -> list[str]:
    images, labels = _open_arrays(folder, split, form, facts)
    found = {"images": (sha256_of(images), facts["sha256"]), "labels": (sha256_of(labels), facts["labels_sha256"])}
    return [
        f"{folder / split}.{part}.npy: SHA-256 is {actual}; its manifest says {expected}"
        for part, (actual, expected) in found.items()
        if actual != expected
    ]


def _verify_files(folder: Path, split: str, form: Form, manifest: Mapping[str, Any]) -> list[str]:
    files, _ = _list_files(folder, split, manifest)
    problems = []
    for path in files:
        try:
            width, height = check_decodes(path)
        except UserError as error:
            problems.append(str(error))
            continue
        if form.shape and (height, width) != form.shape[:2]:
            problems.append(f"{path}: {width} x {height} pixels, not {form.shape[1]} x {form.shape[0]}")
    expected = manifest["splits"][split].get("files_sha256")
    if expected and not problems and (actual := _digest_files(files, folder)) != expected:
        problems.append(f"{folder / split}: SHA-256 over names and bytes is {actual}; its manifest says {expected}")
    return problems
