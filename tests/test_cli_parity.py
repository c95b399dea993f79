"""``mlx-parity``: every command, its exit code, its JSON, and what it says of a bad file."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch

from mlx_parity.cli import main

EXAMPLES = Path(__file__).parents[1] / "examples"

CASE = """
import mlx.nn as mnn
import torch
reference = torch.nn.Linear(3, 2)
port = mnn.Linear(3, 2)
inputs = torch.randn(4, 3)
"""


def written(folder: Path, text: str, name: str = "case.py") -> str:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return str(path)


def run(capsys: Any, *arguments: str) -> tuple[int, Any]:
    """The exit code and what was printed as JSON."""
    code = main([*arguments, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_check_prints_the_report_and_its_code(capsys: Any):
    assert main(["check", f"{EXAMPLES}/quickstart.py", "--no-compile"]) == 0
    printed = capsys.readouterr().out
    assert "quickstart: equal" in printed
    assert "gradients" in printed


def test_check_as_json_and_as_a_page(capsys: Any, tmp_path: Path):
    page = tmp_path / "page.html"
    target = f"{EXAMPLES}/training.py::adam_without_bias_correction"
    code, (report,) = run(capsys, "check", target, "--no-compile", "--html", str(page))
    assert code == 1
    assert report["verdict"] == "different"
    assert "bias_correction" in json.dumps(report["diagnoses"])
    assert "<svg" in page.read_text() or "optimizer step" in page.read_text()


def test_check_of_all_cases_is_different_if_one_is(capsys: Any, tmp_path: Path):
    text = """
import mlx.nn as mnn
import torch
def case_right():
    return dict(reference=torch.nn.Linear(3, 2), port=mnn.Linear(3, 2), inputs=torch.randn(4, 3))
def case_wrong():
    return {**case_right(), "call_port": lambda port, x: port(x) * 2}
def case_broken():
    return {**case_right(), "inputs": torch.randn(4, 5)}
"""
    path = written(tmp_path, text)
    code, reports = run(capsys, "check", path, "--until", "forward", "--no-compile")
    assert code == 1
    assert [r["verdict"] for r in reports] == ["equal", "different", "undecided"]
    assert run(capsys, "check", f"{path}::broken", "--no-compile")[0] == 2
    code, (one,) = run(capsys, "check", f"{path}::right", "--until", "forward", "--no-compile")
    assert (code, one["name"]) == (0, "right")


def test_check_of_a_case_whose_shapes_are_drawn(capsys: Any, tmp_path: Path):
    text = """
import mlx.core as mx
import torch
from hypothesis import strategies as st
from mlx_parity import Case, Loss, System
def case_square():
    return Case("square", st.fixed_dictionaries({"n": st.integers(1, 4)}),
        lambda lib, shape: System(losses={"l": Loss(lambda x: (x * x).mean())}), torch, mx,
        lambda shape, rng: {"x": rng.standard_normal(shape["n"])})
"""
    path = written(tmp_path, text)
    code, (report,) = run(capsys, "check", path, "--examples", "2", "--no-compile")
    assert (code, report["verdict"]) == (0, "equal")


DRAWN = """
import mlx.core as mx
import mlx.nn as mnn
import torch
from hypothesis import strategies as st
from mlx_parity import Case, Loss, System

