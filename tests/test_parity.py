"""The claim of this project: every rung holds for every case, over drawn shapes."""

import pytest
from hypothesis import settings

from mlx_parity import Case, climb, compiles, prove
from mlx_parity.ladder import RUNGS
from tests.cases import CASES, SYSTEMS, seed

SHARES = 2

needs_compiler = pytest.mark.skipif(
    not compiles(), reason="mx.compile compiles nothing here: on Linux it needs g++ at run time"
)


def examples(case: Case) -> int:
    """An eighth of the card's shapes, and one at least."""
    return max(1, settings().max_examples // (8 * case.cost))


@pytest.mark.parametrize(
    ("case", "share"),
    [
        pytest.param(case, share, id=f"{case.name}-{share}")
        for share in range(SHARES)
        for case in CASES
        if share < examples(case)
    ],
)
def test_every_rung_over_drawn_shapes(case: Case, share: int):
    """In shares that processes take side by side; the parity card climbs with all the shapes."""
    fixed = seed(case, share) if settings().derandomize else None
    prove(case, max(1, examples(case) // SHARES), seed=fixed).assert_ok()


@needs_compiler
@pytest.mark.parametrize("case", SYSTEMS, ids=lambda c: c.name)
def test_systems_climb_every_rung(case: Case):
    """No rung is left out unseen: a system has them all, and all its shapes climb each."""
    shapes = min(2, examples(case))
    proof = prove(case, shapes)
    assert set(proof.rows) == set(RUNGS)
    assert {row.examples for row in proof.rows.values()} == {shapes}


@needs_compiler
@pytest.mark.parametrize("case", [c for c in SYSTEMS if c.cost == 1], ids=lambda c: c.name)
def test_at_the_documents_own_size(case: Case):
    """Not of those that are dear at drawn sizes: at their own, a trajectory takes minutes."""
    climb(case, {**case.full_size, "batch": 4}, seed=0).assert_ok()
