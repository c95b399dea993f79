"""What can be run here: ``nox -l`` lists it, ``nox -s NAME -- ARGUMENTS`` runs one.

All sessions share one environment, since PyTorch's wheel is large. On Linux it gets MLX's CPU
backend; ``MLX_BACKEND=cuda nox ...`` gets CUDA's instead. On a Mac MLX brings Metal.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

import nox

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "tests"]
nox.options.error_on_missing_interpreters = True

ROOT = Path(__file__).parent
PYPROJECT = ROOT / "pyproject.toml"
GROUPS = ("test", "lint")
MINIMUM_PYTHON = (3, 11)


def extra(session: nox.Session) -> str:
    """The extra that holds MLX's backend on this platform, in brackets, or nothing."""
    asked = os.environ.get("MLX_BACKEND", "")
    if asked not in ("", "cpu", "cuda"):
        session.error(f"MLX_BACKEND={asked!r}: it is cpu or cuda")
    if sys.platform == "darwin":
        if asked:
            session.error(f"MLX_BACKEND={asked}: on a Mac MLX brings Metal; unset MLX_BACKEND")
        return ""
    return f"[{asked or 'cpu'}]"


def environment(session: nox.Session) -> str:
    """The shared environment's Python, installed if pyproject.toml or the backend changed."""
    if sys.version_info < MINIMUM_PYTHON:
        session.error(
            f"Python {'.'.join(map(str, MINIMUM_PYTHON))} or later is needed, and nox runs on "
            f"{sys.version.split()[0]}: install nox with a later Python"
        )
    backend = extra(session)
    home = ROOT / ".nox" / f"shared{backend.replace('[', '-').rstrip(']')}"
    python = str(home / "bin" / "python")
    wanted = hashlib.sha256(f"{sys.version} {ROOT}".encode() + PYPROJECT.read_bytes()).hexdigest()
    stamp = home / "installed"
    if stamp.exists() and stamp.read_text() == wanted:
        return python

    groups = nox.project.dependency_groups(nox.project.load_toml(PYPROJECT), *GROUPS)
    what = ["--editable", f"{ROOT}{backend}", *groups]
    shutil.rmtree(home, ignore_errors=True)
    if uv := shutil.which("uv"):
        session.run(uv, "venv", "--python", sys.executable, str(home), external=True)
        session.run(uv, "pip", "install", "--python", python, *what, external=True)
    else:
        session.run(sys.executable, "-m", "venv", str(home), external=True)
        session.run(python, "-m", "pip", "install", *what, external=True)
    stamp.write_text(wanted)
    return python


def run(session: nox.Session, *command: str, **env: str) -> None:
    """Run ``python -m command`` in the shared environment; what the caller has set wins."""
    given = {name: os.environ.get(name, value) for name, value in env.items()}
    session.run(environment(session), "-m", *command, env=given, external=True)


@nox.session(venv_backend="none")
def lint(session: nox.Session) -> None:
    """Ruff (rules and format) and mypy on the packages and the benchmarks."""
    run(session, "ruff", "check", ".")
    run(session, "ruff", "format", "--check", ".")
    run(session, "mypy")


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Every check, over drawn shapes (HYPOTHESIS_PROFILE: dev, ci as here, or nightly)."""
    run(
        session,
        *("pytest", "-n", "auto", "--maxschedchunk", "1", *session.posargs),
        HYPOTHESIS_PROFILE="ci",
        OMP_NUM_THREADS="1",
    )


@nox.session(venv_backend="none")
def parity(session: nox.Session) -> None:
    """The parity card: each model, loss and rung at 200 drawn shapes; reports/parity.json."""
    run(
        session,
        *("tests.parity_card", *session.posargs),
        HYPOTHESIS_PROFILE="ci",
        OMP_NUM_THREADS="1",
        OPENBLAS_NUM_THREADS="1",
    )


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Compiled against uncompiled steps per second, parity first; also reports/bench.json."""
    what = "benchmarks/test_throughput.py"
    run(session, "pytest", what, "--benchmark-enable", "-q", *session.posargs)


@nox.session(venv_backend="none", name="bench-layers")
def bench_layers(session: nox.Session) -> None:
    """Each layer of the models by every route, MLX's own beside ours and PyTorch's."""
    what = "benchmarks/test_convolution.py"
    run(session, "pytest", what, "--benchmark-enable", "-q", *session.posargs)


@nox.session(venv_backend="none")
def score(session: nox.Session) -> None:
    """Seeded faults found, located and explained, and false alarms; reports/score.json."""
    run(session, "tests.score", *session.posargs, OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")


@nox.session(venv_backend="none")
def compare(session: nox.Session) -> None:
    """This tree against a revision, or --mlx VERSION: slower, faster, no change; exit code 1."""
    run(session, "benchmarks.compare", *session.posargs)


@nox.session(venv_backend="none", name="bench-selftest")
def bench_selftest(session: nox.Session) -> None:
    """What compare says of this tree against itself, as it is and made 5 % and 10 % slower."""
    run(session, "benchmarks.selftest", *session.posargs)


@nox.session(venv_backend="none")
def report(session: nox.Session) -> None:
    """All runs of nox -s bench on this machine as one page with plots; reports/benchmarks.html."""
    run(session, "benchmarks.report", *session.posargs)
