"""The score itself: what it is made of, a correct port of every family, and a few faults."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mlx_parity import RUNGS, compiles
from mlx_parity.traps import CATALOGUE
from tests.score import FAMILIES
from tests.score.__main__ import score, table, write
from tests.score.run import TRIES, alarm, find, rng

FAULTS = [(family, fault) for family in FAMILIES for fault in family.faults]


def test_there_are_faults_enough_and_subtle_ones():
    assert len(FAMILIES) >= 12
    assert len(FAULTS) >= 80
    assert sum(fault.subtle for _, fault in FAULTS) >= 10
    for family in FAMILIES:
        names = [fault.name for fault in family.faults]
        assert len(set(names)) == len(names)


@pytest.mark.parametrize(("family", "fault"), FAULTS, ids=lambda x: x.name)
def test_a_fault_says_where_it_is_and_why(family, fault):
    assert set(fault.why) <= set(CATALOGUE), fault.name
    modules = {"", "weights", *RUNGS}
    example = family.build(rng(family, 0))
    if hasattr(example.reference, "named_modules"):
        modules |= {name for name, _ in example.reference.named_modules()}
    assert set(fault.places) <= modules


@pytest.mark.parametrize("name", [family.name for family in FAMILIES])
def test_a_correct_port_raises_no_alarm(name: str):
    assert alarm(name, 1) == ""


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("MLP GAN", "slope 1e-5 off"),
        ("CNN", "momentum 0.101"),
        ("U-Net", "GroupNorm eps 20 % off"),
        ("MLP", "a bias not added"),
        ("MLP", "a frozen layer"),
        ("MLP", "layers in a tuple"),
        ("optimizers: SGD", "momentum 0.901"),
        ("optimizers: Adam", "SGD"),
        ("losses", "summed"),
        ("DCGAN", "evaluation mode"),
        ("embedding, tied", "positions from 1"),
    ],
)
def test_a_fault_is_found_located_and_explained(family: str, fault: str):
    row = find(family, fault)
    assert (row.detected, row.located, row.explained) == (True, True, True), row


@pytest.mark.skipif(not compiles(), reason="mx.compile compiles nothing here")
def test_a_compiled_fault_is_found():
    row = find("compiled steps", "a number that changes")
    assert (row.detected, row.explained) == (True, True)


def test_the_report_counts_and_lists(tmp_path: Path):
    row = find("losses", "summed")
    missed = replace(row, fault="another", detected=False, located=False, explained=False, rung="")
    found = score([row, missed], 7, [{"family": "MLP", "seed": 3, "message": "said"}])
    write(found, tmp_path / "reports" / "score.json")
    read = json.loads((tmp_path / "reports" / "score.json").read_text())
    names = ("faults", "families", "detected", "located", "explained", "false_alarms", "examples")
    assert [read[n] for n in names] == [2, 1, 1, 1, 1, 1, 7]
    assert read["rows"][0]["diagnoses"] == ["loss-reduction"]
    console = Console(width=120, record=True)
    console.print(table([row, missed]))
    assert "another (not seen)" in console.export_text()


def test_a_fault_is_looked_for_at_several_shapes():
    assert TRIES > 1
    drawn = [FAMILIES[0].build(rng(FAMILIES[0], seed)).inputs.shape for seed in range(TRIES)]
    assert len(set(drawn)) > 1
