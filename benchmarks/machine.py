"""Which machine this is, and what of it decides how fast MLX and PyTorch are."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import mlx.core as mx
import torch

from mlx_impl import process
from mlx_parity.blas import Blas
from mlx_parity.card import device as backend


def torch_device() -> str | None:
    """PyTorch's device of the same class as MLX's default one; None where PyTorch has none."""
    if backend() == "CPU":
        return "cpu"
    if backend() == "Metal":
        return "mps" if torch.backends.mps.is_available() else None
    return "cuda" if torch.cuda.is_available() else None


def device() -> str:
    """For a table: back end and device, for instance "CPU Intel(R) Xeon(R) Processor"."""
    info = mx.device_info(mx.default_device())
    return f"{backend()} {info.get('device_name', _chip())}"


def _chip() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def power() -> str:
    """What the system says of its power mode, "" where it says nothing.

    A laptop on its battery, or asked to save power, is another machine.
    """
    if platform.system() == "Darwin":
        found = subprocess.run(["pmset", "-g"], capture_output=True, text=True, check=False)
        lines = [line.split() for line in found.stdout.splitlines() if "powermode" in line]
        return ", ".join(" ".join(line) for line in lines)
    governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    supplies = Path("/sys/class/power_supply").glob("A*/online")
    mains = ["on mains" if p.read_text().strip() == "1" else "on battery" for p in supplies]
    return ", ".join([*([governor.read_text().strip()] if governor.exists() else []), *mains])


def mlx_tf32() -> bool:
    """Whether MLX may round products to TF32 where the device has it; its default is yes."""
    return os.environ.get("MLX_ENABLE_TF32", "1") != "0"


def allow_torch_what_mlx_may() -> None:
    """PyTorch's products and convolutions in the precision of MLX's: by default the one rounds to
    TF32 in convolutions only, the other everywhere."""
    torch.backends.cuda.matmul.allow_tf32 = mlx_tf32()
    torch.backends.cudnn.allow_tf32 = mlx_tf32()


def identity(blas: Blas) -> dict[str, Any]:
    """For ``machine_info``: figures from two machines that differ in it are not comparable."""
    return {
        "chip": _chip(),
        "cpus": _cpus(),
        "power": power(),
        "mlx_backend": backend(),
        "mlx_device": device(),
        "mlx_version": importlib.metadata.version("mlx"),
        "mlx_blas": str(blas),
        "mlx_blas_threads": blas.threads,
        "mlx_tf32": mlx_tf32(),
        "torch_version": torch.__version__,
        "torch_device": torch_device(),
        "torch_threads": torch.get_num_threads(),
        "torch_tf32": torch.backends.cuda.matmul.allow_tf32 and torch.backends.cudnn.allow_tf32,
        "g++": shutil.which("g++") is not None,
        **process.settings(),
    }


def others_cpu_seconds() -> float | None:
    """CPU seconds that other processes have used since the start; None where that is not told.

    Two threads that wait for one another lose far more than the share of a core that another
    process takes, so a busy machine turns ratios around instead of only adding to both sides.
    """
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal, *_ = map(
        int, stat.read_text().splitlines()[0].split()[1:]
    )
    busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    own = os.times()
    return busy - own.user - own.system
