"""The catalogue as Markdown: ``python -m mlx_parity.traps.pages docs/traps``."""

from __future__ import annotations

import argparse
from pathlib import Path

from mlx_parity.traps import CATALOGUE, FAMILIES, Trap

SURVEY = {
    "1": "Adam without bias correction",
    "2": "Adamax without bias correction",
    "3": "SGD's dampening at the first step",
    "4": "Optimizers' defaults and missing options",
    "4b": "Schedules",
    "5": "GroupNorm's groups",
    "6": "Unused parameters",
    "7": "An optimizer's state belongs to places in the tree",
    "8": "BatchNorm's running variance",
    "9": "BatchNorm of volumes",
    "10": "Running statistics after unfreeze()",
    "11": "Statistics of a frozen BatchNorm",
    "12": "num_batches_tracked",
    "13": "RMSNorm's eps",
    "14": "LayerNorm over several axes",
    "15": "InstanceNorm's weight and bias",
    "16": "Variance by N or N - 1",
    "17": "Gradient of std and norm at zero",
    "18": "float16 statistics",
    "19": "Variance of offset data",
    "20": "Bias before a normalisation, under Adam",
    "21": "Losses' default reductions",
    "22": "BCE on logits",
    "23": "BCE on saturated probabilities",
    "24": "cross_entropy: axis, ignored labels, weights",
    "25": "Kullback-Leibler divergence",
    "26": "cosine_similarity_loss",
    "27": "Losses over broadcastable shapes",
    "28": "Triplet loss's eps",
    "29": "Convolution kernels",
    "30": "Transposed convolution kernels",
    "31": "Grouped transposed convolutions",
    "32": "Kernels whose shape is ambiguous",
    "33": "Loading without strict",
    "34": "Flattening",
    "35": "Names, tuples, underscores",
    "36": "Constants that train",
    "37": "Tied weights",
    "38": "Lazy evaluation",
    "39": "Slices",
    "40": "Indexing out of bounds",
    "41": "Recurrent layers' biases",
    "42": "Attention's biases, encoder layers' defaults",
    "43": "Initial weights",
    "44": "Leaky ReLU",
    "45": "Maxima and ties",
    "46": "Pooling",
    "47": "Upsampling",
    "48": "Padding",
    "49": "float64",
    "50": "TF32",
    "51": "Elementary functions on the CPU",
    "52": "Long sums on the CPU",
    "53": "Type promotion",
    "54": "Operations of the same name",
    "55": "GELU",
    "56": "Dropout and random numbers",
    "57": "Compiled state",
    "58": "Compiled random state",
    "59": "Compiled training flag",
    "60": "Compiled attributes",
    "61": "shapeless",
    "62": "Evaluation inside compile",
}
"""The measured differences between the two frameworks that the catalogue was made from."""

NO_ENTRY = {
    "7": "No wrong number comes of it by itself: a tree that changes after `init` raises, and "
    "state that a compiled step leaves out is [compile-state](compile-state.md).",
    "12": "Nothing is computed with the counter. The kit leaves it out when it carries weights, "
    "and `load_weights(strict=True)` raises where someone else does not.",
    "38": "It concerns timings, not values. The benchmarks evaluate inside what they time.",
    "43": "Weights are carried before anything is compared, so initial values never enter. They "
    "matter to whoever trains from scratch.",
    "49": "The oracle is PyTorch in float64; the kit never computes in MLX's.",
    "50": "Nothing is compared while it may be on: `TF32Error` says which variable to set.",
    "51": "A few units in the last place are no fault of a port; the bound allows for them (see "
    "[bias and noise](../bias-and-noise.md)).",
    "56": "Two random streams cannot agree. Draw outside and pass masks and noise in, on both "
    "sides.",
}
"""Why a row of the survey has no entry of its own."""

SHOWS = {
    "different": "bias beyond its bound",
    "noise": "noise: rougher arithmetic, no bias",
    "not finite": "NaN or infinity",
    "raises": "an exception",
}


def page(trap: type[Trap]) -> str:
    """One trap as a page."""
    error = "" if not trap.error else f", relative error {trap.error:.2g}"
    return f"""# {trap.title}

`{trap.id}` · {FAMILIES[trap.family]} · [all traps](index.md)

{trap.why()}

**The fix:** `{trap.fix}`

The original:

```python
{trap.source("reference")}
```

The naive port shows {SHOWS[trap.shows]}{error}:

```python
{trap.source("naive")}
```

The fixed port is equal:

```python
{trap.source("fixed")}
```
"""


def index() -> str:
    """The table of contents, and the survey with an entry or a reason for each row."""
    lines = [
        "# Traps",
        "",
        "Ways in which an MLX port comes to differ from its PyTorch original, each with an example "
        "that the tests run: the naive port must fail and the fixed one pass. "
        "`mlx-parity explain ID` prints a page. Figures were measured with mlx 0.32.4 on a Linux "
        "CPU and torch 2.14.1.",
    ]
    for family, title in FAMILIES.items():
        lines += ["", f"## {title}", "", "| id | what | shows as |", "|---|---|---|"]
        lines += [
            f"| [{t.id}]({t.id}.md) | {t.title} | {SHOWS[t.shows]} |"
            for t in CATALOGUE.values()
            if t.family == family
        ]
    lines += ["", "## The survey", "", "| # | difference | entry, or why there is none |"]
    lines += ["|---|---|---|"]
    for row, what in SURVEY.items():
        ids = [t.id for t in CATALOGUE.values() if row in t.rows]
        entry = ", ".join(f"[{i}]({i}.md)" for i in ids) or NO_ENTRY[row]
        lines.append(f"| {row} | {what} | {entry} |")
    return "\n".join(lines) + "\n"


def pages() -> dict[str, str]:
    """Every file of the folder by name."""
    return {"index.md": index()} | {f"{t.id}.md": page(t) for t in CATALOGUE.values()}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args(argv).folder
    folder.mkdir(parents=True, exist_ok=True)
    wanted = pages()
    for name, text in wanted.items():
        (folder / name).write_text(text, encoding="utf-8")
    for path in folder.glob("*.md"):
        if path.name not in wanted:
            path.unlink()


if __name__ == "__main__":
    main()
