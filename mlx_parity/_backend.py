"""MLX without a backend says what to install instead of naming a missing shared library."""


def require_mlx() -> None:
    """Raise ImportError with what to install when MLX, or a backend for it, is missing.

    The plain wheel for Linux installs without complaint and then fails on ``libmlx.so``, which only
    one of its extras brings.
    """
    try:
        import mlx.core  # noqa: F401
    except ImportError as error:
        if isinstance(error, ModuleNotFoundError) and error.name == "mlx":
            problem = "MLX is not installed."
        else:
            problem = f"MLX is installed, but its backend cannot be loaded ({error})."
        raise ImportError(
            f'{problem} On Linux install exactly one of "mlx[cpu]" or "mlx[cuda13]", which bring '
            "the backend that the base wheel lacks and overwrite each other's: "
            'python -m pip install "mlx[cpu]". On a Mac the base wheel has Metal: '
            "python -m pip install mlx."
        ) from error
