"""Packs: what goes in comes out, and nothing that is not a record of the right place gets in."""

import hashlib
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from made_up_fleet import GPU, T4, fleet, one, webp, write
from PIL import Image

from netdyno.bench import collect
from netdyno.bench.errors import UserError
from netdyno.bench.record import path_of, save_ceilings, save_machine

CEILINGS = {
    "measured_utc": "2026-11-24T12:00:00Z",
    "torch": "2.11.0",
    "matmul_fp16_tflops": 24.0,
    "matmul_sm_clock_mhz": 900.0,
    "copy_gb_per_s": 240.0,
}
Made = dict[str, Any]


def contents(made: Made) -> dict[str, bytes]:
    """The files that a pack of one record holds."""
    name = path_of(made, Path()).as_posix()
    files = {name: json.dumps(made).encode(), f"{made['machine']['slug']}/machine.json": json.dumps(T4).encode()}
    for listed in made["accuracy"].get("pictures", []):
        files[f"{Path(name).parent}/{listed['file']}"] = webp(90 * listed["epoch"])
    return files


def packed(files: dict[str, bytes], path: Path, **options: Any) -> Path:
    with zipfile.ZipFile(path, "w", **options) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_what_is_packed_is_what_is_merged(tmp_path: Path) -> None:
    results = write(fleet(1), tmp_path / "results")
    (results / T4["slug"] / "machine.json").write_text(json.dumps(T4))
    (results / T4["slug"] / "dcgan" / "x.trace.json.gz").write_bytes(b"not for others")
    made = collect.pack(results, T4["slug"], tmp_path / "t4.zip")
    assert (made.records, made.pictures, made.left_out) == (12, 2, ())
    ours = below(results)
    wanted = {name: ours[name] for name in ours if name.startswith(T4["slug"]) and not name.endswith(".gz")}
    (merged,) = collect.merge([made.file], tmp_path / "other")
    assert (merged.machines, merged.added, merged.known) == ((T4["slug"],), 12, 0)
    assert below(tmp_path / "other") == wanted
    (merged,) = collect.merge([made.file], tmp_path / "other")
    assert (merged.added, merged.known) == (0, 12)
    assert made.file.read_bytes() == collect.pack(results, T4["slug"], tmp_path / "again.zip").file.read_bytes()


def test_pack_asks_which_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = write(fleet(1), tmp_path / "results")
    with pytest.raises(UserError, match=rf"--machine: .*{T4['slug']}"):
        collect.pack(results)
    with pytest.raises(UserError, match=r"no record in .*nobody"):
        collect.pack(results, "nobody")
    with pytest.raises(UserError, match="no machine's name"):
        collect.pack(results, "../results")
    with pytest.raises(UserError, match="no record in"):
        collect.pack(tmp_path / "empty")
    monkeypatch.chdir(tmp_path)
    single = write([one()], tmp_path / "single")
    assert collect.pack(single).file == Path(f"{T4['slug']}.netdyno.zip")


def test_pack_leaves_out_pictures_that_are_not_the_records(tmp_path: Path) -> None:
    made = one()
    results = write([made], tmp_path / "results")
    first, second = (path_of(made, results).with_name(listed["file"]) for listed in made["accuracy"]["pictures"])
    first.unlink()
    second.write_bytes(b"changed")
    left_out = collect.pack(results, out=tmp_path / "pack.zip").left_out
    assert left_out == (f"{first} is not there", f"{second} is changed")
    assert collect.merge([tmp_path / "pack.zip"], tmp_path / "other")[0].added == 1


def test_pack_refuses_what_merge_would_refuse(tmp_path: Path) -> None:
    results = write([one()], tmp_path / "results")
    (path,) = results.glob("*/dcgan/*.json")
    moved = path.rename(path.with_name("other.json"))
    with pytest.raises(UserError, match=f"{moved} lies in the wrong place"):
        collect.pack(results)
    moved.write_text("{}")
    with pytest.raises(UserError, match=f"{moved} is no record"):
        collect.pack(results)


def changed(**changes: Any) -> Callable[[dict[str, bytes]], None]:
    """Spoils the record of a pack."""

    def spoil(files: dict[str, bytes]) -> None:
        (name,) = (name for name in files if name.count("/") == 2 and name.endswith(".json"))
        made = json.loads(files.pop(name))
        for section in (made, *[part for part in made.values() if isinstance(part, dict)]):
            section |= {key: value for key, value in changes.items() if key in section}
        files[name] = json.dumps(made).encode()

    return spoil


def named(name: str, content: bytes = b"{}") -> Callable[[dict[str, bytes]], None]:
    return lambda files: files.__setitem__(name, content)


