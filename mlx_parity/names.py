"""How much two paths have in common, written by people who name the same layer differently."""

import re

_ALIKE = {
    "query": "q",
    "key": "k",
    "keys": "k",
    "value": "v",
    "values": "v",
    "queries": "q",
    "wq": "q",
    "wk": "k",
    "wv": "v",
    "wo": "o",
    "output": "o",
    "out": "o",
    "dense": "linear",
    "lin": "linear",
    "fc": "linear",
    "proj": "linear",
    "projection": "linear",
    "head": "head",
    "classifier": "head",
    "ln": "norm",
    "layernorm": "norm",
    "rmsnorm": "norm",
    "bn": "norm",
    "gn": "norm",
    "norms": "norm",
    "conv": "conv",
    "embed": "embedding",
    "embeddings": "embedding",
    "emb": "embedding",
    "wte": "embedding",
    "tok": "token",
    "tokens": "token",
    "word": "token",
    "wpe": "position",
    "pos": "position",
    "positional": "position",
    "attention": "attn",
    "ffn": "mlp",
    "feedforward": "mlp",
    "feed": "mlp",
    "forward": "mlp",
    "h": "block",
    "layer": "block",
    "layers": "block",
    "blocks": "block",
    "stage": "block",
    "stages": "block",
    "downsample": "shortcut",
    "skip": "shortcut",
    "residual": "shortcut",
    "gamma": "weight",
    "beta": "bias",
    "scale": "weight",
    "shift": "bias",
}
"""Words that porters use for one another."""


def words(path: str) -> list[str]:
    """The words and numbers of a path: ``encoder.layers.3.ln_1`` has five."""
    return [_ALIKE.get(w, w) for w in _spelled(path)]


def _spelled(path: str) -> list[str]:
    split = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", path)
    return [w.lower() for w in split]


def letters(path: str) -> frozenset[str]:
    """The projections that a name speaks of: ``qkv``, ``wkv`` and ``kv_proj`` of several."""
    found = [_ALIKE.get(w, w) for w in _spelled(path.rpartition(".")[2])]
    return frozenset(
        letter
        for word in found
        for letter in ((word,) if len(word) == 1 else re.sub(r"^(w|to)(?=[qkv]+$)", "", word))
        if letter in "qkvo" and (len(word) == 1 or re.fullmatch(r"(w|to)?[qkv]+", word))
    )


class Name:
    """A layer's path taken apart, for comparison by :func:`alike`."""

    def __init__(self, path: str):
        every = words(path)
        self.numbers = [w for w in every if w.isdigit()]
        self.words = frozenset(w for w in every if not w.isdigit())
        last = [w for w in words(".".join(path.split(".")[-2:])) if not w.isdigit()]
        self.last = frozenset(last)
        self.end = words(path.rpartition(".")[2])
        self.spelled = _spelled(path.rpartition(".")[2])


def overlap(a: frozenset[str], b: frozenset[str]) -> float:
    """0 to 1: the share of the words of either that both have."""
    return len(a & b) / len(a | b) if a or b else 1.0


def alike(a: Name, b: Name) -> float:
    """0 to 6: how much two names have in common."""
    score = 1.5 * overlap(a.words, b.words) + 1.5 * overlap(a.last, b.last)
    kin = sum(any(_kin(v, w) for w in b.spelled) for v in a.spelled)
    shared = kin / max(len(a.spelled), len(b.spelled), 1)  # of two words for one, the same one
    return score + (a.end == b.end) + (a.numbers == b.numbers) + shared


def _kin(a: str, b: str) -> bool:
    """Whether one word is the other, or short for it: ``res`` for ``residual``."""
    few, many = sorted((a, b), key=len)
    return few == many or (len(few) > 2 and many.startswith(few))
