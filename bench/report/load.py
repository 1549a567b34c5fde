"""Reads what a report is made of: records, the pictures beside them, and the user's table of prices."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from ..record import Record, path_of
from ..schema import LARGEST_PICTURE, read

LARGEST_PRICES = 2**20
OTHER_FILES = {"machine.json", "baseline.json"}  # what else lies in a results folder


@dataclass(frozen=True, kw_only=True)
class Found:
    """A record and the file that it was read from."""

    record: Record
    file: Path

    @property
    def name(self) -> str:
        """`<machine>/<workload>/<file>`: what a record is called wherever it lies."""
        return path_of(self.record, Path()).as_posix()


def find(places: Sequence[Path]) -> tuple[list[Found], list[str]]:
    """All records in files and folders, each once, and a line on each file that is none.

    UserError where a place is missing or there is no record at all.
    """
    files: dict[Path, None] = {}
    for place in places:
        if place.is_dir():
            files |= dict.fromkeys(path for path in sorted(place.rglob("*.json")) if path.name not in OTHER_FILES)
        elif place.is_file():
            files[place] = None
        else:
            raise UserError(f"there are no results at {place}; make records with: netdyno run")
    found: dict[str, Found] = {}
    problems = []
    for file in files:
        try:
            one = Found(record=read(file), file=file)
        except UserError as error:
            problems.append(str(error))
            continue
        other = found.setdefault(one.name, one)
        if other.record != one.record:
            problems.append(f"{file} is not shown: {other.file} is another record of the same name")
    if not found:
        raise UserError("\n".join([f"no record in {', '.join(map(str, places))}", *problems]))
    return list(found.values()), problems


def picture(found: Found, name: str, sha256: str) -> bytes | str:
    """A picture from beside its record, or why it cannot be shown."""
    file = found.file.parent / name
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_PICTURE + 1)
    except OSError:
        return f"{name} is not beside its record"
    if len(content) > LARGEST_PICTURE:
        return f"{name} is larger than {LARGEST_PICTURE // 2**20} MiB"
    if hashlib.sha256(content).hexdigest() != sha256:
        return f"{name} is not the picture that its record names: the SHA-256 differs"
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        return f"{name} is no WebP picture"
    return content


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What an hour of each machine costs; `usd_per_hour` by the machine's slug or its GPU's name, in lower case."""

    source: str  # the file's name
    usd_per_hour: dict[str, float]

    def of(self, slug: str | None, gpu: str | None) -> float | None:
        for key in (slug, gpu):
            if key is not None and key.lower() in self.usd_per_hour:
                return self.usd_per_hour[key.lower()]
        return None


def read_prices(file: Path) -> Prices:
    """A CSV file with the columns `machine` (slug or GPU name) and `usd_per_hour`; others are left alone."""
    try:
        if file.stat().st_size > LARGEST_PRICES:
            raise UserError(f"{file} is larger than a table of prices may be ({LARGEST_PRICES:,} bytes)")
        text = file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is no UTF-8 text") from error
    try:
        reader = csv.DictReader(text.splitlines(), strict=True)
        missing = {"machine", "usd_per_hour"} - set(reader.fieldnames or [])
        if missing:
            raise UserError(f"{file} lacks the column {' and '.join(sorted(missing))}; it needs machine,usd_per_hour")
        prices: dict[str, float] = {}
        for line in reader:
            machine = (line["machine"] or "").strip().lower()
            price = _price(line["usd_per_hour"])
            if not machine or price is None:
                raise UserError(f"{file}, line {reader.line_num}: needs a machine and a price above 0, such as 0.35")
            if prices.setdefault(machine, price) != price:
                raise UserError(f"{file}, line {reader.line_num}: {machine} has two prices")
    except csv.Error as error:
        raise UserError(f"{file} is no CSV file: {error}") from error
    return Prices(source=file.name, usd_per_hour=prices)


def _price(text: str | None) -> float | None:
    try:
        price = float(text or "")
    except ValueError:
        return None
    return price if math.isfinite(price) and 0 < price <= 1e9 else None
