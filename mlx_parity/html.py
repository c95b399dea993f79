"""A report as one page that needs no network: verdict, module tree, and the two paths drawn."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from mlx_parity import card

if TYPE_CHECKING:
    from mlx_parity.equality import Finding
    from mlx_parity.localise import Reading
    from mlx_parity.report import Report

STYLE = """
:root { color-scheme: light dark; --ink: #1c1e21; --paper: #fff; --faint: #6b7280; --line: #d5d9df;
  --equal: #1a7f4b; --different: #c4261d; --undecided: #9a6700; --calm: #2f6fb3; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --paper: #16181b; --faint: #9aa1ab;
  --line: #3a3f46; --equal: #46c07f; --different: #ff6b61; --undecided: #e0a82e;
  --calm: #6fb0f0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 72rem; margin: 2rem auto; padding: 0 1.25rem; }
h1 { font-size: 1.4rem; margin: 0 0 .25rem; } h2 { font-size: 1.05rem; margin: 2rem 0 .5rem; }
.equal { color: var(--equal); } .different { color: var(--different); }
.undecided { color: var(--undecided); } .faint { color: var(--faint); }
table { border-collapse: collapse; } th { text-align: left; font-weight: 600; }
td, th { padding: .15rem .9rem .15rem 0; border-bottom: 1px solid var(--line); }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: 13px/1.5 ui-monospace, monospace; } pre { white-space: pre-wrap; }
.tree { font: 13px/1.6 ui-monospace, monospace; } .tree div { white-space: pre; }
.dot { display: inline-block; width: .7em; height: .7em; border-radius: 50%; margin-right: .5em; }
.box { border-left: 4px solid var(--different); padding: .25rem 0 .25rem 1rem; margin: 1rem 0; }
svg { width: 100%; height: auto; } svg text { fill: var(--ink); font: 11px system-ui, sans-serif; }
"""


def page(report: Report) -> str:
    """The whole page."""
    from mlx_parity.report import FAULTS, versions

    v = report.verdict
    where = ", ".join(f"{k} {n}" for k, n in versions().items())
    parts = [
        f"<h1>{escape(report.name)} <span class={v}>{_said(v)}</span></h1>",
        f'<p class="faint">{escape(card.device())}; {escape(where)}; {report.seconds:.1f} s</p>',
    ]
    if v == "undecided":
        fault = FAULTS.get(report.fault, "")
        parts.append(f'<p class="undecided">{escape(report.problem)}</p><p>{escape(fault)}</p>')
    parts += [_guilty(report), _diagnoses(report), _rungs(report)]
    if report.readings:
        parts += [
            "<h2>Along the forward pass</h2>",
            _path(report.readings, "forward", "isolated"),
            "<h2>Along the backward pass</h2>",
            _path(report.readings[::-1], "backward", "isolated_backward"),
            _legend(),
            "<h2>Modules</h2>",
            _tree(report.readings),
        ]
    if report.unpaired:
        parts.append(_unpaired(report))
    lines = [*([f"Weights: {report.carried}."] if report.carried else []), *report.notes]
    lines += [f"{name}: {how}" for name, how in report.layouts.items()]
    if lines:
        items = "".join(f"<li>{escape(line)}</li>" for line in lines)
        parts.append(f"<h2>What was assumed and noticed</h2><ul>{items}</ul>")
    body = "\n".join(p for p in parts if p)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(report.name)}: {v}</title><style>{STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _said(verdict: str) -> str:
    return {"equal": "equal", "different": "different"}.get(verdict, "could not be judged")


def _guilty(report: Report) -> str:
    from mlx_parity.report import alike, describe

    boxes = []
    for g, *others in alike(report.guilty):
        names = _more([o.pair.reference_path for o in others], "The same kind differs in")
        boxes.append(
            f'<div class="box"><strong>Guilty, {g.direction}: <code>{escape(g.where)}</code>'
            f"</strong><br>{escape(describe(g.finding))}. Its inputs agree.{names}</div>"
        )
    return "".join(boxes)


def _diagnoses(report: Report) -> str:
    from mlx_parity.report import causes

    return "".join(
        f'<div class="box"><strong>{escape(d.trap_id)} {escape(d.title)}</strong>'
        f"<br><code>{escape(places[0])}</code>{_more(places[1:], 'The same is seen in')}"
        f"<br>{escape(d.evidence)}<br>Fix: {escape(d.fix)}</div>"
        for d, places in causes(report.diagnoses)
    )


def _more(names: Sequence[str], said: str) -> str:
    if not names:
        return ""
    listed = ", ".join(f"<code>{escape(n)}</code>" for n in names)
    summary = f"{said} {len(names)} more"
    return f"<details><summary>{summary}</summary>{listed}</details>"


def _rungs(report: Report) -> str:
    from mlx_parity.report import share

    if not report.rungs:
        return ""
    rows = []
    for rung in report.rungs:
        worst = rung.worst
        verdict = "equal" if rung.ok else "different"
        figures = ["", "", ""]
        if worst is not None and not math.isnan(worst.bias):
            figures = [f"{share(worst):.2f}", f"{worst.noise:.2g}", f"{worst.relative_error:.1g}"]
        said = escape(rung.message or (worst.tensor if worst is not None else ""))
        cells = "".join(f"<td class=number>{f}</td>" for f in figures)
        rows.append(
            f"<tr><td>{rung.name}</td><td class={verdict}>{verdict}</td>{cells}"
            f"<td><code>{said}</code></td></tr>"
        )
    head = "<th>rung<th><th>bias / bound<th>noise<th>relative error<th>decided by"
    return f"<h2>The ladder</h2><table><tr>{head}</tr>{''.join(rows)}</table>"


def _colour(finding: Finding | None) -> str:
    if finding is None:
        return "var(--line)"
    return "var(--equal)" if finding.ok else "var(--different)"


def _height(value: float) -> float:
    """0 to 1 on a logarithmic scale from 0.01 to 1,000."""
    if math.isnan(value) or math.isinf(value):
        return 1.0
    return min(max((math.log10(max(value, 1e-9)) + 2) / 5, 0.0), 1.0)


def _path(readings: Sequence[Reading], kind: str, isolated: str) -> str:
    """Bias (bars, as a share of the bound; ticks: isolated) and noise (line) by module."""
    from mlx_parity.report import share

    shown = [r for r in readings if getattr(r, kind) is not None]
    if not shown:
        return '<p class="faint">not read</p>'
    width, height, left, foot = max(640, 14 * len(shown) + 80), 190, 60, 16
    step = (width - left - 10) / len(shown)

    def y(value: float) -> float:
        return foot + (height - foot) * (1 - _height(value))

    marks = [
        f'<line x1="{left}" x2="{width}" y1="{y(1):.1f}" y2="{y(1):.1f}" '
        'stroke="var(--different)" stroke-dasharray="4 3"/>',
        f'<text x="0" y="{y(1) + 4:.1f}">the bound</text>',
    ]
    for value in (0.01, 0.1, 10, 100, 1000):
        marks.append(f'<text x="20" y="{y(value) + 4:.1f}">{value:g}</text>')
    line = []
    for i, reading in enumerate(shown):
        finding: Finding = getattr(reading, kind)
        alone: Finding | None = getattr(reading, isolated)
        x = left + i * step
        top = y(share(finding))
        title = escape(f"{reading.pair.name}\n{finding}")
        marks.append(
            f'<rect x="{x:.1f}" y="{top:.1f}" width="{step * 0.7:.1f}" '
            f'height="{max(height - top, 1):.1f}" fill="{_colour(finding)}">'
            f"<title>{title}</title></rect>"
        )
        if alone is not None:
            at = y(share(alone))
            marks.append(
                f'<line x1="{x - 1:.1f}" x2="{x + step * 0.7 + 1:.1f}" y1="{at:.1f}" '
                f'y2="{at:.1f}" stroke="var(--ink)" stroke-width="2">'
                f"<title>alone: {escape(str(alone))}</title></line>"
            )
        line.append(f"{x + step * 0.35:.1f},{y(finding.noise):.1f}")
    marks.append(
        f'<polyline points="{" ".join(line)}" fill="none" stroke="var(--calm)" stroke-width="1.5"/>'
    )
    names = shown if len(shown) <= 40 else shown[:: len(shown) // 40 + 1]
    for reading in names:
        x = left + shown.index(reading) * step + step * 0.4
        name = escape(reading.pair.reference_path or "the whole")
        marks.append(f'<text transform="translate({x:.1f},{height + 8}) rotate(60)">{name}</text>')
    longest = max(len(r.pair.reference_path) for r in names)
    tall = height + 20 + min(6 * longest, 200)
    label = f"Bias and noise of each module along the {kind} pass"
    return (
        f'<svg viewBox="0 0 {width} {tall}" role="img" aria-label="{label}">{"".join(marks)}</svg>'
    )


def _legend() -> str:
    return (
        '<p class="faint">Bars: bias as a share of its bound, 1 being the limit (logarithmic); '
        "green agrees, red differs. Black ticks: the same with the reference's own inputs, so that "
        "an earlier fault does not count. Blue line: noise, the port's rounding over PyTorch's, "
        "1 being alike.</p>"
    )


def _tree(readings: Sequence[Reading]) -> str:
    from mlx_parity.report import share

    rows = []
    wrong = any(r.forward is not None and not r.forward.ok for r in readings)
    for reading in sorted(readings, key=lambda r: _sorting(r.pair.reference_path)):
        path = reading.pair.reference_path
        indent = "  " * (path.count(".") + bool(path))
        back = None if wrong else reading.isolated_backward or reading.backward
        worst = [f for f in (reading.isolated or reading.forward, back) if f is not None]
        finding = max(worst, key=share, default=None)
        figure = "" if finding is None else f"{share(finding):.2f}"
        name = escape(path.rpartition(".")[2] or "the whole")
        other = "" if reading.pair.port_path == path else f" = {reading.pair.port_path}"
        about = f"{type(reading.pair.reference).__name__}{other} {figure} {reading.note}"
        rows.append(
            f'<div>{indent}<span class="dot" style="background:{_colour(finding)}"></span>'
            f'{name} <span class="faint">{escape(about)}</span></div>'
        )
    return f'<div class="tree">{"".join(rows)}</div>'


def _sorting(path: str) -> tuple[tuple[int, str], ...]:
    return tuple((int(p), "") if p.isdigit() else (-1, p) for p in path.split(".") if p)


def _unpaired(report: Report) -> str:
    rows = "".join(
        f"<tr><td>{u.side}</td><td><code>{escape(u.path)}</code></td><td>{escape(u.type)}</td>"
        f"<td>{escape(u.reason)}</td></tr>"
        for u in report.unpaired
    )
    return f"<h2>Modules without a counterpart</h2><table>{rows}</table>"
