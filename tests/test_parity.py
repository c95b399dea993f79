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


@pytest.mark.parametrize("share", range(SHARES))
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_rung_over_drawn_shapes(case: Case, share: int):
    """Half of the profile's shapes, fewer of a case that is dear, in shares that processes take
    side by side; the parity card climbs with all of them."""
    fixed = seed(case, share) if settings().derandomize else None
    examples = settings().max_examples // (2 * SHARES * case.cost)
    prove(case, max(1, examples), seed=fixed).assert_ok()


@needs_compiler
@pytest.mark.parametrize("case", SYSTEMS, ids=lambda c: c.name)
def test_systems_climb_every_rung(case: Case):
    """No rung is left out unseen: a system has them all, and all its shapes climb each."""
    proof = prove(case, 2)
    assert set(proof.rows) == set(RUNGS)
    assert {row.examples for row in proof.rows.values()} == {2}


@needs_compiler
@pytest.mark.parametrize("case", [c for c in SYSTEMS if c.cost == 1], ids=lambda c: c.name)
def test_at_the_documents_own_size(case: Case):
    """Not of those that are dear at drawn sizes: at their own, a trajectory takes minutes."""
    climb(case, {**case.full_size, "batch": 4}, seed=0).assert_ok()
