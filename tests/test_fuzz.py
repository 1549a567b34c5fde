"""Whatever stands in a file or on the command line: a user's error that names it or an exit code, never a traceback."""

import copy
import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from faults import Tell, times
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up_fleet import T4, fleet, one
from PIL import Image
from test_cli import COMMAND_LINE
from test_prepared import write_flowers, write_mnist
from test_report import write

from netdyno.bench import ab, cli, collect, doctor, machine, regress, runner, schema, table, verdicts
from netdyno.bench import record as records
from netdyno.bench.data import fetch, prepared, synthetic, weights
from netdyno.bench.errors import UserError
from netdyno.bench.report import load

Check = Callable[..., None]

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just("x" * 3_000)
scalars |= st.sampled_from([10**400, -(10**30), 1e308, float("nan"), float("inf"), "../..", "\ud800", "2026-11-23"])
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner)
)


@pytest.fixture
def fuzz(record_property: Tell) -> Callable[..., None]:
    """Tries `check` with many values of `strategy`, the same ones each time, and says with how many."""

    def fuzz(check: Check, *strategies: st.SearchStrategy[Any], few: int = 100, many: int = 3_000) -> None:
        tried = 0

        @settings(
            max_examples=times(few, many),
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[*HealthCheck],
        )
        @given(st.tuples(*strategies))
        def every(values: tuple[Any, ...]) -> None:
            nonlocal tried
            tried += 1
            check(*values)

        try:
            every()
        finally:
            record_property("tried", tried)

    return fuzz


@st.composite
def changed(draw: st.DrawFn, value: Any) -> Any:
    """`value`, plain JSON, with up to three of its parts replaced, removed or renamed."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        parent, key = value, None
        while isinstance(parent, (dict, list)) and parent:
            key = draw(st.sampled_from(sorted(parent) if isinstance(parent, dict) else range(len(parent))))
            if not isinstance(parent[key], (dict, list)) or not parent[key] or draw(st.booleans()):
                break
            parent = parent[key]
        if key is None:
            continue
        match draw(st.sampled_from(["replace", "remove", "rename"])):
            case "replace":
                parent[key] = draw(anything)
            case "remove":
                del parent[key]
            case _ if isinstance(parent, dict):
                parent[draw(st.text(max_size=9))] = parent.pop(key)
    return value


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """`content` with some bytes changed, cut out, doubled, or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 12))
        data[start : start + length] = draw(st.binary(max_size=12))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.integers(0, 3)) == 0 else data)


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode("utf-8", "replace")


contents = st.binary(max_size=200) | anything.map(encoded) | changed(one()).map(encoded) | damaged(encoded(one()))


def user_errors_name(name: str, function: Callable[[], Any]) -> Any:
    """What `function` returns; None where it raised a UserError of one line that names `name`."""
    try:
        return function()
    except UserError as error:
        said = str(error)
    assert name in said
    assert "\n" not in said
    return None


@pytest.mark.fault("fuzzed records")
def test_records(fuzz: Any) -> None:
    def check(content: bytes) -> None:
        user_errors_name("some.json", lambda: records.parse(content, Path("some.json")))
        record = user_errors_name("some.json", lambda: schema.parse(content, "some.json"))
        if record is not None:
            for form in (table.to_markdown, table.to_csv, table.to_json):
                assert form([record, one()])

    fuzz(check, contents)


@pytest.mark.fault("fuzzed records")
def test_records_that_are_compared(fuzz: Any) -> None:
    def check(old: dict[str, Any], new: dict[str, Any]) -> None:
        def parse(made: Any) -> Any:
            return user_errors_name("some.json", lambda: records.parse(encoded(made), Path("some.json")))

        first, second = parse(old), parse(new)
        if first and second:
            user_errors_name("record", lambda: verdicts.to_text(regress.compare([first], [second, one()])))

    fuzz(check, changed(one()), changed(one()), few=60)


