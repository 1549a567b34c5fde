"""Records from one machine to another: `pack` makes one small file of a machine's records, `merge` adds such files.

A pack is a zip file that holds `<machine>/machine.json`, `<machine>/<workload>/<record>.json` and the pictures that the
records list. It comes from somebody else, so that nothing in it is believed: every name, size and value is checked
before the first file is written, every record must lie where its own content puts it, and nothing is ever replaced: a
machine that has no ceilings yet gets those of the pack, and keeps them.
No torch in here.
"""

import hashlib
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import UserError
from .record import Record, path_of, write_atomically
from .schema import LARGEST_PICTURE, LARGEST_RECORD, NAME, PICTURE, machine_problems, parse, parse_json, read
from .summary import at

LARGEST_PACK = 256 * 2**20  # bytes, as a file and unpacked
LARGEST_SIDE = 8_192  # pixels of a picture
MOST_FILES = 50_000
HARDWARE = ("gpu", "cpu", "cores", "memory_gib", "os")  # what two machines of one name must share
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every file in a pack: the same records make the same pack
FILE = r"[A-Za-z0-9][A-Za-z0-9._+-]{0,240}\.json"  # of a record; file systems take 255 letters
PLACES = re.compile(
    rf"{NAME.pattern}/machine\.json|{NAME.pattern}/{NAME.pattern}/{PICTURE.pattern}|{NAME.pattern}/{NAME.pattern}/{FILE}"
)


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack` wrote."""

    file: Path
    records: int
    pictures: int
    left_out: tuple[str, ...]  # pictures that are missing or are not what their record says


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What `merge` added from one pack."""

    pack: Path
    machines: tuple[str, ...]
    added: int  # records
    known: int  # records that were there already


# Packing


def pack(results: Path, machine: str | None = None, out: Path | None = None) -> Packed:
    """Packs the records of one machine; the only one where `machine` is None.

    `out` is `<machine>.netdyno.zip` unless given. UserError where the machine is not there or not the only one, a
    record or the machine.json is not valid, or `out` cannot be written.
    """
    machine = machine or _only_machine(results)
    if not NAME.fullmatch(machine):
        raise UserError(f"{machine!r} is no machine's name")
    files: dict[str, bytes] = {}
    left_out, records = [], 0
    folder = results / machine
    for path in sorted(folder.glob("*/*.json")):
        record = read(path)
        name = path_of(record, Path()).as_posix()
        if path.relative_to(results).as_posix() != name:
            raise UserError(f"{path} lies in the wrong place: its record belongs into {results / name}")
        files[name] = path.read_bytes()
        records += 1
        for listed in at(record, "accuracy", "pictures") or []:
            content = _bytes(path.with_name(listed["file"]))
            if content is None or hashlib.sha256(content).hexdigest() != listed["sha256"]:
                left_out.append(f"{path.with_name(listed['file'])} is {'not there' if content is None else 'changed'}")
            else:
                files[f"{machine}/{path.parent.name}/{listed['file']}"] = content
    if not records:
        raise UserError(f"there is no record in {folder}; make some with: netdyno run")
    described = _bytes(folder / "machine.json")
    if described is not None:
        _machine(described, f"{machine}/machine.json", str(folder / "machine.json"))
        files[f"{machine}/machine.json"] = described
    out = out or Path(f"{machine}.netdyno.zip")
    write_atomically(out, _zip(files))
    pictures = sum(name.endswith(".webp") for name in files)
    return Packed(file=out, records=records, pictures=pictures, left_out=tuple(left_out))


def _only_machine(results: Path) -> str:
    found = (path for path in results.glob("*/*/*.json") if path.name != "machine.json")  # results/local holds those
    machines = sorted({path.parent.parent.name for path in found})
    if not machines:
        raise UserError(f"there is no record in {results}; make some with: netdyno run")
    if len(machines) > 1:
        raise UserError(f"{results} holds several machines; choose one with --machine: {', '.join(machines)}")
    return machines[0]


def _bytes(path: Path) -> bytes | None:
    return path.read_bytes() if path.is_file() else None


def _zip(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, EPOCH), content, zipfile.ZIP_DEFLATED, compresslevel=9)
    return out.getvalue()


# Merging


def merge(packs: list[Path], results: Path) -> list[Merged]:
    """Adds the records of packs to a results folder, each under its machine.

    Everything in all packs is checked before anything is written. UserError, naming the pack and the file in it, where
    anything is not as it must be, or differs from what is there under the same name.
    """
    opened = [(path, _open(path)) for path in packs]
    seen: dict[str, bytes] = {}
    for path, files in opened:
        _check_against(results, files, path, seen)
        seen |= files
    merged = []
    for path, files in opened:
        new = {name: content for name, content in files.items() if not (results / name).exists()}
        new |= _with_ceilings(results, files)
        for name in sorted(new, key=lambda name: name.endswith(".json")):  # a record comes after its pictures
            write_atomically(results / name, new[name])
        records = [name for name in files if _is_record(name)]
        added = sum(name in new for name in records)
        machines = tuple(sorted({name.split("/")[0] for name in files}))
        merged.append(Merged(pack=path, machines=machines, added=added, known=len(records) - added))
    return merged


def _with_ceilings(results: Path, files: dict[str, bytes]) -> dict[str, bytes]:
    """The machines that are there without ceilings, with those of the pack: they may have been measured later."""
    found = {}
    for name, content in files.items():
        if name.endswith("/machine.json") and (there := _bytes(results / name)) is not None:
            ours, theirs = json.loads(there), json.loads(content)
            if not ours.get("ceilings") and theirs.get("ceilings"):
                described = ours | {"ceilings": theirs["ceilings"]}
                found[name] = json.dumps(described, indent=1).encode() + b"\n"
    return found


def _open(pack: Path) -> dict[str, bytes]:
    """The files of a pack by their name, each of them checked."""
    try:
        size = pack.stat().st_size
    except OSError as error:
        raise UserError(f"{pack} cannot be read: {error.strerror}") from error
    if size > LARGEST_PACK:
        raise UserError(f"{pack} is larger than a pack may be ({LARGEST_PACK // 2**20} MiB)")
    with _readable(pack), zipfile.ZipFile(pack) as archive:
        infos = archive.infolist()
        _check_names(infos, pack)
        files = {info.filename: _content(archive, info, pack) for info in infos}
    listed: dict[str, str] = {}
    for name, content in files.items():
        if _is_record(name):
            listed |= _pictures(_record(content, name, pack))
    for name, content in files.items():
        where = f"{pack}: {name}"
        if name.endswith("/machine.json"):
            _machine(content, name, where)
        elif not _is_record(name):
            if name not in listed:
                raise UserError(f"{where} is a picture that no record in it lists")
            if hashlib.sha256(content).hexdigest() != listed[name]:
                raise UserError(f"{where} is not the picture that its record lists: the SHA-256 differs")
            _check_picture(content, where)
    if not any(map(_is_record, files)):
        raise UserError(f"{pack} holds no record")
    return files


@contextmanager
def _readable(pack: Path) -> Iterator[None]:
    """Whatever a broken or hostile zip file makes the reader say becomes one line."""
    unreadable = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError)
    try:
        yield
    except unreadable as error:
        raise UserError(f"{pack} is no readable pack: {error}") from error


def _check_names(infos: list[zipfile.ZipInfo], pack: Path) -> None:
    """Only names that a pack has, each once, and no more bytes than a pack may have."""
    if len(infos) > MOST_FILES:
        raise UserError(f"{pack} holds more than {MOST_FILES:,} files")
    seen = set()
    for info in infos:
        name = info.filename
        if info.orig_filename != name or not PLACES.fullmatch(name):
            raise UserError(f"{pack}: {name!r} has no place in a results folder")
        if name.lower() in seen:
            raise UserError(f"{pack}: {name} stands twice in it")
        seen.add(name.lower())
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or info.flag_bits & 0x1:
            raise UserError(f"{pack}: {name} is encrypted or packed in a way that packs are not")
        if info.file_size > _largest(name):
            raise UserError(f"{pack}: {name} is larger than it may be ({_largest(name):,} bytes)")
    if sum(info.file_size for info in infos) > LARGEST_PACK:
        raise UserError(f"{pack} is larger, unpacked, than a pack may be ({LARGEST_PACK // 2**20} MiB)")


def _largest(name: str) -> int:
    return LARGEST_RECORD if name.endswith(".json") else LARGEST_PICTURE


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo, pack: Path) -> bytes:
    with archive.open(info) as file:
        content = file.read(_largest(info.filename) + 1)  # the size that the file claims may be a lie
    if len(content) != info.file_size:
        raise UserError(f"{pack}: {info.filename} has another size than the pack says")
    return content


def _is_record(name: str) -> bool:
    return name.endswith(".json") and name.count("/") == 2


def _record(content: bytes, name: str, pack: Path) -> Record:
    """A valid record that belongs where it lies."""
    record = parse(content, f"{pack}: {name}")
    if path_of(record, Path()).as_posix() != name:
        raise UserError(f"{pack}: {name} lies in the wrong place: its record belongs into {path_of(record, Path())}")
    return record


def _pictures(record: Record) -> dict[str, str]:
    """The SHA-256 of each picture that a record lists, by its name in a pack."""
    folder = path_of(record, Path()).parent.as_posix()
    listed = at(record, "accuracy", "pictures") or []
    return {f"{folder}/{one['file']}": one["sha256"] for one in listed}


def _machine(content: bytes, name: str, where: str) -> dict[str, Any]:
    machine = parse_json(content, where)
    for problem in machine_problems(machine):
        raise UserError(f"{where}: {problem}")
    if machine["slug"] != name.split("/")[0]:
        raise UserError(f"{where} describes another machine, {machine['slug']}")
    return machine


def _check_picture(content: bytes, where: str) -> None:
    """A single WebP picture of sane size that decodes."""
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(content), formats=["WEBP"]) as image:
            if max(image.size) > LARGEST_SIDE or getattr(image, "n_frames", 1) != 1:
                raise UserError(f"{where} is animated, or larger than {LARGEST_SIDE:,} pixels")
            image.load()
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where} is no WebP picture") from error


def _check_against(results: Path, files: dict[str, bytes], pack: Path, seen: dict[str, bytes]) -> None:
    """Nothing of another content may be there already, or in a pack before, nor another machine of the same name."""
    for name, content in files.items():
        there = seen.get(name) or _bytes(results / name)
        if there is None or there == content:
            continue
        if not name.endswith("/machine.json"):
            raise UserError(f"{pack}: {results / name} is there already, or in another pack, and is not the same")
        ours, theirs = _machine(there, name, str(results / name)), _machine(content, name, f"{pack}: {name}")
        differing = [key for key in HARDWARE if ours.get(key) != theirs.get(key)]
        if differing:
            raise UserError(f"{pack}: {name} describes other hardware than {results / name}: {', '.join(differing)}")
