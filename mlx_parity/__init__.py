"""Hold an MLX port against its PyTorch original: forward, loss, gradients, training, compiled."""

from mlx_parity._backend import require_mlx

require_mlx()

from mlx_parity import card  # noqa: E402
from mlx_parity.carry import Plan, carry, channels_first, channels_last, match  # noqa: E402
from mlx_parity.case import Case, Loss, System  # noqa: E402
from mlx_parity.check import check  # noqa: E402
from mlx_parity.equality import Finding, bound, compare, jitter  # noqa: E402
from mlx_parity.errors import (  # noqa: E402
    CannotCompile,
    CarryError,
    EmptyBatchError,
    NotFiniteError,
    NotProven,
    ParityError,
    TF32Error,
)
from mlx_parity.ladder import RUNGS, Climb, compiles  # noqa: E402
from mlx_parity.localise import Guilty, ModulePair, pairs  # noqa: E402
from mlx_parity.proof import Proof, Row, climb, prove  # noqa: E402
from mlx_parity.report import Report  # noqa: E402
from mlx_parity.variants import Variant, probe  # noqa: E402

__all__ = [
    "RUNGS",
    "CannotCompile",
    "CarryError",
    "Case",
    "Climb",
    "EmptyBatchError",
    "Finding",
    "Guilty",
    "Loss",
    "ModulePair",
    "NotFiniteError",
    "NotProven",
    "ParityError",
    "Plan",
    "Proof",
    "Report",
    "Row",
    "System",
    "TF32Error",
    "Variant",
    "bound",
    "card",
    "carry",
    "channels_first",
    "channels_last",
    "check",
    "climb",
    "compare",
    "compiles",
    "jitter",
    "match",
    "pairs",
    "probe",
    "prove",
]
