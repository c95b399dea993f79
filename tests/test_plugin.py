"""The pytest plugin, in a run of its own."""

from importlib.metadata import entry_points
from pathlib import Path

import pytest

pytest_plugins = "pytester"

EXAMPLES = Path(__file__).parents[1] / "examples"
INSTALLED = any(e.value == "mlx_parity.plugin" for e in entry_points(group="pytest11"))
LOADED = () if INSTALLED else ("-p", "mlx_parity.plugin")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package, also where it is not installed."""
    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))


def test_fixture_marker_and_pages(pytester: pytest.Pytester):
    pytester.makepyfile(
        """
        import mlx.nn as mnn
        import pytest
        import torch

        torch.manual_seed(0)
        X = torch.randn(4, 3)

        @pytest.mark.mlx_parity(until="forward", compiled=False)
        def test_equal(mlx_parity):
            report = mlx_parity(torch.nn.Linear(3, 2), mnn.Linear(3, 2), X)
            assert [r.name for r in report.rungs] == ["structure", "forward"]

        @pytest.mark.mlx_parity(until="forward", compiled=False)
        def test_different(mlx_parity):
            call = lambda port, x: port(x) + 1
            mlx_parity(torch.nn.Linear(3, 2), mnn.Linear(3, 2), X, call_port=call)

        @pytest.mark.mlx_parity("forward")
        def test_wrongly_marked(mlx_parity):
            pass
        """
    )
    arguments = (
        *LOADED,
        "--strict-markers",
        "--mlx-parity-html",
        "pages",
        "-p",
        "no:cacheprovider",
    )
    result = pytester.runpytest_subprocess(*arguments)
    result.assert_outcomes(passed=1, failed=1, errors=1)
    result.stdout.fnmatch_lines(
        ["*takes options by name only*", "*test_different: different in forward*"]
    )
    pages = sorted(p.name for p in (pytester.path / "pages").iterdir())
    assert pages == ["test-different.html", "test-equal.html"]
    assert "<svg" in (pytester.path / "pages" / "test-different.html").read_text()


def test_the_example_test_passes(pytester: pytest.Pytester):
    for name in ("quickstart.py", "test_port.py"):
        (pytester.path / name).write_text((EXAMPLES / name).read_text())
    result = pytester.runpytest_subprocess(*LOADED, "-p", "no:cacheprovider")
    result.assert_outcomes(passed=2)
