"""Hold an MLX port against its PyTorch original: forward, loss, gradients, training, compiled.

Is it equal?
    :func:`check` two models and their inputs; :func:`check_case` a :class:`Case`, whose shapes are
    drawn. Both give a :class:`Report`. :func:`prove` gives each rung's figures instead, a
    :class:`Proof`; :func:`climb` repeats one shape. A case holds a :class:`System` for each side,
    with a :class:`Loss` or several.
Why not?
    :func:`diagnose` what a report holds to be :class:`Guilty`; :func:`lint` two models without
    running them; :func:`probe_kinks` where drawn points never come; :func:`probe_compiled` a
    function that was compiled. They give :class:`Diagnosis`, :class:`Probe` and :class:`Variant`.
Which is which?
    :func:`carry` weights from one side to the other; :func:`match` plans it (:class:`Plan`);
    :func:`pairs` modules (:class:`ModulePair`); :func:`channels_first` and :func:`channels_last`.
How is it decided?
    :func:`compare` any two functions into a :class:`Finding` for each tensor, at points of
    :func:`jitter`, by :func:`bound`. ``RUNGS`` names the ladder's; :func:`compiles` tells whether
    MLX compiles here.
What is raised?
    :class:`ParityError` and its kinds: :class:`NotProven`, which is an AssertionError,
    :class:`CarryError`, :class:`NotFiniteError`, :class:`EmptyBatchError`, :class:`CannotCompile`,
    :class:`TF32Error`.

These names are the package's interface. The modules that they come from are not, with two
exceptions, :mod:`mlx_parity.blas` and :mod:`mlx_parity.plugin`, and may change at any time.
"""

from mlx_parity._backend import require_mlx

require_mlx()

from mlx_parity.carry import Plan, carry, channels_first, channels_last, match  # noqa: E402
from mlx_parity.case import Case, Loss, System  # noqa: E402
from mlx_parity.check import check  # noqa: E402
from mlx_parity.diagnose import Diagnosis, diagnose, lint  # noqa: E402
from mlx_parity.drawn import check_case  # noqa: E402
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
from mlx_parity.ladder import RUNGS, compiles  # noqa: E402
from mlx_parity.localise import Guilty, ModulePair, pairs  # noqa: E402
from mlx_parity.probes import Probe  # noqa: E402
from mlx_parity.probes import probe as probe_kinks  # noqa: E402
from mlx_parity.proof import Proof, climb, prove  # noqa: E402
from mlx_parity.report import Report  # noqa: E402
from mlx_parity.variants import Variant  # noqa: E402
from mlx_parity.variants import probe as probe_compiled  # noqa: E402

__all__ = [
    "RUNGS",
    "CannotCompile",
    "CarryError",
    "Case",
    "Diagnosis",
    "EmptyBatchError",
    "Finding",
    "Guilty",
    "Loss",
    "ModulePair",
    "NotFiniteError",
    "NotProven",
    "ParityError",
    "Plan",
    "Probe",
    "Proof",
    "Report",
    "System",
    "TF32Error",
    "Variant",
    "bound",
    "carry",
    "channels_first",
    "channels_last",
    "check",
    "check_case",
    "climb",
    "compare",
    "compiles",
    "diagnose",
    "jitter",
    "lint",
    "match",
    "pairs",
    "probe_compiled",
    "probe_kinks",
    "prove",
]
