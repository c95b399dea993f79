"""ERRATA.md itself: it is complete, and what it says is shown by tests that exist.

The tests that it names stand in ``test_errata_*.py``, one file for each document.
"""

import re

from tests.frameworks import REPOSITORY


def entries() -> dict[str, tuple[set[str], str]]:
    """Each entry's number, with its classes and its text."""
    text = (REPOSITORY / "ERRATA.md").read_text(encoding="utf-8")
    parts = re.split(r"^\*\*(R\d+|\d{3}-E\d+)\*\* · ([A-Z, ]+) · ", text, flags=re.MULTILINE)
    numbers, classes, texts = parts[1::3], parts[2::3], parts[3::3]
    assert len(set(numbers)) == len(numbers)
    return {n: (set(c.split(", ")), t) for n, c, t in zip(numbers, classes, texts, strict=True)}


def test_errata_lists_every_entry():
    """All 125 of the five documents, and the 16 that they share, in order."""
    entries_of = {"001": 21, "002": 20, "000": 27, "003": 28, "004": 29}
    expected = [f"R{i}" for i in range(1, 17)]
    expected += [f"{doc}-E{i}" for doc, n in entries_of.items() for i in range(1, n + 1)]
    assert list(entries()) == expected


def test_every_entry_has_its_repair_and_every_wrong_number_its_test():
    for number, (classes, text) in entries().items():
        assert "*Repair:*" in text, number
        wrong = classes & {"MATH", "SHAPE", "SEM", "COST", "TRAP"}
        assert re.search(r"`\S*test_\w+`", text) or not wrong, number


def test_every_test_that_errata_names_exists():
    here = [p.read_text(encoding="utf-8") for p in (REPOSITORY / "tests").glob("test_errata_*.py")]
    for number, (_, text) in entries().items():
        for file, name in re.findall(r"`(?:(tests/\w+\.py)::)?(test_\w+)", text):
            sources = [(REPOSITORY / file).read_text(encoding="utf-8")] if file else here
            assert any(f"def {name}(" in source for source in sources), f"{number} names {name}"
