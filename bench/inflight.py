"""The case in flight: the mark that a run leaves while it measures, and what the next start makes of one left behind.

The mark is the record as it will have to be if this process never comes to write it: whole, `killed`, under a hidden
name beside its place. It is locked while its run lives. A mark without an owner only has to be renamed to be a record.
No torch in here.
"""

import fcntl
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import UserError
from .record import Record, compact, load, path_of, write_locked

MARK = ".running"
MARKED = re.compile(rf"\.(.+-(\d{{8}}T\d{{6}}Z-[0-9a-f]{{6}})\.json){re.escape(MARK)}")  # its record's name and id
HALF = re.compile(r"\..+\.[0-9a-f]{8}\.tmp")  # as `write_locked` names a file that has not got its own name yet
CUT_OFF = "the run ended before it could write this record"


@contextmanager
def in_flight(record: Record, results: Path) -> Iterator[Path]:
    """Marks a case as running; yields an empty temporary folder, which is removed at the end.

    The mark goes when the record is there. Raises UserError where it cannot be written, before anything is measured.
    """
    place = path_of(record, results)
    mark = place.with_name(f".{place.name}{MARK}")
    scratch = _scratch(record["id"])
    with write_locked(mark, compact(record | {"status": "killed", "reason": CUT_OFF})):
        try:
            scratch.mkdir(mode=0o700)
        except OSError as error:
            raise UserError(f"temporary folder {scratch} cannot be made: {error.strerror}") from error
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            if place.exists():
                mark.unlink()


def sweep(folder: Path) -> list[Record]:
    """Puts a machine's folder in order after runs that were cut off: their cases in flight get their records.

    Half-written files, pictures of a case without a record and temporary folders are removed. Whatever belongs to a
    process that lives is left alone. Returns the records that were made.
    """
    made = []
    for path in folder.rglob(".*"):
        half, marked = HALF.fullmatch(path.name), MARKED.fullmatch(path.name)
        if not half and not marked:
            continue
        with suppress(OSError), path.open("r+b") as file:  # gone, or not ours to touch
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # an OSError while its owner lives
            if marked:
                made += _settle(path, *marked.groups())
            else:
                path.unlink()
    return made


def _settle(mark: Path, name: str, identity: str) -> list[Record]:
    try:
        record = load(mark)
    except UserError:  # no mark of ours: they are whole or not there
        return []
    shutil.rmtree(_scratch(identity), ignore_errors=True)
    place = mark.with_name(name)
    if place.exists():  # cut off between the record and the end of its mark
        mark.unlink()
        return []
    for half in mark.parent.glob(f"{identity}.*"):  # written before their record, which would have listed them
        half.unlink()
    mark.rename(place)
    return [record]


def _scratch(identity: str) -> Path:
    """Its name tells whose it is, so that it can be found again, and is short: sockets come to lie in it."""
    return Path(tempfile.gettempdir()) / f"netdyno-{identity.rpartition('-')[2]}"
