"""The command line: every command and option, what it prints, and how it ends. Runs are played by a stand-in."""

import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from made_up_records import make, records

from netdyno.bench import batch_size, cli, machine, runner, table
from netdyno.bench.batch_size import Found
from netdyno.bench.data import fetch, prepared, synthetic, weights
from netdyno.bench.errors import UserError
from netdyno.bench.gpu import Gpu
from netdyno.bench.record import load_all, new_record, save, save_ceilings
from netdyno.bench.tuning import LADDER
from netdyno.bench.workloads import Case, describe, find, names, resolve

# A new option is a decision: settings of a case belong into bench/workloads.py and bench/tuning.py.
COMMAND_LINE = """
list
run [WORKLOAD]... --suite --tuning --mode --gpus --scaling --restarts --seed --seeds --repeats --resume --parallel \
--results --data --trace --find-batch-size
table --results --format
compare OLD NEW --results
gate NEW --results --json --junit --markdown
ab REF_A REF_B CASE --repeats --budget --results --data
bisect GOOD BAD CASE --repeats --budget --results --data
history CASE --results --plot
report [RESULTS]... --output -o --format --base --prices
pack --machine --output -o --results
merge [PACK]... --results
import-benchmarks FILE --results
doctor --results
project [WORKLOAD]... --gpu
data list --data
data fetch [NAME]... --data
data verify [NAME]... --data
baseline update NEW --results --drop
fleet plan --accelerators --out
"""


class Ended(NamedTuple):
    code: Any
    out: str
    err: str


