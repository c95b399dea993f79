"""``python -m mlx_parity``: as ``mlx-parity``."""

import sys

from mlx_parity.cli import main

if __name__ == "__main__":
    sys.exit(main())
