"""From rounds to rows, and from rows to tables."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from rich.table import Table

from benchmarks import systems
from benchmarks.contenders import break_even, harness_seconds
from benchmarks.statistics import Ratio, noise_floor, paired_ratio
from benchmarks.systems import Subject

EXPLANATION = (
    "Above 1x, compiled MLX is faster. Times are medians. Ratios are of neighbours in time, with a "
    "99 % interval (less where pairs are few). Noise: how far from 1 the same compiled step, timed "
    "against itself in this run, could be; nothing smaller could have been seen."
)


@dataclass
class Rounds:
    """What was measured of one subject: seconds per step by arm and block."""

    subject: Subject
    seconds: dict[str, dict[int, float]] = field(default_factory=dict)
    info: dict[str, dict[str, Any]] = field(default_factory=dict)

    def ratio(self, arm: str, over: str = "mlx-compiled") -> Ratio | None:
        """``arm``'s times over ``over``'s in the same blocks; None where either is absent."""
        a, b = self.seconds.get(arm, {}), self.seconds.get(over, {})
        both = sorted(a.keys() & b.keys())
        return paired_ratio([a[i] for i in both], [b[i] for i in both]) if both else None

    def milliseconds(self, arm: str) -> float | None:
        times = list(self.seconds.get(arm, {}).values())
        return 1e3 * float(np.median(times)) if times else None


def row(rounds: Rounds, device: str, peak: float) -> dict[str, Any]:
    """A row of ``reports/bench.json``; null for what was not run."""
    compiled = rounds.info.get("mlx-compiled", {})
    ms = rounds.milliseconds("mlx-compiled")
    uncompiled = rounds.milliseconds("mlx-uncompiled")
    batch = next((info["batch"] for info in rounds.info.values()), None)
    operations = systems.flops(rounds.subject, batch) if batch else None
    control = rounds.ratio("mlx-control")
    found: dict[str, Any] = {
        "system": rounds.subject.name,
        "kind": rounds.subject.kind,
        "device": device,
        "batch": batch,
        "ms_compiled": ms,
        "ms_uncompiled": uncompiled,
        "ms_async": rounds.milliseconds("mlx-async"),
        "ms_torch_eager": rounds.milliseconds("torch-eager"),
        "ms_torch_async": rounds.milliseconds("torch-async"),
        "ms_torch_compile": rounds.milliseconds("torch-compile"),
        "ms_bfloat16": rounds.milliseconds("mlx-bfloat16"),
        "ms_torch_bfloat16": rounds.milliseconds("torch-bfloat16"),
        "peak_memory_mb_bfloat16": rounds.info.get("mlx-bfloat16", {}).get("peak_memory_mb"),
        "images_per_second": 1e3 * batch / ms if ms and batch else None,
        "noise": noise_floor(control) if control else None,
        "peak_memory_mb": compiled.get("peak_memory_mb"),
        "trace_ms": compiled.get("trace_ms"),
        "code_generation_ms": code_generation(compiled, ms),
        "first_call_ms": compiled.get("first_call_ms"),
        "break_even_steps": break_even(compiled, uncompiled, ms) if uncompiled and ms else None,
        "traces": compiled.get("traces"),
        "flops": operations,
        "matmul_peak_flops": peak,
        "share_of_matmul_peak": operations / (ms / 1e3) / peak if operations and ms else None,
        "harness_share": harness_share(compiled, ms),
        "others_cpu": max(info.get("others_cpu", 0.0) for info in rounds.info.values()),
    }
    for name, arm, over in (
        ("compiled_over_uncompiled", "mlx-uncompiled", "mlx-compiled"),
        ("compiled_over_async", "mlx-async", "mlx-compiled"),
        ("async_over_torch_async", "torch-async", "mlx-async"),
        ("over_torch_eager", "torch-eager", "mlx-compiled"),
        ("over_torch_compile", "torch-compile", "mlx-compiled"),
        ("bfloat16_over_float32", "mlx-compiled", "mlx-bfloat16"),
        ("bfloat16_over_torch", "torch-bfloat16", "mlx-bfloat16"),
    ):
        ratio = rounds.ratio(arm, over)
        found[name] = ratio.value if ratio else None
        found[f"{name}_interval"] = [ratio.low, ratio.high] if ratio else None
        found[f"{name}_confidence"] = ratio.confidence if ratio else None
    return found


def code_generation(compiled: dict[str, Any], ms: float | None) -> float | None:
    """Milliseconds of the first call beyond its trace and a step; None where it was not made."""
    if ms is None or "first_call_ms" not in compiled or "trace_ms" not in compiled:
        return None
    return max(0.0, compiled["first_call_ms"] - compiled["trace_ms"] - ms)


def harness_share(compiled: dict[str, Any], ms: float | None) -> float | None:
    """Of the time of a step, what the loop around it took."""
    steps = compiled.get("steps_per_round")
    return harness_seconds(steps) / (ms / 1e3) if ms and steps else None


Columns = dict[str, tuple[str, str]]

THROUGHPUT: Columns = {
    "batch": ("batch", "{}"),
    "MLX\nms": ("ms_uncompiled", "{:.1f}"),
    "comp.\nms": ("ms_compiled", "{:.1f}"),
    "torch\nms": ("ms_torch_eager", "{:.1f}"),
    "t.comp.\nms": ("ms_torch_compile", "{:.1f}"),
    "over MLX": ("compiled_over_uncompiled", "{:.2f}x"),
    "over torch": ("over_torch_eager", "{:.2f}x"),
    "over t.comp.": ("over_torch_compile", "{:.2f}x"),
    "noise": ("noise", "{:.1%}"),
    "images\n/s": ("images_per_second", "{:,.0f}"),
}
HALF: Columns = {
    "batch": ("batch", "{}"),
    "float32\nms": ("ms_compiled", "{:.1f}"),
    "bfloat16\nms": ("ms_bfloat16", "{:.1f}"),
    "torch\nms": ("ms_torch_bfloat16", "{:.1f}"),
    "over float32": ("bfloat16_over_float32", "{:.2f}x"),
    "over torch": ("bfloat16_over_torch", "{:.2f}x"),
    "noise": ("noise", "{:.1%}"),
    "peak\nMB": ("peak_memory_mb", "{:.0f}"),
    "bfloat16's\nMB": ("peak_memory_mb_bfloat16", "{:.0f}"),
}
COST: Columns = {
    "first call\ns": ("first_call_ms", "{:.2f}"),
    "of it\ntrace s": ("trace_ms", "{:.2f}"),
    "and\ncode s": ("code_generation_ms", "{:.2f}"),
    "paid back\nafter steps": ("break_even_steps", "{}"),
    "traces": ("traces", "{}"),
    "not waiting\nfor each": ("compiled_over_async", "{:.2f}x"),
    "nor torch:\nover it": ("async_over_torch_async", "{:.2f}x"),
    "GFLOP\na step": ("flops", "{:.2f}"),
    "of matmul\npeak": ("share_of_matmul_peak", "{:.0%}"),
    "peak\nMB": ("peak_memory_mb", "{:.0f}"),
}
UNITS = {"first_call_ms": 1e3, "trace_ms": 1e3, "code_generation_ms": 1e3, "flops": 1e9}


def tables(rows: list[dict[str, Any]]) -> list[Table]:
    """Throughput of training steps and of sampling, and what compiling costs and uses."""
    steps = [row for row in rows if row["kind"] == "step"]
    sampling = [row for row in rows if row["kind"] == "sampling"]
    made = []
    if steps:
        made.append(_table("A training step", steps, THROUGHPUT))
    if sampling:
        made.append(_table("Sampling", sampling, THROUGHPUT))
    if half := [row for row in rows if row["ms_bfloat16"] is not None]:
        title = "bfloat16 with float32 weights, compiled, against float32 and torch.autocast"
        made.append(_table(title, half, HALF))
    return [*made, _table("Compiling, and what a compiled call uses", rows, COST)]


def _table(title: str, rows: list[dict[str, Any]], columns: Columns) -> Table:
    shown = {k: v for k, v in columns.items() if any(row[v[0]] is not None for row in rows)}
    table = Table(title=title, title_justify="left")
    table.add_column("system")
    for column in shown:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row["system"], *(_cell(row, key, form) for key, form in shown.values()))
    return table


def _cell(row: dict[str, Any], key: str, form: str) -> str:
    if row[key] is None:
        return "-"
    text = form.format(row[key] / UNITS[key] if key in UNITS else row[key])
    if interval := row.get(f"{key}_interval"):
        text += "\n" + "-".join(f"{bound:.2f}" for bound in interval)
    return text
