"""Importing either package without a working MLX says what to install."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]

IMPORTS = {
    "mlx_impl": "import mlx_impl",
    "mlx_parity": "from mlx_parity._backend import require_mlx; require_mlx()",
}

# What the dynamic loader says of Linux's plain wheel, mlx 0.32.4.
NO_BACKEND = "libmlx.so: cannot open shared object file: No such file or directory"


def run(code: str, *path: Path, flags: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a fresh interpreter with ``path`` before everything installed."""
    places = os.pathsep.join(map(str, [*path, REPOSITORY]))
    return subprocess.run(
        [sys.executable, *flags, "-c", code],
        env={**os.environ, "PYTHONPATH": places},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def last_line(result: subprocess.CompletedProcess[str]) -> str:
    return result.stderr.strip().splitlines()[-1]


@pytest.fixture
def mlx_without_backend(tmp_path: Path) -> Path:
    package = tmp_path / "mlx"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "core.py").write_text(f"raise ImportError({NO_BACKEND!r}, name='core')")
    return tmp_path


@pytest.mark.parametrize("package", IMPORTS)
def test_with_a_backend_nothing_is_said(package):
    result = run(IMPORTS[package])
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("package", IMPORTS)
def test_without_a_backend_both_choices_are_named(package, mlx_without_backend):
    result = run(IMPORTS[package], mlx_without_backend)
    assert result.returncode == 1
    message = last_line(result)
    assert message.startswith("ImportError: MLX is installed, but its backend cannot be loaded")
    assert 'exactly one of "mlx[cpu]" or "mlx[cuda13]"' in message
    assert "On a Mac the base wheel has Metal" in message
    # The loader's own words stay, in the message and as the cause.
    assert NO_BACKEND in message
    assert f"ImportError: {NO_BACKEND}\n\nThe above exception was the direct cause" in result.stderr


@pytest.mark.parametrize("package", IMPORTS)
def test_without_mlx_it_says_so(package):
    result = run(IMPORTS[package], flags=("-S",))  # without site-packages nothing is installed
    assert result.returncode == 1
    message = last_line(result)
    assert message.startswith("ImportError: MLX is not installed.")
    assert 'exactly one of "mlx[cpu]" or "mlx[cuda13]"' in message


def test_both_packages_say_the_same(mlx_without_backend):
    messages = {last_line(run(code, mlx_without_backend)) for code in IMPORTS.values()}
    assert len(messages) == 1


def test_a_submodule_cannot_be_imported_around_the_message(mlx_without_backend):
    result = run("from mlx_impl.mlp_gan import Generator", mlx_without_backend)
    assert last_line(result).startswith("ImportError: MLX is installed, but its backend")