def animated() -> bytes:
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (0, 200)]
    out = io.BytesIO()
    frames[0].save(out, "WEBP", save_all=True, append_images=frames[1:])
    return out.getvalue()


def repicture(content: bytes) -> Callable[[dict[str, bytes]], None]:
    """Another picture, which the record lists rightly."""

    def spoil(files: dict[str, bytes]) -> None:
        picture = next(name for name in files if name.endswith(".1.webp"))
        files[picture] = content
        listed = {"epoch": 1, "file": picture.split("/")[-1], "sha256": hashlib.sha256(content).hexdigest()}
        made = one()
        others = made["accuracy"]["pictures"][1:]
        changed(accuracy=made["accuracy"] | {"pictures": [listed, *others]})(files)

    return spoil


HOSTILE: dict[str, tuple[Callable[[dict[str, bytes]], None], str]] = {
    "climbs out": (named("../evil.json"), "has no place"),
    "climbs out inside": (named("a/../../evil.json"), "has no place"),
    "absolute": (named("/etc/evil.json"), "has no place"),
    "backslashes": (named("a\\..\\evil.json"), "has no place"),
    "a drive": (named("C:/a/b.json"), "has no place"),
    "hidden": (named(".ssh/a/b.json"), "has no place"),
    "a program": (named(f"{T4['slug']}/dcgan/run.sh"), "has no place"),
    "a page": (named(f"{T4['slug']}/dcgan/x.html"), "has no place"),
    "a folder": (named(f"{T4['slug']}/dcgan/", b""), "has no place"),
    "too long a name": (named(f"{'a' * 101}/dcgan/x.json"), "has no place"),
    "another place": (named(f"{T4['slug']}/mnist-cnn/a-b-c.json", json.dumps(one()).encode()), "wrong place"),
    "another machine": (changed(slug="other"), "wrong place"),
    "a slug that climbs": (changed(slug="../other"), "slug is no name"),
    "a workload that climbs": (changed(workload="../../x"), "workload is no name"),
    "an unlisted picture": (named(f"{T4['slug']}/dcgan/x.7.webp", webp(1)), "no record in it lists"),
    "a changed picture": (named(f"{T4['slug']}/dcgan/{one()['id']}.1.webp", webp(2)), "SHA-256 differs"),
    "no picture": (repicture(b"<svg onload=alert(1)>"), "is no WebP picture"),
    "a broken picture": (repicture(webp(5)[:40]), "is no WebP picture"),
    "an animation": (repicture(animated()), "animated"),
    "markup as machine.json": (named(f"{T4['slug']}/machine.json", b"<script>"), "not readable JSON"),
    "machine.json of another": (named(f"{T4['slug']}/machine.json", json.dumps(GPU).encode()), "another machine"),
    "machine.json without form": (named(f"{T4['slug']}/machine.json", b'{"slug": 1}'), "slug is no name"),
    "an unknown status": (changed(status="<b>ok</b>"), "status is none of"),
    "a negative speed": (changed(images_per_s=-1.0), "images_per_s is negative"),
    "an endless speed": (changed(images_per_s=float("inf")), "no number of JSON"),
    "a huge number": (changed(train_s=10**400), "beyond any measurement"),
    "a text for a number": (changed(final="99"), "final is no number"),
    "another schema": (changed(schema=2), "has schema 2"),
    "a long text": (changed(reason="x" * 2_000), "longer than"),
    "a large record": (named(f"{T4['slug']}/dcgan/x.json", b" " * 300_000), "larger than it may be"),
    "deep nesting": (named(f"{T4['slug']}/dcgan/x.json", b"[" * 60_000), "not readable JSON"),
}


@pytest.mark.fault("a pack from elsewhere that is damaged or hostile")
@pytest.mark.parametrize("name", HOSTILE)
def test_merge_refuses_and_writes_nothing(name: str, tmp_path: Path) -> None:
    spoil, message = HOSTILE[name]
    files = contents(one())
    spoil(files)
    bad = packed(files, tmp_path / "bad.zip")
    good = packed(
        contents(one(id="20261124T000000Z-000001", accuracy=one()["accuracy"] | {"pictures": []})), tmp_path / "a.zip"
    )
    with pytest.raises(UserError, match=message) as refused:
        collect.merge([good, bad], tmp_path / "deep" / "results")
    assert str(bad) in str(refused.value)
    assert not (tmp_path / "deep").exists()


