"""The catalogue of traps: each naive port fails, each fixed one passes, each page is up to date."""

import importlib.util
import re
from pathlib import Path

import pytest

from mlx_parity import compiles
from mlx_parity.traps import CATALOGUE, FAMILIES, Trap, find, held
from mlx_parity.traps.pages import NO_ENTRY, SURVEY, main, pages

DOCS = Path(__file__).parents[1] / "docs" / "traps"

TRAPS = [
    pytest.param(
        trap,
        id=trap.id,
        marks=pytest.mark.skipif(
            trap.family == "compile" and not compiles(), reason="mx.compile compiles nothing here"
        ),
    )
    for trap in CATALOGUE.values()
]


@pytest.mark.parametrize("trap", TRAPS)
def test_the_naive_port_fails_and_the_fixed_one_passes(trap: type[Trap]):
    naive, fixed = held(trap, "naive"), held(trap, "fixed")
    assert naive.shows == trap.shows, str(naive)
    assert fixed.shows == "equal", str(fixed)
    if trap.shows == "different" and trap.error:
        assert naive.error == pytest.approx(trap.error, rel=0.1)
    else:  # noise has no repeatable size, and a zero has no relative error
        assert (trap.error is None) == (not naive.error)


@pytest.mark.parametrize("trap", CATALOGUE.values(), ids=lambda t: t.id)
def test_an_entry_is_whole(trap: type[Trap]):
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", trap.id)
    assert trap.family in FAMILIES
    assert trap.why().endswith(".")
    assert trap.fix
    assert not re.search(r"[^.]\.$", trap.fix)


def test_every_row_of_the_survey_is_an_entry_or_has_a_reason():
    assert list(SURVEY) == ["1", "2", "3", "4", "4b", *map(str, range(5, 63))]
    covered = {row for trap in CATALOGUE.values() for row in trap.rows}
    assert covered | set(NO_ENTRY) == set(SURVEY)
    assert not covered & set(NO_ENTRY)


def test_the_pages_are_up_to_date(tmp_path: Path):
    """``python -m mlx_parity.traps.pages docs/traps`` brings them there."""
    (tmp_path / "gone.md").write_text("of a trap that was renamed")
    main([str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == set(pages())
    for path in tmp_path.iterdir():
        assert (DOCS / path.name).read_text(encoding="utf-8") == path.read_text(encoding="utf-8")
    assert {p.name for p in DOCS.glob("*.md")} == set(pages())


def test_every_link_between_pages_leads_somewhere():
    for name, text in pages().items():
        for target in re.findall(r"\]\(([^)]+\.md)\)", text):
            assert (DOCS / target).exists() or "bias-and-noise" in target, f"{name}: {target}"


def test_an_unknown_id_names_its_neighbours():
    assert find("norm-eps").title == "A normalisation's eps differs"
    with pytest.raises(KeyError, match="did you mean norm-groups"):
        find("norm-group")
    with pytest.raises(KeyError, match="there is no trap 'zzz'"):
        find("zzz")


def test_two_traps_cannot_share_an_id():
    with pytest.raises(ValueError, match="two traps are called 'norm-eps'"):

        class Second(CATALOGUE["norm-eps"]):
            id = "norm-eps"


def test_the_figures_about_bias_and_noise_are_measured():
    path = DOCS.parent / "figures.py"
    spec = importlib.util.spec_from_file_location("figures", path)
    figures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(figures)
    text = (DOCS.parent / "bias-and-noise.md").read_text(encoding="utf-8")
    for name, row in figures.measure().items():
        (line,) = re.findall(rf"^\| {re.escape(name)} \|(.*)\|$", text, re.MULTILINE)
        shown = [float(cell) for cell in line.split("|")]
        # Rounding itself, noise and a correct port's bias, is the machine's; the rest is not.
        loose = 0.5 if name == "correct" else 0.1
        assert shown[:1] == pytest.approx([row["error"]], rel=loose)
        assert shown[1:] == pytest.approx([row[k] for k in list(row)[1:]], rel=0.5)
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", text):
        assert (DOCS.parent / picture).exists()