@pytest.fixture
def netdyno(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Any:
    """Runs a command in an empty folder, on small stand-ins, on a machine without a GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("NETDYNO_DATA", raising=False)
    monkeypatch.setattr(synthetic, "SIZES", dict.fromkeys(("mnist", "cifar10", "cifar100"), (40, 10)))
    here = {"slug": "some-machine", "gpu": None, "cpu": "some", "cores": 2, "memory_gib": 4, "versions": {}}
    monkeypatch.setattr(machine, "describe", lambda: here)

    def netdyno(*arguments: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["netdyno", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Ended(ended.value.code, *capsys.readouterr())

    return netdyno


class Runs:
    """Stands in for runner.run: writes a record for each case, as `ends` says, and remembers how it was called."""

    def __init__(self) -> None:
        self.cases: list[Case] = []
        self.calls: list[dict[str, Any]] = []
        self.ends: dict[str, Any] = {}  # workload → event or exception

    def __call__(self, case: Case, **call: Any) -> dict[str, Any]:
        self.cases.append(case)
        self.calls.append(call)
        end = self.ends.get(case.workload)
        if isinstance(end, BaseException):
            raise end
        accuracy = None if case.mode != "e2e" else make(1)["accuracy"]
        record = new_record(describe(case, resolve(case)), call["machine"])
        record |= {name: make(1)[name] for name in ("timing", "throughput", "memory")}
        name = find(case.workload).dataset
        hashes = {split: prepared.load(name, split, call["data"]).sha256 for split in ("train", "test")}
        record["data"] = make(1)["data"] | {"name": name, "sha256": hashes}
        record |= {"status": "ok", "reason": None, "accuracy": accuracy}
        if end is not None:
            call["listen"](end)
            record |= {"status": end["status"], "reason": end["reason"]}
        save(record, call["results"])
        return record


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    played = Runs()
    monkeypatch.setattr(runner, "run", played)
    return played


def complaint(ended: Ended) -> str:
    """The one line on standard error of a command that the user can mend."""
    assert ended.code == 2
    assert re.fullmatch(r"netdyno: [^\n]+\n", ended.err), ended.err
    return ended.err.strip()


# commands and options


def options(command: Any, name: str = "") -> list[str]:
    if hasattr(command, "commands"):
        return [line for sub, below in command.commands.items() for line in options(below, f"{name} {sub}")]
    words = [name.strip()]
    for parameter in command.params:
        is_option = parameter.param_type_name == "option"
        argument = f"[{parameter.metavar}]..." if parameter.nargs == -1 else parameter.metavar
        words += parameter.opts if is_option else [argument]
        assert not parameter.secondary_opts
    return [" ".join(words)]


def test_no_new_commands_or_options() -> None:
    assert options(typer.main.get_command(cli.app)) == COMMAND_LINE.strip().splitlines()


@pytest.mark.parametrize(
    "command", [*re.findall(r"^[a-z-]+(?: [a-z]+)*", COMMAND_LINE, re.MULTILINE), "", "data", "baseline", "fleet"]
)
def test_help_is_readable(netdyno: Any, command: str) -> None:
    ended = netdyno(*command.split(), "--help")
    assert (ended.code or 0, ended.err) == (0, "")
    assert ended.out.startswith(f"Usage: netdyno {command}".rstrip())
    lines = ended.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert not re.search(r"<|>(?!=)|\[\[|[\x1b╭│]| \.", re.sub(r"<(list\[)?(str|[Pp]ath)\]?>|<=", "", ended.out))
    assert "..." not in ended.out.split("\n", 1)[1]  # no sentence is cut off


def test_help_of_run_tells_every_choice_and_default(netdyno: Any) -> None:
    text = " ".join(netdyno("run", "--help").out.split())
    for suite in cli.Suite:
        assert f"{suite.value}: " in text
    for tuning in cli.TuningName:
        assert f"{tuning.value}: " in text
    for mode in cli.Mode:
        assert f"{mode.value}: " in text
    for default in (
        "all six; open: its three",
        "30; quick: 2",
        "quick",
        "tuned; full: tuned and eager; source: fp32; ladder: all seven",
        "e2e",
        "results",
    ):
        assert f"[default: {default}]" in text
    assert "[default: $NETDYNO_DATA, else the user's cache]" in text


def test_choices_are_what_the_code_knows() -> None:
    from netdyno.bench.tuning import TUNINGS
    from netdyno.bench.workloads import SUITES

    assert [suite.value for suite in cli.Suite] == [*SUITES]
    assert [tuning.value for tuning in cli.TuningName] == [*TUNINGS]
    assert set(cli.SUITE_TUNINGS) == set(cli.Suite)


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_without_a_command_there_is_help(netdyno: Any, arguments: list[str]) -> None:
    ended = netdyno(*arguments)
    assert ended.code == 2
    assert "Commands:" in ended.err + ended.out
    assert "netdyno: " not in ended.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("nonsense", "No such command 'nonsense' (netdyno --help lists what there is)"),
        ("run --nonsense", "No such option: --nonsense"),
        (
            "run --suite huge",
            "'huge' is not one of 'quick', 'full', 'source', 'ladder', 'open' (netdyno run --help lists what there is)",
        ),
        (
            "run --tuning fast",
            "'fast' is not one of 'tuned', 'captured', 'dali', 'compiled', 'channels-last', 'amp', 'eager', 'fp32',"
            " 'deterministic', 't4'",
        ),
        ("run --mode fast", "'fast' is not one of 'e2e', 'compute', 'loader'"),
        ("run --seed x", "--seed"),
        ("run --seed -1", "--seed"),
        ("run --seed 2147483648", "--seed"),
        ("run --repeats 0", "--repeats"),
        ("run --data", "--data"),
        ("table --format xml", "'xml' is not one of 'md', 'csv', 'json'"),
        ("table extra", "extra"),
        ("data list extra", "extra"),
        ("data verify nonsense", "unknown data set 'nonsense'; known are mnist, cifar10, cifar100"),
        ("data fetch nonsense", "unknown data set 'nonsense'; known are mnist, cifar10, cifar100"),
        ("table", "there is no results folder results; make records with: netdyno run"),
        ("table --results no/such", "there is no results folder no/such"),
    ],
)
def test_wrong_use_is_told_in_one_line(netdyno: Any, runs: Runs, arguments: str, says: str) -> None:
    ended = netdyno(*arguments.split())
    assert says in complaint(ended)
    assert "Value error" not in ended.err
    assert ended.out == ""
    assert runs.cases == []
    assert not Path("results").exists()


def test_an_unknown_workload_lists_the_known_ones(netdyno: Any, runs: Runs) -> None:
    told = complaint(netdyno("run", "mnist-cnn", "resnet", "--tuning", "eager"))
    known = [*names(), *names("open"), "dcgan-common"]
    assert told == f"netdyno: unknown workload 'resnet'; known are {', '.join(known)}"
    assert runs.cases == []
    assert not Path("results").exists()


def test_the_open_division_runs_its_own_workloads_with_thirty_seeds_each(netdyno: Any, runs: Runs) -> None:
    assert not netdyno("run", "--suite", "open", "--seed", "5").code
    assert [case.workload for case in runs.cases] == names("open")
    assert {(case.tuning, case.seed, case.seeds) for case in runs.cases} == {("tuned", 5, 30)}
    assert "cifar10-94 tuned e2e seeds 5 to 34" in netdyno("run", "cifar10-94", "--suite", "open", "--seed", "5").out
    assert not netdyno("run", "mnist-99", "--seeds", "3").code
    assert (runs.cases[-1].suite, runs.cases[-1].seeds) == ("quick", 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ("run mnist-cnn --suite open", "mnist-cnn is of the closed division: run it by --suite full or quick"),
        ("run mnist-99 --suite full", "mnist-99 is of the open division: run it by --suite open or quick"),
        ("run mnist-cnn --seeds 3", "--seeds is for the open division"),
        ("run --suite open --mode compute", "leave --mode, --trace and --find-batch-size out"),
        ("run --suite open --trace", "leave --mode, --trace and --find-batch-size out"),
        ("run --suite open --tuning eager", "fed by DALI: --tuning eager is not"),
        ("run --suite open --seeds 1001", "--seeds"),
    ],
)
def test_divisions_are_not_mixed(netdyno: Any, runs: Runs, arguments: str, says: str) -> None:
    ended = netdyno(*arguments.split())
    assert ended.code == 2
    assert says in ended.err
    assert runs.cases == []
    assert not Path("results").exists()


def test_a_bug_keeps_its_traceback(netdyno: Any, runs: Runs) -> None:
    runs.ends["mnist-cnn"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        netdyno("run", "mnist-cnn", "--tuning", "eager")


def test_as_a_module_into_a_pipe_that_closes(tmp_path: Path) -> None:
    for made in records():
        save(made, tmp_path)
    command = [sys.executable, "-m", "netdyno.bench", "table", "--format", "json", "--results", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.read(1) == b"["
        process.stdout.close()
        assert process.stderr.read() == b""


# list


def test_list(netdyno: Any) -> None:
    ended = netdyno("list")
    assert (ended.code or 0, ended.err) == (0, "")
    lines = {line.split()[0]: line for line in ended.out.splitlines()}
    assert [*lines] == ["workload", *names(), *names("open"), "dcgan-common"]
    assert "≥ 99 %" in lines["mnist-cnn"]
    assert "SSIM ≥ 0.96" in lines["conv-autoencoder"]
    assert "≤ 25 % of untrained" in lines["dcgan"]
    assert max(map(len, ended.out.splitlines())) <= 80


# run


def test_a_run_from_end_to_end(netdyno: Any, runs: Runs, tmp_path: Path) -> None:
    ended = netdyno("run", "mnist-cnn", "cifar10-cnn", "--tuning", "eager", "--tuning", "tuned", "--seed", "7")
    assert (ended.code or 0, ended.err) == (0, "")
    assert runs.cases == [
        Case(workload=workload, suite="quick", tuning=tuning, mode="e2e", seed=7)
        for workload in ("mnist-cnn", "cifar10-cnn")
        for tuning in ("eager", "tuned")
    ]
    call = runs.calls[0]
    assert (call["results"], call["trace"], call["machine"]["slug"]) == (Path("results"), False, "some-machine")
    assert call["data"] == tmp_path / "cache" / "netdyno" / "data"
    assert ended.out.splitlines()[:8] == [
        "machine  some-machine",
        "data     cifar10: 40 + 10 images, synthetic stand-in",
        "data     mnist: 40 + 10 images, synthetic stand-in",
        "         accuracies on stand-ins say nothing about the real sets",
        "[1/4] mnist-cnn eager e2e seed 7",
        "  1,000 images/s, test accuracy 99.10 %",
        "[2/4] mnist-cnn tuned e2e seed 7",
        "  1,000 images/s, test accuracy 99.10 %",
    ]
    assert "metric by epoch" in ended.out
    assert ended.out.endswith("4 records written to results/some-machine\n")
    assert json.loads(Path("results/some-machine/machine.json").read_text())["cores"] == 2


def test_a_run_keeps_the_ceilings(netdyno: Any, runs: Runs) -> None:
    path = save_ceilings({"copy_gb_per_s": 10.0}, machine.describe(), Path("results"))
    assert not netdyno("run", "mnist-cnn", "--tuning", "eager").code
    assert json.loads(path.read_text())["ceilings"] == {"copy_gb_per_s": 10.0}


@pytest.mark.parametrize(
    ("suite", "tunings"),
    [("quick", ["tuned"]), ("full", ["tuned", "eager"]), ("source", ["fp32"]), ("ladder", [*LADDER])],
)
def test_each_suite_has_its_tunings(netdyno: Any, runs: Runs, suite: str, tunings: list[str]) -> None:
    assert not netdyno("run", "mnist-cnn", "--suite", suite).code
    assert [(case.suite, case.tuning) for case in runs.cases] == [(suite, tuning) for tuning in tunings]


def test_version(netdyno: Any) -> None:
    ended = netdyno("--version")
    assert (ended.code or 0, ended.out.strip()) == (0, importlib.metadata.version("netdyno"))


def test_the_largest_batch_of_each_case(
    netdyno: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "--find-batch-size needs a CUDA GPU" in netdyno("run", "mnist-cnn", "--find-batch-size").err
    assert "leave one of them out" in netdyno("run", "mnist-cnn", "--parallel", "--gpus", "2").err
    monkeypatch.setattr(machine, "describe", lambda: {"slug": "a-card", "gpu": "a card", "versions": {}})
    assert "leave --parallel out" in netdyno("run", "mnist-cnn", "--parallel", "--find-batch-size").err
    loads = netdyno("run", "mnist-cnn", "--mode", "loader", "--find-batch-size")
    assert (loads.code, len(loads.err.splitlines())) == (2, 1)
    assert "leave one of them out" in loads.err
    asked = []

    def find(case: Any, *, images: int, **rest: Any) -> Found:
        asked.append((case.workload, case.tuning, images))
        return {"tuned": Found(32, None), "eager": Found(16, 24), "t4": Found(None, 8)}[case.tuning]

    monkeypatch.setattr(batch_size, "find_batch_size", find)
    tunings = ("--tuning", "tuned", "--tuning", "eager", "--tuning", "t4")
    ended = netdyno("run", "mnist-cnn", *tunings, "--repeats", "2", "--find-batch-size")
    assert asked == [("mnist-cnn", tuning, 40) for tuning in ("tuned", "eager", "t4")]
    assert ended.out.splitlines()[-3:] == [
        "mnist-cnn tuned: 32 images train, more than the training set has are not tried",
        "mnist-cnn eager: 16 images train, 24 do not",
        "mnist-cnn t4: no batch trains, 8 do not",
    ]
    assert runs.cases == []


def test_a_data_folder_that_is_not_there_is_named(netdyno: Any, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    ended = netdyno("data", "list", "--data", gone)
    assert (ended.code or 0, ended.err.strip()) == (0, f"netdyno: the data folder {gone} does not exist yet")
    assert not gone.exists()


def test_options_reach_the_runs(netdyno: Any, runs: Runs, tmp_path: Path) -> None:
    more = ["--mode", "compute", "--repeats", "3", "--results", "here/there", "--data", tmp_path / "sets", "--trace"]
    ended = netdyno("run", "mnist-cnn", "--tuning", "eager", *more)
    assert not ended.code
    assert [case.mode for case in runs.cases] == ["compute"] * 3
    assert all(call["trace"] and call["data"] == tmp_path / "sets" for call in runs.calls)
    assert len(load_all(Path("here/there"))) == 3
    assert (tmp_path / "sets" / "synthetic" / "mnist").is_dir()


def test_netdyno_data_names_the_folder(
    netdyno: Any, runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NETDYNO_DATA", str(tmp_path / "mine"))
    netdyno("run", "mnist-cnn", "--tuning", "eager")
    assert runs.calls[0]["data"] == tmp_path / "mine"


def test_a_failed_run_is_told_and_the_others_go_on(netdyno: Any, runs: Runs) -> None:
    runs.ends["mnist-cnn"] = {"status": "oom", "reason": "CUDA out of memory"}
    ended = netdyno("run", "mnist-cnn", "cifar10-cnn", "--tuning", "eager")
    assert (ended.code, ended.err) == (1, "")
    assert [case.workload for case in runs.cases] == ["mnist-cnn", "cifar10-cnn"]
    assert ended.out.count("  oom: CUDA out of memory\n") == 1
    assert "2 records written" in ended.out
    assert [record["status"] for record in sorted(load_all(Path("results")), key=str)].count("oom") == 1


def test_what_the_user_can_mend_inside_a_run_ends_with_2(netdyno: Any, runs: Runs) -> None:
    runs.ends["mnist-cnn"] = {"status": "failed", "reason": "a.jpg: not a sound JPEG", "user_error": True}
    runs.ends["cifar10-cnn"] = {"status": "oom", "reason": "full"}
    ended = netdyno("run", "mnist-cnn", "cifar10-cnn", "--tuning", "eager")
    assert ended.code == 2
    assert "  failed: a.jpg: not a sound JPEG\n" in ended.out


def test_a_long_reason_stays_one_line(netdyno: Any, runs: Runs) -> None:
    reason = "word " * 60 + "[bold]end[/nope]"
    runs.ends["mnist-cnn"] = {"status": "failed", "reason": reason}
    assert f"  failed: {reason}\n" in netdyno("run", "mnist-cnn", "--tuning", "eager").out


def test_ctrl_c(netdyno: Any, runs: Runs) -> None:
    runs.ends["cifar10-cnn"] = KeyboardInterrupt()
    ended = netdyno("run", "mnist-cnn", "cifar10-cnn", "conv-autoencoder", "--tuning", "eager")
    assert (ended.code, ended.err) == (130, "netdyno: interrupted\n")
    assert [case.workload for case in runs.cases] == ["mnist-cnn", "cifar10-cnn"]


def test_resume_runs_what_is_missing(netdyno: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["run", "mnist-cnn", "cifar10-cnn", "--tuning", "eager", "--resume"]
    runs.ends["cifar10-cnn"] = {"status": "failed", "reason": "r"}
    assert netdyno(*command).code == 1
    runs.cases.clear()
    runs.ends.clear()

    ended = netdyno(*command)
    assert not ended.code
    assert [case.workload for case in runs.cases] == ["cifar10-cnn"]  # what failed is tried again
    assert "[1/2] mnist-cnn eager e2e seed 0: already recorded\n[2/2] cifar10-cnn eager" in ended.out
    runs.cases.clear()

    ended = netdyno(*command)
    assert not ended.code
    assert runs.cases == []
    assert "written" not in ended.out

    netdyno(*command, "--repeats", "2")
    assert [case.workload for case in runs.cases] == ["mnist-cnn", "cifar10-cnn"]  # one more of each
    runs.cases.clear()

    for more in (["--seed", "1"], ["--suite", "source"], ["--mode", "compute"], ["--results", "elsewhere"]):
        netdyno(*command, *more)
        assert len(runs.cases) == 2, more
        runs.cases.clear()
    monkeypatch.setattr(cli, "code_hash", lambda: "another")
    netdyno(*command)
    assert len(runs.cases) == 2
    runs.cases.clear()


def test_without_resume_everything_runs_again(netdyno: Any, runs: Runs) -> None:
    for _ in range(2):
        netdyno("run", "mnist-cnn", "--tuning", "eager")
    assert len(runs.cases) == 2


def test_resume_beside_records_that_lack_things(netdyno: Any, runs: Runs) -> None:
    made = make(1)
    del made["code"], made["case"]["suite"]
    made["machine"] = {"slug": "some-machine"}
    save(made, Path("results"))
    assert not netdyno("run", "mnist-cnn", "--tuning", "eager", "--resume").code
    assert len(runs.cases) == 1


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The visible GPUs, their names by their UUIDs."""
    found = {"GPU-a": "Tesla T4", "GPU-b": "Tesla T4"}
    monkeypatch.setattr(Gpu, "cards", lambda: found)
    return found


def test_cases_on_two_cards(netdyno: Any, runs: Runs, cards: dict[str, str]) -> None:
    runs.ends["cifar10-cnn"] = {"status": "oom", "reason": "full"}
    command = ["run", "mnist-cnn", "cifar10-cnn", "--tuning", "eager", "--repeats", "2", "--resume", "--parallel"]
    ended = netdyno(*command)
    assert (ended.code, ended.err) == (1, "")
    assert [case.workload for case in runs.cases].count("mnist-cnn") == 2
    posts = [call["post"] for call in runs.calls]
    assert {(post.number, post.card) for post in posts} <= {(0, "GPU-a"), (1, "GPU-b")}
    lines = ended.out.splitlines()
    assert lines[1] == "cards    2: a case on each"
    for number, line in enumerate(["mnist-cnn"] * 2 + ["cifar10-cnn"] * 2, 1):
        name = f"[{number}/4] {line} eager e2e seed 0"
        end = "1,000 images/s, test accuracy 99.10 %" if line == "mnist-cnn" else "oom: full"
        begun = next(at for at, said in enumerate(lines) if re.fullmatch(rf"{re.escape(name)}: card [01]", said))
        assert lines.index(f"{name}: {end}") > begun
    assert "4 records written" in ended.out
    runs.cases.clear()
    runs.ends.clear()

    ended = netdyno(*command)
    assert not ended.code
    assert [case.workload for case in runs.cases] == ["cifar10-cnn"] * 2  # what failed is tried again
    assert ended.out.count(": already recorded") == 2


@pytest.mark.parametrize("count", [0, 1])
def test_without_a_second_card_a_run_is_as_usual(netdyno: Any, runs: Runs, cards: dict[str, str], count: int) -> None:
    while len(cards) > count:
        cards.popitem()
    ended = netdyno("run", "mnist-cnn", "--tuning", "eager", "--parallel")
    assert not ended.code
    assert runs.calls[0]["post"] is None
    assert f"cards    {count}: one case after the other\n" in ended.out
    assert "[1/1] mnist-cnn eager e2e seed 0\n  1,000 images/s" in ended.out


def test_cards_that_differ_are_no_machine(netdyno: Any, runs: Runs, cards: dict[str, str]) -> None:
    cards["GPU-c"] = "L4"
    told = complaint(netdyno("run", "mnist-cnn", "--tuning", "eager", "--parallel"))
    assert told == "netdyno: --parallel needs cards of one kind; choose with CUDA_VISIBLE_DEVICES: L4, Tesla T4"
    told = complaint(netdyno("run", "mnist-cnn", "--tuning", "eager", "--gpus", "3"))
    assert told == "netdyno: --gpus 3 needs cards of one kind; choose with CUDA_VISIBLE_DEVICES: L4, Tesla T4"
    assert runs.cases == []
    assert not [*Path("results").rglob("*")]


def test_cases_on_several_cards_come_one_after_the_other_and_cards_that_are_not_used_may_differ(
    netdyno: Any, runs: Runs, cards: dict[str, str]
) -> None:
    cards["GPU-c"] = "L4"
    ended = netdyno("run", "mnist-cnn", "--tuning", "eager", "--gpus", "2", "--repeats", "2")
    assert not ended.code
    assert [(case.gpus, call["post"]) for case, call in zip(runs.cases, runs.calls, strict=True)] == [(2, None)] * 2
    assert ended.out.index("[2/2] mnist-cnn") > ended.out.index("1,000 images/s")


@pytest.mark.parametrize("option", ["--scaling strong", "--restarts 2"])
def test_what_is_of_several_gpus_does_not_go_unsaid_on_one(netdyno: Any, runs: Runs, option: str) -> None:
    told = complaint(netdyno("run", "mnist-cnn", *option.split()))
    assert told == f"netdyno: {option.removesuffix(' 2')} is for cases on several GPUs: say how many with --gpus"
    assert runs.cases == []
    for more in (["--gpus", "2", *option.split()], ["--scaling", "weak"]):
        assert not netdyno("run", "mnist-cnn", "--tuning", "eager", *more).code


def test_fleet_plan(netdyno: Any) -> None:
    ended = netdyno("fleet", "plan", "--accelerators", "T4,L4", "--out", "some/place")
    assert (ended.code or 0, ended.err) == (0, "")
    assert sorted(path.name for path in Path("some/place").iterdir()) == [
        *("l4.sky.yaml", "sky.sh", "slurm.py", "t4.sky.yaml")
    ]
    assert ended.out.startswith("4 files in some/place. ")
    assert str(tuple(names())) in Path("some/place/slurm.py").read_text()
    assert "'K80'" in complaint(netdyno("fleet", "plan", "--accelerators", "T4,K80", "--out", "other"))
    assert not Path("other").exists()


# what is found before anything runs


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_results_folder_that_cannot_be_written(netdyno: Any, runs: Runs, folder: str) -> None:
    Path("file").write_text("")
    told = complaint(netdyno("run", "mnist-cnn", "--tuning", "eager", "--results", folder))
    assert told.startswith(f"netdyno: results folder {folder} cannot be written: ")
    assert runs.cases == []


def test_no_space_is_told(netdyno: Any, runs: Runs) -> None:
    runs.ends["mnist-cnn"] = UserError("x.json cannot be written: no space left on the disk")
    ended = netdyno("run", "mnist-cnn", "--tuning", "eager")
    assert complaint(ended) == "netdyno: x.json cannot be written: no space left on the disk"


def test_t4_without_a_gpu(netdyno: Any, runs: Runs) -> None:
    told = complaint(netdyno("run", "mnist-cnn", "--tuning", "eager", "--tuning", "t4"))
    assert told == "netdyno: --tuning t4 needs a CUDA GPU, and no NVIDIA driver with one was found here"
    assert runs.cases == []


def test_without_dali(netdyno: Any, runs: Runs, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("nvidia.dali")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    assert "pip install nvidia-dali" in complaint(netdyno("run", "mnist-cnn"))
    assert runs.cases == []
    assert not netdyno("run", "mnist-cnn", "--tuning", "eager").code  # which needs none


@pytest.mark.parametrize(
    ("file", "spoil", "says"),
    [
        ("train.images.npy", lambda content: content[:-100], "truncated"),
        ("test.labels.npy", lambda content: b"garbage" + content, "not a .npy file"),
        ("test.images.npy", lambda content: content + b"more", "4 bytes after its array"),
        ("manifest.json", lambda content: content[:-5], "cannot be read"),
    ],
)
def test_a_damaged_file_is_named(netdyno: Any, runs: Runs, tmp_path: Path, file: str, spoil: Any, says: str) -> None:
    path = synthetic.make("mnist", tmp_path) / file
    path.write_bytes(spoil(path.read_bytes()))
    told = complaint(netdyno("run", "mnist-cnn", "--tuning", "eager", "--data", tmp_path))
    assert str(path) in told
    assert says in told
    assert runs.cases == []


# table


@pytest.mark.parametrize(
    ("format", "writer"), [("md", table.to_markdown), ("csv", table.to_csv), ("json", table.to_json)]
)
def test_table_formats(netdyno: Any, format: str, writer: Any) -> None:
    for made in records():
        save(made, Path("results"))
    ended = netdyno("table", "--format", format)
    assert (ended.code or 0, ended.err) == (0, "")
    assert ended.out == writer(load_all(Path("results"))).rstrip("\n") + "\n"
    assert "resnet50-transfer" in ended.out


def test_table_for_the_terminal(netdyno: Any) -> None:
    for made in records():
        save(made, Path("shelf"))
    ended = netdyno("table", "--results", "shelf")
    assert (ended.code or 0, ended.err) == (0, "")
    assert "nvidia-h200: suite full, real data" in ended.out
    assert "oom" in ended.out


def test_table_without_records(netdyno: Any) -> None:
    Path("results").mkdir()
    ended = netdyno("table")
    assert (ended.code or 0, ended.err) == (0, "")
    assert "No records yet" in ended.out


@pytest.mark.fault("a file among the records that is none")
def test_table_shows_the_others_and_names_a_broken_record(netdyno: Any) -> None:
    path = save(make(1), Path("results"))
    save(make(2), Path("results"))
    whole = netdyno("table", "--format", "csv").out
    path.write_text(path.read_text()[:100])
    ended = netdyno("table", "--format", "csv")
    assert (ended.code, len(whole.splitlines()) - len(ended.out.splitlines())) == (1, 0)  # both in one row
    assert re.fullmatch(rf"netdyno: not shown: {re.escape(str(path))} is [^\n]+\n", ended.err)
    assert len(path.read_text()) == 100  # nobody touches it


# data


def make_real(name: str, root: Path) -> Path:
    folder = synthetic.make(name, root)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["synthetic"]
    (folder / "manifest.json").write_text(json.dumps(manifest | {"split": "official"}))
    return folder.rename(root / name)


def test_data_list(netdyno: Any, tmp_path: Path) -> None:
    make_real("mnist", tmp_path)
    synthetic.make("cifar10", tmp_path)
    ended = netdyno("data", "list", "--data", tmp_path)
    assert (ended.code or 0, ended.err) == (0, "")
    assert ended.out.splitlines()[:3] == [
        str(tmp_path),
        "  mnist        real, official",
        "  cifar10      synthetic stand-in",
    ]
    assert [line.split()[:2] for line in ended.out.splitlines()[3:]] == [
        ["cifar100", "missing:"],
        ["anime_faces", "missing:"],
        ["flowers", "missing:"],
    ]
    assert not (tmp_path / "synthetic" / "flowers").exists()  # looking draws nothing


def test_data_list_names_what_is_damaged(netdyno: Any, tmp_path: Path) -> None:
    path = synthetic.make("mnist", tmp_path) / "manifest.json"
    path.write_text("{")
    (tmp_path / "cifar100").mkdir()
    ended = netdyno("data", "list", "--data", tmp_path)
    assert ended.code == 2
    assert "  mnist        damaged\n" in ended.out
    assert "  flowers      missing" in ended.out
    first, second = ended.err.splitlines()
    assert first.startswith(f"netdyno: {path} cannot be read")
    assert second.startswith(f"netdyno: {tmp_path / 'cifar100'} has no manifest.json")


def test_data_verify(netdyno: Any, tmp_path: Path) -> None:
    path = make_real("mnist", tmp_path) / "test.images.npy"
    ended = netdyno("data", "verify", "--data", tmp_path)
    assert (ended.code or 0, ended.err) == (0, "")
    assert ended.out.splitlines()[:2] == ["mnist: as its manifest says", "cifar10: not there"]

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    ended = netdyno("data", "verify", "--data", tmp_path)
    assert complaint(ended).startswith(f"netdyno: {path}: SHA-256 is ")
    assert "mnist: damaged\n" in ended.out

    assert complaint(netdyno("data", "verify", "cifar10", "--data", tmp_path)).startswith("netdyno: cifar10: not in ")


def test_data_fetch(netdyno: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fetch_one(name: str, root: Path, report: Any) -> None:
        assert root == tmp_path
        if name in ("flowers", "anime_faces"):
            raise UserError(f"{name} cannot be fetched")
        report(f"{name}: ready [here]")

    fetched: list[str] = []
    monkeypatch.setattr(fetch, "fetch", fetch_one)
    monkeypatch.setattr(weights, "fetch", lambda report: fetched.append("weights"))
    ended = netdyno("data", "fetch", "--data", tmp_path)
    assert ended.code == 2
    assert ended.out == "".join(f"{name}: ready [here]\n" for name in ("mnist", "cifar10", "cifar100"))
    assert sorted(ended.err.splitlines()) == [
        "netdyno: anime_faces cannot be fetched",
        "netdyno: flowers cannot be fetched",
    ]
    assert fetched == ["weights"]

    ended = netdyno("data", "fetch", "cifar10", "--data", tmp_path)
    assert (ended.code or 0, ended.err, ended.out) == (0, "", "cifar10: ready [here]\n")
    assert fetched == ["weights"]  # named sets alone


def test_data_commands_look_where_runs_do(netdyno: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert netdyno("data", "list").out.startswith(f"{prepared.default_root()}\n")
    monkeypatch.setenv("NETDYNO_DATA", str(tmp_path / "mine"))
    assert netdyno("data", "list").out.startswith(f"{tmp_path / 'mine'}\n")


def test_project(netdyno: Any) -> None:
    ended = netdyno("project", "mnist-cnn", "--gpu", "l4")
    assert (ended.code or 0, ended.err) == (0, "")
    assert ended.out.startswith("L4, projected: ")
    assert re.search(r"^\| mnist-cnn +\| projected \|", ended.out, re.MULTILINE)
    assert "cifar10-cnn" not in ended.out
    assert "DeepLearningExamples" in ended.out
    assert "unknown workload" in complaint(netdyno("project", "lenet"))
    assert "'k80' is not one of" in complaint(netdyno("project", "--gpu", "k80"))


def test_every_option_names_itself() -> None:
    """typer up to 0.27 takes an option's metavar for its name where no name is given."""
    found = re.findall(
        r"typer\.Option\(\s*(\S+?)[,=)]",
        "".join(path.read_text() for path in Path(cli.__file__).parent.glob("cli*.py")),
    )
    assert found
    assert [name for name in found if not name.startswith('"--')] == []