def test_merge_refuses_what_is_no_zip(tmp_path: Path) -> None:
    path = packed(contents(one()), tmp_path / "pack.zip", compression=zipfile.ZIP_DEFLATED)
    whole = path.read_bytes()
    for content in (b"", b"PK", b"<html>", whole[:-30], whole[:200] + b"\xff" * 40 + whole[240:]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=str(path)):
            collect.merge([path], tmp_path / "results")
    with pytest.raises(UserError, match="cannot be read"):
        collect.merge([tmp_path / "nowhere.zip"], tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_merge_refuses_bombs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = contents(one())
    other = packed(files, tmp_path / "bzip2.zip", compression=zipfile.ZIP_BZIP2)
    with pytest.raises(UserError, match="packed in a way"):
        collect.merge([other], tmp_path / "results")
    path = packed(files, tmp_path / "pack.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr(next(iter(files)), b"{}")
    with pytest.raises(UserError, match="stands twice"):
        collect.merge([path], tmp_path / "results")
    path = packed(files, tmp_path / "pack.zip")
    for limit, message in ((10, "larger than a pack"), (len(path.read_bytes()), "unpacked")):
        monkeypatch.setattr(collect, "LARGEST_PACK", limit)
        if message == "unpacked":
            path = packed(files, path, compression=zipfile.ZIP_DEFLATED)
            monkeypatch.setattr(collect, "LARGEST_PACK", path.stat().st_size)
        with pytest.raises(UserError, match=message):
            collect.merge([path], tmp_path / "results")
    monkeypatch.undo()
    monkeypatch.setattr(collect, "MOST_FILES", 2)
    with pytest.raises(UserError, match="more than 2 files"):
        collect.merge([path], tmp_path / "results")


def test_merge_replaces_nothing(tmp_path: Path) -> None:
    results = write([one()], tmp_path / "results")
    before = below(results)
    path = packed(contents(one(code="other")), tmp_path / "pack.zip")
    with pytest.raises(UserError, match="is there already"):
        collect.merge([path], results)
    first = packed(contents(one()), tmp_path / "first.zip")
    with pytest.raises(UserError, match="in another pack"):
        collect.merge([first, path], tmp_path / "fresh")
    assert below(results) == before
    assert not (tmp_path / "fresh").exists()


def test_merge_knows_two_machines_of_one_name(tmp_path: Path) -> None:
    results = tmp_path / "results"
    ours = results / T4["slug"] / "machine.json"
    ours.parent.mkdir(parents=True)
    ours.write_text(json.dumps(T4 | {"ceiling": 1}, indent=1))
    path = packed(contents(one()), tmp_path / "pack.zip")
    assert collect.merge([path], results)[0].added == 1  # the same hardware, described with other words
    assert json.loads(ours.read_text())["ceiling"] == 1
    ours.write_text(json.dumps(T4 | {"cores": 64}))
    with pytest.raises(UserError, match=r"other hardware .*: cores"):
        collect.merge([path], results)


def described(folder: Path) -> Any:
    return json.loads((folder / T4["slug"] / "machine.json").read_text())


def test_ceilings_travel_and_are_not_replaced(tmp_path: Path) -> None:
    results, others = write([one()], tmp_path / "results"), tmp_path / "others"
    save_machine(T4, results)
    collect.merge([collect.pack(results, out=tmp_path / "before.zip").file], others)
    assert "ceilings" not in described(others)
    save_ceilings(CEILINGS, T4, results)
    collect.merge([collect.pack(results, out=tmp_path / "after.zip").file], others)
    assert described(others) == described(results)  # measured after the first pack was made
    save_ceilings(CEILINGS | {"copy_gb_per_s": 1.0}, T4, results)
    collect.merge([collect.pack(results, out=tmp_path / "again.zip").file], others)
    assert described(others)["ceilings"] == CEILINGS


def test_ceilings_are_checked_where_they_are_packed_and_merged(tmp_path: Path) -> None:
    results = write([one()], tmp_path / "results")
    path = save_ceilings(CEILINGS | {"copy_gb_per_s": 0}, T4, results)
    with pytest.raises(UserError, match=rf"{path}: machine\.ceilings\.copy_gb_per_s is not above zero"):
        collect.pack(results)
    files = contents(one()) | {f"{T4['slug']}/machine.json": path.read_bytes()}
    with pytest.raises(UserError, match=r"machine\.ceilings\.copy_gb_per_s is not above zero"):
        collect.merge([packed(files, tmp_path / "pack.zip")], tmp_path / "others")
    assert not (tmp_path / "others").exists()


def test_messages_hold_no_control_characters(tmp_path: Path) -> None:
    made = one()
    made["timing"]["\x1b[31mevil\n"] = float(10**17) * 100
    files = contents(one()) | {path_of(made, Path()).as_posix(): json.dumps(made).encode()}
    with pytest.raises(UserError) as refused:
        collect.merge([packed(files, tmp_path / "pack.zip")], tmp_path / "results")
    assert "evil" in str(refused.value)
    assert str(refused.value).isprintable()
