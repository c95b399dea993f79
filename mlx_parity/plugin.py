"""The pytest plugin: a fixture that proves a port, and a marker with its options.

    @pytest.mark.mlx_parity(until="gradients")
    def test_port(mlx_parity):
        mlx_parity(Model(), Port(), inputs)

``mlx_parity(...)`` takes what :func:`mlx_parity.check` takes, fails the test unless the port is
equal, and returns the report; ``mlx_parity.check(...)`` only returns it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from mlx_parity.report import Report

MARK = "mlx_parity"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("mlx-parity")
    group.addoption(
        "--mlx-parity-html",
        metavar="DIR",
        type=Path,
        help="write a page for each check that the mlx_parity fixture makes",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MARK}(**options): defaults for the mlx_parity fixture's checks in this test"
    )


class Prover:
    """What the fixture gives."""

    def __init__(self, request: pytest.FixtureRequest):
        self.request = request
        self.options: dict[str, Any] = {}
        for mark in reversed(list(request.node.iter_markers(MARK))):  # the nearest wins
            if mark.args:
                raise pytest.UsageError(f"@pytest.mark.{MARK} takes options by name only")
            self.options |= mark.kwargs
        self.reports: list[Report] = []

    def check(self, reference: Any, port: Any, inputs: Any, **options: Any) -> Report:
        """The report, whatever it says; it is shown if the test fails."""
        report = self._checked(reference, port, inputs, options)
        self.request.node.add_report_section("call", "mlx-parity", str(report))
        return report

    def _checked(self, reference: Any, port: Any, inputs: Any, options: dict[str, Any]) -> Report:
        from mlx_parity.check import check

        name = options.pop("name", None) or self.request.node.name
        report = check(reference, port, inputs, **{**self.options, **options}, name=name)
        self.reports.append(report)
        return report

    def __call__(self, reference: Any, port: Any, inputs: Any, **options: Any) -> Report:
        """The report of a port that is equal; the test fails otherwise, with the report."""
        __tracebackhide__ = True
        report = self._checked(reference, port, inputs, options)
        if not report.ok:
            pytest.fail(str(report), pytrace=False)
        return report


@pytest.fixture
def mlx_parity(request: pytest.FixtureRequest) -> Iterator[Prover]:
    """Prove MLX ports of PyTorch models: call it as ``mlx_parity.check``."""
    prover = Prover(request)
    yield prover
    folder = request.config.getoption("--mlx-parity-html")
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    for i, report in enumerate(prover.reports):
        name = "".join(c if c.isalnum() else "-" for c in request.node.name)
        report.to_html(folder / (f"{name}-{i}.html" if i else f"{name}.html"))
