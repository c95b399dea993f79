"""The parity card: what it says of every shape that was drawn, and of the rungs it leaves empty."""

import io
import json
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from rich.console import Console

from mlx_parity import Proof, card, prove
from mlx_parity.ladder import Rung
from tests import parity_card
from tests.cases import CASES

LOSS = next(case for case in CASES if case.name == "bce_with_logits")


def proof(*shapes: dict) -> Proof:
    made = Proof(LOSS)
    for seed, shape in enumerate(shapes):
        made.add([Rung("structure", True)], shape, seed)
    return made


def test_ranges_of_numbers_lists_and_words():
    made = proof(
        {"batch": 3, "size": (4, 9), "widths": [1], "beta": 0.5, "clip": True, "kind": "a"},
        {"batch": 1, "size": (2, 9), "widths": [2, 7], "beta": 1e-4, "clip": False, "kind": "b"},
    )
    assert made.ranges() == {
        "batch": "1-3",
        "size": "2-4 9",
        "widths": "1-7 (1-2 of them)",
        "beta": "0.0001-0.5",
        "clip": "False|True",
        "kind": "a|b",
    }
    assert proof({"at": ()}).ranges() == {"at": "none"}
    assert proof(*({"taps": f"conv{i}"} for i in range(9))).ranges() == {"taps": "9 different"}


def test_what_other_processes_drew_counts():
    here, there = proof({"batch": 2}), proof({"batch": 7, "only": 1})
    here.merge(there)
    assert here.ranges() == {"batch": "2-7", "only": "1"}


def test_the_card_lists_what_was_drawn():
    """On the page and in each row of the file; the ranges hold what each row's worst shape had."""
    made = prove(LOSS, 5, seed=0, compiled=False)
    least, _, greatest = made.ranges()["batch"].partition("-")
    assert 1 <= int(least) < int(greatest) <= 40
    for row in card.rows([made]):
        assert row["drawn"] == made.ranges()
        worst = row["shape"].get("batch", int(least))  # none where nothing is rounded
        assert int(least) <= worst <= int(greatest)
    page = io.StringIO()
    card.show([made], Console(file=page, width=160))
    assert f"batch {made.ranges()['batch']}" in page.getvalue()
    assert "Empty: there is nothing of the kind." in " ".join(page.getvalue().split())


class DyingPool:
    """Its processes climb, until one takes the case that kills it."""

    def __init__(self, *_: object, **__: object):
        self.dead = False

    def __enter__(self):
        return self

    def __exit__(self, *_: object):
        pass

    def submit(self, climb, name: str, *rest: Any) -> Future:
        future: Future = Future()
        self.dead |= name == "two_logit_loss"
        if self.dead:
            future.set_exception(BrokenProcessPool("a process was terminated abruptly"))
        else:
            future.set_result(climb(name, *rest))
        return future

    def shutdown(self, **_: object):
        pass


def test_a_climb_that_dies_takes_no_finished_case_along(monkeypatch, tmp_path, capsys):
    report = tmp_path / "parity.json"
    monkeypatch.setattr(parity_card, "ProcessPoolExecutor", DyingPool)
    monkeypatch.setattr(parity_card, "REPORT", report)
    assert parity_card.main(["bce_with_logits", "two_logit_loss", "--examples", "2"]) == 1
    assert {row["model"] for row in json.loads(report.read_text())} == {"bce_with_logits"}
    assert "process died, without 1 cases: two_logit_loss" in capsys.readouterr().out
