"""The comparison's own tests: on clocks that are made up, with answers that are known."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from benchmarks import compare as comparing
from benchmarks import selftest, worker
from benchmarks.compare import (
    Comparison,
    Pair,
    Side,
    WorkerFailed,
    checkout,
    compare,
    decide,
    interval,
    pair_of_processes,
    thresholds_of,
)

FAKE = """
import json, os, random, sys
true = float(os.environ.get("FAKE_SECONDS", "0.05"))
process = random.lognormvariate(0, 0.02)  # where it landed: the same as long as it lives
for line in sys.stdin:
    command = json.loads(line)
    if "enter" in command:
        if command["enter"] == "broken":
            print(json.dumps({"error": "LookupError: no such case"}), flush=True)
            break
        if command["enter"] == "dying":
            sys.exit("the disk is full")
        print(json.dumps({"step_seconds": true, "versions": {}}), flush=True)
    else:
        noise = random.lognormvariate(0, 0.1 if random.random() < 0.1 else 0.01)
        seconds = command["time"] * true * (1 + command["slowdown"]) * process * noise
        print(json.dumps({"seconds": seconds}), flush=True)
"""


@pytest.fixture
def side(tmp_path, monkeypatch) -> Side:
    """Both sides of a comparison, with a worker that makes its times up."""
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)
    monkeypatch.setattr(comparing, "WORKER", worker)
    return Side("fake", sys.executable, (tmp_path,))


def simulated(
    rng: np.random.Generator, n: int, effect: float, spread: float = 0.015
) -> list[float]:
    """Logarithms of ``n`` pairs of processes, heavy-tailed as on a shared machine."""
    return list(np.log(effect) + spread * rng.standard_t(5, n))


# decisions


@pytest.mark.parametrize(
    ("logs", "verdict"),
    [
        ([0.05, 0.051, 0.049, 0.05], "slower"),
        ([-0.05, -0.051, -0.049, -0.05], "faster"),
        ([0.001, -0.001, 0.0, 0.001], "no change"),
        ([0.2, -0.2, 0.1, -0.1], "inconclusive"),
        ([0.02, 0.021, 0.019, 0.02], "inconclusive"),  # on the threshold
    ],
)
def test_the_whole_interval_decides(logs, verdict):
    assert decide(interval(logs, 0.99), 0.02) == verdict


@pytest.mark.parametrize("effect", [1.0, 1.05, 1.10])
def test_what_is_found_and_how_often_on_known_answers(effect: float):
    """The looks together, as a run of the command decides."""
    rng = np.random.default_rng(int(effect * 100))
    trials, verdicts = 1000, []
    for _ in range(trials):
        c = Comparison("x")
        while not c.ended:
            c.logs += simulated(rng, 1, effect)
        verdicts.append(c.verdict)
    slower, faster = verdicts.count("slower"), verdicts.count("faster")
    if effect == 1.0:
        assert (slower, faster) == (0, 0)
    else:
        assert faster == 0
        assert slower >= {1.05: 0.9, 1.10: 0.99}[effect] * trials


def test_the_interval_covers_as_often_as_it_says():
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(2000):
        low, high = interval(list(rng.normal(np.log(1.03), 0.01, 5)), 0.99)
        missed += not low <= 1.03 <= high
    assert 0 < missed < 2000 * 0.01 + 5 * (2000 * 0.01) ** 0.5


def test_looking_often_calls_what_is_not_so_no_oftener_than_promised():
    """On the threshold itself, where each look alone would err in 1 of 200."""
    rng = np.random.default_rng(1)
    trials, wrong = 2000, 0
    for _ in range(trials):
        c = Comparison("x", threshold=0.02, confidence=0.99)
        while not c.ended:
            c.logs.append(rng.normal(np.log(1.02), 0.02))
        wrong += c.verdict == "slower"
    assert wrong <= trials * 0.005 + 3 * (trials * 0.005) ** 0.5


def test_a_verdict_falls_at_a_look_and_ends_the_comparison():
    c = Comparison("x", processes=12)
    ended = []
    for log in [0.1, 0.101, 0.1, 0.099, 0.1, 0.1]:
        c.logs.append(log)
        ended.append((c.verdict, c.ended))
    assert c.looks == [3, 6, 12]
    assert [i for i, (verdict, _) in enumerate(ended, 1) if verdict == "slower"] == [3, 6]
    assert [i for i, (_, end) in enumerate(ended, 1) if end] == [3, 6]


def test_no_verdict_tells_what_would_have_been_one():
    quiet = Comparison("x", processes=4, logs=[0.0, 0.001, 0.0, -0.001])
    noisy = Comparison("x", processes=4, logs=[0.0, 0.1, 0.0, -0.1])
    assert quiet.verdict == "no change"
    assert quiet.detectable < 0.03
    assert noisy.verdict == "inconclusive"
    assert noisy.detectable > 0.1


def test_one_pair_has_no_spread():
    with pytest.raises(ValueError, match="2 or more"):
        interval([0.1], 0.99)


# processes


def test_a_pair_takes_turns_and_finds_the_slowdown(side):
    pair = pair_of_processes(side, side, "x", 1, (0.0, 0.5), turns=12)
    same, longer = pair.logs
    assert abs(same) < 0.15
    assert longer - same == pytest.approx(np.log(1.5), abs=0.05)
    assert pair.head_ms[1] / pair.head_ms[0] == pytest.approx(1.5, rel=0.05)


@pytest.mark.parametrize("asked", [None, "4"])
def test_workers_multiply_with_one_thread_unless_told(side, asked, monkeypatch):
    monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    if asked:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", asked)
    comparing.WORKER.write_text(
        "import json, os, sys\n"
        "sys.stdin.readline()\n"
        "print(json.dumps({'threads': os.environ['OPENBLAS_NUM_THREADS']}), flush=True)\n"
    )
    with comparing.Worker(side, "x", 1) as worker:
        worker.start_entering()
        assert worker.entered() == {"threads": asked or "1"}


def test_a_tree_without_the_case_says_so(side):
    with pytest.raises(WorkerFailed, match="fake, broken: LookupError: no such case"):
        pair_of_processes(side, side, "broken", 1)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("003 GAN", "this tree has no case called '003 GAN'"),
        ("001 generator", "'001 generator' is not trained: it has no step to time"),
    ],
)
def test_a_worker_refuses_what_it_cannot_time(name, message, monkeypatch):
    monkeypatch.setattr("mlx_parity.blas.use_openblas", lambda: None)  # not in the tests' process
    with pytest.raises(LookupError, match=message):
        worker.enter(name, 1)


def test_a_worker_that_dies_leaves_its_last_words(side):
    with pytest.raises(WorkerFailed, match="the disk is full"):
        pair_of_processes(side, side, "dying", 1)


def workers(folder: Path) -> list[str]:
    found = subprocess.run(
        ["pgrep", "-f", str(folder)], capture_output=True, text=True, check=False
    )
    return found.stdout.split()


@pytest.mark.parametrize("error", [KeyboardInterrupt, WorkerFailed])
def test_an_interrupted_comparison_leaves_no_process(side, error, monkeypatch):
    def interrupted(self: comparing.Worker, steps: int, slowdown: float = 0) -> float:
        raise error

    monkeypatch.setattr(comparing.Worker, "time", interrupted)
    with pytest.raises(error):
        pair_of_processes(side, side, "x", 1)
    deadline = time.monotonic() + 5
    while workers(side.path[0]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert workers(side.path[0]) == []


def test_what_is_plain_ends_early_and_what_is_not_goes_on(side, monkeypatch):
    calls: list[str] = []

    def pair(base: Side, head: Side, system: str, batch: int) -> Pair:
        calls.append(system)
        log = 0.1 if system == "slow" else 0.02 * (-1) ** calls.count("same")
        return Pair((log + 0.0001 * (len(calls) % 3),), 1.0, (1.0,))

    monkeypatch.setattr(comparing, "pair_of_processes", pair)
    told: list[tuple[str, bool]] = []
    systems = {"slow": 1, "same": 1}
    slow, same = compare(
        side, side, systems, processes=16, progress=lambda c: told.append((c.system, c.ended))
    )
    assert (slow.verdict, same.verdict) == ("slower", "inconclusive")
    assert (calls.count("slow"), calls.count("same")) == (4, 16)
    assert [system for system, ended in told if ended] == ["slow", "same"]
    assert slow.confidence == pytest.approx(0.995)  # shared between the two


# trees


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.fixture
def repository(tmp_path) -> Path:
    folder = tmp_path / "repository"
    folder.mkdir()
    git(folder, "init", "-q")
    for text in ("one", "two"):
        (folder / "file").write_text(text)
        git(folder, "add", "file")
        git(folder, "commit", "-qm", text)
    return folder


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_a_checkout_is_gone_afterwards(repository, error):
    trees: list[Path] = []

    def use() -> None:
        with checkout("HEAD~1", repository) as tree:
            trees.append(tree)
            assert (tree / "file").read_text() == "one"
            if error:
                raise error

    if error:
        with pytest.raises(error):
            use()
    else:
        use()
    assert not trees[0].exists()
    assert len(git(repository, "worktree", "list").splitlines()) == 1
    assert (repository / "file").read_text() == "two"


def test_an_unknown_revision_is_named(repository):
    with pytest.raises(ValueError, match="no-such"), checkout("no-such", repository):
        pass


# thresholds and the report


def test_thresholds_are_read_for_each_system(tmp_path):
    path = tmp_path / "pyproject.toml"
    path.write_text('[tool.benchmarks.thresholds]\ndefault = 0.03\n"002 GAN" = 0.1\n')
    assert thresholds_of(path) == {"default": 0.03, "002 GAN": 0.1}
    path.write_text("[project]\n")
    assert thresholds_of(path) == {}


@pytest.mark.parametrize("value", ["0", "-0.1", '"2 %"', "true"])
def test_a_threshold_that_is_none_is_refused(tmp_path, value):
    path = tmp_path / "pyproject.toml"
    path.write_text(f"[tool.benchmarks.thresholds]\ndefault = {value}\n")
    with pytest.raises(ValueError, match="default"):
        thresholds_of(path)


def test_the_report_is_whole_or_the_one_before(tmp_path, monkeypatch):
    path = tmp_path / "reports" / "compare.json"
    comparing.write([Comparison("x", logs=[0.1] * 5)], "base", "head", path)
    before = path.read_text()
    assert json.loads(before)["rows"][0]["verdict"] == "slower"
    monkeypatch.setattr(Path, "replace", _raise(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        comparing.write([Comparison("x", logs=[0.0, 0.0])], "base", "head", path)
    assert path.read_text() == before


def _raise(error: type[BaseException]) -> Callable[..., None]:
    def raising(*_: object) -> None:
        raise error

    return raising


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a revision"),
        (["HEAD", "--processes", "1"], "2 or more"),
    ],
)
def test_bad_arguments_are_told(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        comparing.main(arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_systems_that_do_not_exist_are_told(capsys):
    assert comparing.main(["HEAD", "no such system"]) == 2
    assert "there are" in capsys.readouterr().err


# the self-test


def trial_of(rng: np.random.Generator) -> selftest.Trial:
    trial = selftest.Trial.of("x")
    while not trial.ended:
        own = rng.normal(0, 0.1, 2)  # a process's own speed, which a stored run takes for a change
        log = rng.normal(0, 0.015)
        slow = [1 + s for s in selftest.SLOWDOWNS]
        trial.add(
            Pair(
                tuple(float(log + np.log(s)) for s in slow),
                float(np.exp(own[0])),
                tuple(float(s * np.exp(own[1])) for s in slow),
            )
        )
    return trial


def test_the_self_test_counts_verdicts_and_what_a_stored_run_says():
    rng = np.random.default_rng(0)
    rows = selftest.summarise([trial_of(rng) for _ in range(20)])
    none, small, large = rows
    assert none["verdicts"]["slower"] + none["verdicts"]["faster"] == 0
    assert small["verdicts"]["slower"] >= 18
    assert large["verdicts"]["slower"] == 20
    assert none["stored"]["slower"] + none["stored"]["faster"] > 3  # of a tree against itself
    found = selftest.score(rows)
    assert selftest.passed(found)
    assert (found["aa_runs"], found["aa_false"]) == (20, 0)
    assert found["injected"]["0.05"] == {"runs": 20, "found": small["verdicts"]["slower"]}
    assert found["injected"]["0.10"] == {"runs": 20, "found": 20}
    assert found["stored_baseline"]["aa_false"] > 3
    assert set(found["stored_baseline"]["injected"]) == {"0.05", "0.10"}


def test_the_self_test_fails_where_it_should():
    rng = np.random.default_rng(0)
    rows = selftest.summarise([trial_of(rng) for _ in range(20)])
    none, small, large = rows
    less = large | {"slowdown": 0.1, "verdicts": none["verdicts"]}
    assert not selftest.passed(selftest.score([large, small, large]))
    assert not selftest.passed(selftest.score([none, none | {"slowdown": 0.05}, large]))
    assert not selftest.passed(selftest.score([none, small, less]))
    assert selftest.passed(selftest.score([none, small, large]))
