"""Runs are kept for one machine, never compared with another's, and a step in them is seen."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import report
from benchmarks.history import (
    IDENTITY,
    change_points,
    check_comparable,
    identity_key,
    load,
    read,
    store,
)

MACHINE = dict.fromkeys(IDENTITY, "x") | {"mlx_version": "0.32.4", "torch_version": "2.14.1"}


def row(system: str = "001 GAN", ratio: float = 1.5, **more) -> dict:
    return {
        "system": system,
        "kind": "step",
        "ms_compiled": 10.0,
        "ms_uncompiled": 10.0 * ratio,
        "ms_torch_eager": 12.0,
        "compiled_over_uncompiled": ratio,
        "compiled_over_uncompiled_interval": [ratio * 0.99, ratio * 1.01],
        "over_torch_eager": 1.2,
        "over_torch_eager_interval": [1.19, 1.21],
        "share_of_matmul_peak": 0.3,
        **more,
    }


def test_a_run_is_read_as_it_was_stored(tmp_path):
    store([row(), row("002 GAN")], MACHINE, tmp_path)
    (run,) = load(MACHINE, tmp_path)
    assert list(run.rows) == ["001 GAN", "002 GAN"]
    assert run.rows["001 GAN"]["ms_compiled"] == 10
    assert run.key == identity_key(MACHINE)


@pytest.mark.parametrize("key", IDENTITY)
def test_another_machine_is_another_history(tmp_path, key):
    store([row()], MACHINE, tmp_path)
    store([row()], MACHINE | {key: "y"}, tmp_path)
    assert len(load(MACHINE, tmp_path)) == 1
    runs = [read(path) for path in tmp_path.glob("*/*.json")]
    with pytest.raises(ValueError, match=rf"{key} is '[xy]' and '[xy]'"):
        check_comparable(runs)
    with pytest.raises(ValueError, match="cannot be compared"):
        report.page(runs)


def test_another_mlx_is_the_same_machine(tmp_path):
    store([row()], MACHINE, tmp_path)
    store([row()], MACHINE | {"mlx_version": "0.33"}, tmp_path)
    assert len(load(MACHINE, tmp_path)) == 2


@pytest.mark.parametrize("text", ["", "{}", '{"rows": 3}', "[1]"])
def test_a_damaged_run_is_named(tmp_path, text):
    path = store([row()], MACHINE, tmp_path)
    path.write_text(text)
    with pytest.raises(ValueError, match=path.name):
        load(MACHINE, tmp_path)


def test_a_run_that_is_interrupted_leaves_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        store([row()], MACHINE, tmp_path)
    assert load(MACHINE, tmp_path) == []


@pytest.mark.parametrize("at", [3, 10, 17])
@pytest.mark.parametrize("size", [0.05, -0.1])
def test_a_step_is_found_where_it_is(at, size):
    rng = np.random.default_rng(at)
    logs = rng.normal(0, 0.01, 20)
    logs[at:] += size
    assert change_points(logs, [0.01] * 20) == [at]


def test_two_steps_are_found():
    logs = np.repeat([0.0, 0.1, 0.02], 8) + np.random.default_rng(1).normal(0, 0.01, 24)
    assert change_points(logs, [0.01] * 24) == [8, 16]


@given(st.integers(0, 2**32 - 1), st.integers(2, 40))
def test_noise_alone_is_seldom_a_step(seed, n):
    """A step costs 3 log n + 6, which noise pays for less than once in a hundred series."""
    rng = np.random.default_rng(seed)
    found = sum(bool(change_points(rng.normal(0, 0.01, n), [0.01] * n)) for _ in range(20))
    assert found <= 2


def test_one_outlier_with_its_error_is_no_step():
    logs = np.zeros(12)
    logs[5] = 0.2
    errors = np.full(12, 0.01)
    errors[5] = 0.1  # a run on a busy machine knows that it is uncertain
    assert change_points(logs, errors) == []


def test_the_report_holds_all_in_itself_and_marks_the_step(tmp_path):
    for i in range(8):
        store([row(ratio=1.5 if i < 4 else 1.1), row("002 GAN")], MACHINE, tmp_path / "history")
    runs = load(MACHINE, tmp_path / "history")
    points = report.series(runs, "001 GAN", "compiled_over_uncompiled")
    assert report.changes(points) == [4]
    paths = report.write(runs, tmp_path / "out")
    text = paths[0].read_text()
    assert 'src="http' not in text
    assert 'href="http' not in text
    assert text.count("<img") == 4
    assert "002 GAN" in text
    assert all(path.stat().st_size > 1000 for path in paths)
    assert paths[1].read_bytes()[:4] == b"\x89PNG"


def test_no_run_says_how_to_make_one(tmp_path, capsys):
    assert report.main(["--history", str(tmp_path)]) == 2
    assert "nox -s bench" in capsys.readouterr().err


def test_rows_without_a_ratio_are_left_out(tmp_path):
    store([row(over_torch_eager=None, share_of_matmul_peak=None)], MACHINE, tmp_path)
    (run,) = load(MACHINE, tmp_path)
    assert report.series([run], "001 GAN", "over_torch_eager") == []
    assert json.dumps(run.rows)
