"""The wheel holds `netdyno` and nothing else, and runs where the checkout is not; imports point one way."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("bench", "models", "kernels")
WITHOUT_TORCH = (
    *("stats", "table", "record", "schema", "collect", "fleet", "report.html", "report.markdown", "report.export"),
    *("layers", "roofline", "cards", "project", "projected", "scaling"),
)


def python(*arguments: str, cwd: Path, path: Path | None = None, timeout_s: float = 120) -> str:
    """Standard output of a Python process in `cwd`, with `path` first on its sys.path; fails with what it printed."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=timeout_s
    )
    assert done.returncode == 0, f"{arguments}: exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def modules(folder: str) -> list[Path]:
    return [path for path in sorted((ROOT / folder).rglob("*.py")) if "__pycache__" not in path.parts]


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources: building in the checkout would leave, and reuse, its build folder."""
    source = tmp_path_factory.mktemp("source")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    out = tmp_path_factory.mktemp("wheel")
    pip = ("-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    python(*pip, "--no-build-isolation", "--wheel-dir", str(out), str(source), cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="session")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds the installed wheel and nothing else."""
    target = tmp_path_factory.mktemp("installed")
    pip = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index", "--no-deps")
    python(*pip, "--target", str(target), str(wheel), cwd=target)
    return target


def test_wheel_holds_every_module_and_nothing_else_at_top_level(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name.split("/")[0] for name in names} == {"netdyno", "netdyno-0.1.0.dist-info"}
    sources = {f"netdyno/{path.relative_to(ROOT).as_posix()}" for folder in FOLDERS for path in modules(folder)}
    assert {name for name in names if name.endswith(".py")} == sources
    page = {f"netdyno/bench/report/page.{suffix}" for suffix in ("html", "css", "js")}
    assert page | {"netdyno/bench/layers.csv"} <= names


def test_wheel_names_its_command_and_licence(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        assert "netdyno = netdyno.bench.cli:main" in archive.read("netdyno-0.1.0.dist-info/entry_points.txt").decode()
        metadata = archive.read("netdyno-0.1.0.dist-info/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.10" in metadata


def test_installed_wheel_is_imported_from_where_it_was_installed(installed: Path, tmp_path: Path) -> None:
    code = """if True:
        import importlib
        for name in ("bench", "bench.data", "bench.report", "models", "kernels"):
            print(importlib.import_module(f"netdyno.{name}").__file__)
    """
    files = [Path(line) for line in python("-c", code, cwd=tmp_path, path=installed).split()]
    names = ("bench", "bench/data", "bench/report", "models", "kernels")
    expected = [installed / "netdyno" / name / "__init__.py" for name in names]
    assert files == expected


@pytest.mark.slow
def test_installed_wheel_runs_a_case(installed: Path, tmp_path: Path) -> None:
    command = ("-m", "netdyno.bench", "run", "mnist-cnn", "--suite", "quick")
    where = ("--results", str(tmp_path / "results"), "--data", str(tmp_path / "data"))
    python(*command, *where, cwd=tmp_path, path=installed, timeout_s=540)
    (path,) = (tmp_path / "results").glob("*/mnist-cnn/*.json")
    record = json.loads(path.read_text())
    assert (record["status"], record["data"]["synthetic"]) == ("ok", True)


def imported(path: Path) -> set[str]:
    """The netdyno modules that a file imports, anywhere in it, as `bench`, `models.mnist_cnn`, …"""
    package = ("netdyno", *path.relative_to(ROOT).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            origin = ".".join((*base, *([node.module] if node.module else [])))
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return {name.removeprefix("netdyno.") for name in found if name.startswith("netdyno.")}


@pytest.mark.parametrize(("folder", "forbidden"), [("models", {"bench"}), ("kernels", {"bench", "models"})])
def test_imports_point_one_way(folder: str, forbidden: set[str]) -> None:
    assert modules(folder)
    wrong = [
        (path.name, name) for path in modules(folder) for name in imported(path) if name.split(".")[0] in forbidden
    ]
    assert wrong == []


def test_imports_of_bench_are_seen() -> None:
    """The check above can fail: it finds the networks that the workloads import."""
    assert any(name.startswith("models") for path in modules("bench") for name in imported(path))


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_what_reads_records_needs_no_torch(module: str, tmp_path: Path) -> None:
    python("-c", f"import sys; sys.modules['torch'] = None; import netdyno.bench.{module}", cwd=tmp_path)


def test_no_tracked_file_holds_a_registry_address() -> None:
    hosts = [".".join(parts) for parts in (("pypi", "org"), ("pythonhosted", "org"), ("pypi", "nvidia", "com"))]
    hosts.append("/".join((".".join(("download", "pytorch", "org")), "whl")))
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listing.returncode != 0:
        pytest.skip("not a git checkout, so no file is tracked")
    files = [path for name in listing.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    assert ROOT / "constraints.txt" in files
    found = [(path.name, host) for path in files for host in hosts if host.encode() in path.read_bytes()]
    assert found == []
