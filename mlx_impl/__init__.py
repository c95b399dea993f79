"""The documents' models, losses and training steps, in MLX.

Raises ImportError with what to install when MLX is missing or has no backend.
"""

try:
    import mlx.core  # noqa: F401
except ImportError as error:
    # The plain wheel for Linux installs and then fails on libmlx.so, which only an extra brings.
    if isinstance(error, ModuleNotFoundError) and error.name == "mlx":
        problem = "MLX is not installed."
    else:
        problem = f"MLX is installed, but its backend cannot be loaded ({error})."
    raise ImportError(
        f'{problem} On Linux install exactly one of "mlx[cpu]" or "mlx[cuda13]", which bring the '
        "backend that the base wheel lacks and overwrite each other's: "
        'python -m pip install "mlx[cpu]". On a Mac the base wheel has Metal: '
        "python -m pip install mlx.",
        name=__name__,  # so that `python -m mlx_impl` prints this line and no traceback
    ) from error