@pytest.mark.slow
@pytest.mark.fault("fuzzed records")
def test_folders_of_records(fuzz: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from netdyno.bench.report import sections

    write([one()], tmp_path)
    bad = tmp_path / T4["slug"] / "dcgan" / "tuned-e2e-bad.json"
    bad.parent.mkdir(parents=True, exist_ok=True)

    def check(content: bytes) -> None:
        bad.write_bytes(content)
        found, problems = schema.read_all(tmp_path)
        assert len(found) + len(problems) == 2
        listed, problems = load.find([tmp_path])
        sections.page(listed, problems, None, None)
        assert bad.read_bytes() == content

    fuzz(check, contents, few=25, many=500)


@pytest.mark.fault("fuzzed manifests")
def test_manifests(fuzz: Any, tmp_path: Path) -> None:
    folders = {"mnist": write_mnist(tmp_path), "flowers": write_flowers(tmp_path)}
    whole = {name: (folder / "manifest.json").read_bytes() for name, folder in folders.items()}
    values = {name: json.loads(content) for name, content in whole.items()}

    def check(name: str, content: bytes) -> None:
        path = folders[name] / "manifest.json"
        path.write_bytes(content)
        user_errors_name(str(folders[name]), lambda: prepared.load(name, "train", tmp_path))
        assert all(str(folders[name]) in problem for problem in prepared.verify(name, tmp_path))

    cases = st.one_of(
        st.tuples(st.just(name), changed(values[name]).map(encoded) | damaged(whole[name]) | anything.map(encoded))
        for name in folders
    )
    fuzz(lambda case: check(*case), cases)


@pytest.mark.fault("a damaged or hostile array file, pickles among them")
def test_array_files(fuzz: Any, tmp_path: Path) -> None:
    path = write_mnist(tmp_path, train=1) / "train.labels.npy"
    whole = path.read_bytes()

    def check(content: bytes) -> None:
        path.write_bytes(content)
        user_errors_name(str(path), lambda: prepared.load("mnist", "train", tmp_path))

    header = st.builds(
        lambda shape, kind: (
            b"\x93NUMPY\x01\x00\x76\x00"
            + repr({"descr": kind, "fortran_order": False, "shape": shape}).encode().ljust(117)
            + b"\n"
        ),
        st.lists(st.integers(), max_size=3).map(tuple),
        st.sampled_from(["<i8", "|O", "|V9", "<U9", "x", "<f8"]),
    )
    fuzz(check, damaged(whole) | header)


@pytest.mark.fault("a damaged or hostile image")
def test_images(fuzz: Any, tmp_path: Path) -> None:
    whole = {}
    for kind in ("JPEG", "PNG"):
        content = io.BytesIO()
        Image.effect_noise((24, 16), 60).convert("RGB").save(content, kind)
        whole[kind] = content.getvalue()
    path = tmp_path / "some.jpg"

    def check(content: bytes) -> None:
        path.write_bytes(content)
        if user_errors_name("some.jpg", lambda: prepared.read_jpeg(path)) is None:
            assert user_errors_name("some.jpg", lambda: prepared.check_decodes(path)) is None  # one rule
        else:
            user_errors_name("some.jpg", lambda: prepared.check_decodes(path))
        user_errors_name("some.jpg", lambda: fetch._as_face(content, "some.jpg"))

    fuzz(check, damaged(whole["JPEG"]) | damaged(whole["PNG"]))


@pytest.mark.fault("a damaged or hostile archive")
def test_archives(fuzz: Any, tmp_path: Path) -> None:
    results = tmp_path / "results"
    write(list(fleet(1, ((T4, 1.0),)))[:2], results)
    packed = collect.pack(results, T4["slug"], tmp_path / "whole.zip").file.read_bytes()
    faces = io.BytesIO()
    with zipfile.ZipFile(faces, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("0.jpg", b"no image")
    path, downloads = tmp_path / "some.zip", tmp_path / "root" / "downloads"
    downloads.mkdir(parents=True)

    def check(pack: bytes, zipped: bytes) -> None:
        path.write_bytes(pack)
        user_errors_name("some.zip", lambda: collect.merge([path], tmp_path / "merged"))
        (downloads / fetch.FACES_ARCHIVE).write_bytes(zipped)
        user_errors_name("anime_faces", lambda: fetch.fetch("anime_faces", tmp_path / "root", lambda line: None))
        assert [entry.name for entry in (tmp_path / "root").iterdir()] == ["downloads"]

    fuzz(check, damaged(packed), damaged(faces.getvalue()))


@pytest.mark.fault("fuzzed price tables")
def test_price_tables(fuzz: Any, tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    cells = st.sampled_from(
        ["machine", "usd_per_hour", "0.35", "-1", "nan", "1e999", '"', ",", "\n", "\r", "\0", "NVIDIA L4"]
    )
    tables = st.lists(cells, max_size=30).map(lambda words: ",".join(words).encode())
    headed = tables.map(lambda rest: b"machine,usd_per_hour\n" + rest)

    def check(content: bytes) -> None:
        path.write_bytes(content)
        prices = user_errors_name("some.csv", lambda: load.read_prices(path))
        assert prices is None or all(price > 0 for price in prices.usd_per_hour.values())

    fuzz(check, st.binary(max_size=60) | tables | headed | damaged(b"machine,usd_per_hour,source\nNVIDIA L4,0.7,web\n"))


# command lines

VALUES = ["mnist-cnn", "resnet50", "", "0", "-1", "1e9", "nan", "é", "\udcff", "x" * 300, "results", "nowhere", "file"]
VALUES += ["file/below", "..", "--", "-", "--help", "HEAD", "quick", "tuned", "e2e", "md", "csv", "some.json", "mnist"]


@pytest.fixture
def playground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with some results, in which nothing trains, measures or asks the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(synthetic, "SIZES", {name: (40, 10) for name in prepared.FORMS} | {"anime_faces": (1_010, 0)})
    monkeypatch.setattr(prepared, "ensure", lambda name, root: True)
    monkeypatch.setattr(cli, "announce_data", lambda names, root: {})
    here = {"slug": "some-machine", "gpu": None, "cpu": "some", "cores": 2, "memory_gib": 4, "versions": {}}
    monkeypatch.setattr(machine, "describe", lambda: here)
    monkeypatch.setattr(runner, "run", lambda case, **call: one() | {"machine": here})
    monkeypatch.setattr(doctor, "CHECKS", ())
    for module, name in ((fetch, "fetch"), (weights, "fetch"), (ab, "checkout")):
        monkeypatch.setattr(module, name, refuse)
    write(list(fleet(1, ((T4, 1.0),)))[:3], tmp_path / "results")
    (tmp_path / "file").write_text("some text")
    (tmp_path / "some.json").write_text("{}")


def refuse(*_: Any) -> None:
    raise UserError("not here")


@pytest.mark.slow
@pytest.mark.fault("fuzzed command lines")
def test_command_lines(
    fuzz: Any, playground: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [line.split() for line in COMMAND_LINE.strip().splitlines()]

    @st.composite
    def arguments(draw: st.DrawFn) -> list[str]:
        words = draw(st.sampled_from(lines))
        named = [word for word in words if word.islower() and word[0] != "-"]
        options = [word for word in words if word[0] == "-"] + ["--nonsense"]
        rest = draw(st.lists(st.sampled_from(options) | st.sampled_from(VALUES) | st.text(max_size=9), max_size=6))
        return [word for word in (*named, *rest) if "\0" not in word]

    def check(words: list[str]) -> None:
        monkeypatch.setattr("sys.argv", ["netdyno", *words])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        assert ended.value.code in (None, 0, 1, 2, 3)
        assert "Traceback" not in out + err

    fuzz(check, arguments(), few=150, many=2_000)