class Theirs(torch.nn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.norm = torch.nn.Linear(3, width), torch.nn.LayerNorm(width)
    def forward(self, x):
        return self.norm(self.a(x))

class Ours(mnn.Module):
    def __init__(self, width):
        super().__init__()
        self.a, self.norm = mnn.Linear(3, width), mnn.LayerNorm(width, eps=1e-3)
    def __call__(self, x):
        return self.norm(self.a(x))

def build(net, shape):
    net = net(shape["width"])
    forward = lambda x: {"y": net(x)}
    loss = Loss(lambda x: (net(x) ** 3).mean(), ("net",))
    return System({"net": net}, forward, {"cubes": loss})

CASES = (Case("norm", st.fixed_dictionaries({"n": st.integers(1, 9), "width": st.integers(2, 9)}),
    build, Theirs, Ours, lambda shape, rng: {"x": rng.standard_normal((shape["n"], 3))}),)
"""


def test_a_case_that_fails_is_shrunk_located_and_explained(capsys: Any, tmp_path: Path):
    page = tmp_path / "page.html"
    path = written(tmp_path, DRAWN)
    arguments = ("--examples", "3", "--no-compile", "--html", str(page))
    code, (report,) = run(capsys, "check", f"{path}::norm", *arguments)
    assert (code, report["verdict"]) == (1, "different")
    assert [g["reference"] for g in report["guilty"]] == ["norm"]
    assert report["diagnoses"][0]["trap_id"] == "norm-eps"
    assert "found at {'n': 1, 'width': 2}" in " ".join(report["notes"])
    assert {m["reference"] for m in report["modules"]} == {"", "a", "norm"}
    assert "<svg" in page.read_text()


WORSE_ABOVE = """
import mlx.core as mx
import mlx.nn as mnn
import torch
from hypothesis import strategies as st
from mlx_parity import Case, Loss, System

class Ours(mnn.Linear):
    def __init__(self):
        super().__init__(3, 2)
        self.freeze(keys="bias")

def build(side, shape):
    layer, power = side
    net = layer()
    loss = Loss(lambda x: (net(x) ** power).mean(), ("net",))
    return System({"net": net}, lambda x: {"y": net(x)}, {"powers": loss})

CASES = (Case("linear", st.fixed_dictionaries({"n": st.integers(1, 9)}), build,
    (lambda: torch.nn.Linear(3, 2), 2), (Ours, 4),
    lambda shape, rng: {"x": rng.standard_normal((shape["n"], 3))}),)
"""


@pytest.mark.parametrize(
    ("until", "code", "rungs"),
    [
        ("structure", 0, {"structure": True}),
        ("forward", 0, {"structure": True, "forward": True}),
        ("loss", 1, {"structure": True, "forward": True, "loss": False}),
        ("gradients", 1, {"structure": False}),
    ],
)
def test_the_last_rung_of_drawn_shapes(
    capsys: Any, tmp_path: Path, until: str, code: int, rungs: dict[str, bool]
):
    """The port's bias is frozen, which nobody asks who compares no gradients; its loss differs."""
    path = written(tmp_path, WORSE_ABOVE)
    found, (report,) = run(capsys, "check", path, "--until", until, "--examples", "2")
    assert found == code
    assert {r["rung"]: r["ok"] for r in report["rungs"]} == rungs
    notes = " ".join(report["notes"])
    if code == 0:
        assert "bias is frozen in the port and trains in the reference" in notes
    else:
        assert f"until={until!r})" in notes


def test_of_drawn_shapes_a_last_rung_that_is_none_is_refused(capsys: Any, tmp_path: Path):
    path = written(tmp_path, WORSE_ABOVE)
    code, (report,) = run(capsys, "check", path, "--until", "backward", "--variants")
    assert (code, report["verdict"]) == (2, "undecided")
    assert "until='backward': the rungs are structure, forward" in report["problem"]
    assert "--variants is for a model at one input" in " ".join(report["notes"])


@pytest.mark.parametrize(
    ("text", "target", "said"),
    [
        (None, "nowhere.py", "there is no file"),
        (
            "x = 1\n1/0\n",
            "case.py",
            "does not import: ZeroDivisionError: division by zero (line 2)",
        ),
        ("def f(:\n", "case.py", "SyntaxError"),
        ("import nothing_like_it\n", "case.py", "No module named 'nothing_like_it' (line 1)"),
        ("x = 1\n", "case.py", "holds no case"),
        (CASE, "case.py::other", "has no case 'other'; it has case"),
        ("def case_a():\n    raise ValueError('mine')\n", "case.py", "ValueError: mine (line 2)"),
        ("def case_a():\n    return 3\n", "case.py", "it has to give a dict"),
        (
            "def case_a():\n    return dict(reference=1, port=2, inputs=3, eps=4)\n",
            "case.py",
            "gives eps, which check() does not take",
        ),
    ],
)
def test_a_bad_case_file_is_its_own_fault(
    capsys: Any, tmp_path: Path, text: str | None, target: str, said: str
):
    if text is not None:
        written(tmp_path, text)
    code = main(["check", str(tmp_path / target)])
    both = capsys.readouterr()
    assert code == 2
    assert said in " ".join((both.out + both.err).replace(str(tmp_path), "").split())
    assert "Traceback" not in both.out + both.err


def test_lint_reads_the_trees_and_the_optimizers(capsys: Any, tmp_path: Path):
    code, found = run(capsys, "lint", f"{EXAMPLES}/training.py")
    assert code == 1
    said = {(f["case"], f["trap_id"]) for f in found}
    assert ("adam_without_bias_correction", "adam-bias-correction") in said
    assert ("adam", "adam-bias-correction") not in said
    assert main(["lint", written(tmp_path, CASE)]) == 0
    assert "no known trap" in capsys.readouterr().out


def test_traps_and_explain(capsys: Any):
    code, rows = run(capsys, "traps")
    assert code == 0
    assert len(rows) > 40
    assert main(["traps"]) == 0
    assert rows[0]["id"] in capsys.readouterr().out
    assert main(["explain", rows[0]["id"]]) == 0
    assert "The fix" in capsys.readouterr().out
    code, told = run(capsys, "explain", rows[0]["id"])
    assert told["fix"] == rows[0]["fix"]
    assert main(["explain", rows[0]["id"][:-1] + "x"]) == 2
    assert "did you mean" in capsys.readouterr().err


def test_every_command_has_help(capsys: Any):
    for command in ("check", "lint", "explain", "traps", "convert"):
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "--json" in capsys.readouterr().out


def test_the_module_runs_as_a_command():
    done = subprocess.run(
        [sys.executable, "-m", "mlx_parity", "--help"], capture_output=True, text=True, check=True
    )
    assert "Exit codes: 0 equal, 1 different, 2 could not be judged" in done.stdout


# -------------------------------------------------------------------------------- convert

CONV = """
import mlx.core as mx
import mlx.nn as mnn
import torch
class T(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 3, 3)
        self.rnn = torch.nn.LSTM(3, 2)
class M(mnn.Module):
    def __init__(self):
        super().__init__()
        self.stem = mnn.Conv2d(3, 3, 3)
        self.lstm = mnn.LSTM(3, 2)
reference, port, inputs = T(), M(), torch.zeros(1)
"""


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_weights_there_and_back(capsys: Any, tmp_path: Path, suffix: str):
    case = written(tmp_path, CONV)
    model = {
        "conv.weight": torch.randn(3, 3, 3, 3),
        "conv.bias": torch.randn(3),
        "rnn.weight_ih_l0": torch.randn(8, 3),
        "rnn.weight_hh_l0": torch.randn(8, 2),
        "rnn.bias_ih_l0": torch.randn(8),
        "rnn.bias_hh_l0": torch.randn(8),
    }
    source, there, back = (tmp_path / n for n in (f"a.{suffix}", "b.safetensors", "c.pth"))
    if suffix == "pth":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in model.items()}}, source)
    else:
        mx.save_safetensors(str(source), {k: mx.array(v.numpy()) for k, v in model.items()})
    code, told = run(capsys, "convert", str(source), str(there), "--case", case)
    assert (code, told["tensors"]) == (0, 5)
    made = mx.load(str(there))
    kernel = model["conv.weight"].numpy().transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(np.array(made["stem.weight"]), kernel)
    assert main(["convert", str(there), str(back), "--case", case]) == 0
    again = torch.load(back, weights_only=True)
    for name in ("conv.weight", "conv.bias", "rnn.weight_hh_l0"):
        assert torch.equal(again[name], model[name])
    total = again["rnn.bias_ih_l0"] + again["rnn.bias_hh_l0"]
    assert torch.equal(total, model["rnn.bias_ih_l0"] + model["rnn.bias_hh_l0"])


class Harmful:
    def __reduce__(self) -> Any:
        return (print, ("this must not be executed",))


def test_a_checkpoint_is_never_unpickled(capsys: Any, tmp_path: Path):
    case = written(tmp_path, CONV)
    torch.save({"conv.weight": Harmful()}, tmp_path / "a.pth")
    arguments = [str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--case", case]
    assert main(["convert", *arguments]) == 2
    both = capsys.readouterr()
    assert "is not unpickled" in both.err
    assert "this must not be executed" not in both.out
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"conv.weight": torch.zeros(3, 3, 3, 3)}, "lacks conv.bias"),
        ({"step": 3}, "holds no tensors"),
    ],
)
def test_a_checkpoint_of_something_else_is_refused(
    capsys: Any, tmp_path: Path, state: dict[str, Any], said: str
):
    case = written(tmp_path, CONV)
    torch.save(state, tmp_path / "a.pth")
    arguments = [str(tmp_path / "a.pth"), str(tmp_path / "b.safetensors"), "--case", case]
    assert main(["convert", *arguments]) == 2
    assert said in capsys.readouterr().err
