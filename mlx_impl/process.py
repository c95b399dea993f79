"""What a process is told before MLX works in it, where MLX alone would be slow."""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h

LARGEST_KEPT = 1 << 30
"""Bytes up to which freed memory is kept. Without a word glibc keeps none beyond 32 MiB."""

_keeps_memory = False


def tune() -> None:
    """Keep freed memory, and launch CUDA's kernels one by one. Before MLX's first operation.

    MLX on a CPU has no cache of its own: an array of over 32 MiB is new pages from the system each
    time, filled with zeros at a fault for each. Document 004's step at batch 64 takes 133,000 of
    them, and a third of its time. PyTorch on a CPU is helped as much, and its figures steadier.

    MLX's CUDA graphs are built anew in every step and cost more than the launches that they save: a
    U-Net's step in TF32 goes from 70 ms to 50 on an H200 without, DCGAN's from 12 to 7.

    Both hold for the whole process, so this is for programs, and not for a library. What the
    environment already says (``MLX_USE_CUDA_GRAPHS``, ``MALLOC_MMAP_THRESHOLD_``) stays.
    """
    global _keeps_memory
    os.environ.setdefault("MLX_USE_CUDA_GRAPHS", "0")
    said = {
        "MALLOC_MMAP_THRESHOLD_",
        "MALLOC_TRIM_THRESHOLD_",
        "GLIBC_TUNABLES",
    } & os.environ.keys()
    if sys.platform != "linux" or said:
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # not every libc of Linux has it
    if mallopt is not None:
        kept = [mallopt(which, LARGEST_KEPT) for which in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD)]
        _keeps_memory = all(kept)


def settings() -> dict[str, bool]:
    """What :func:`tune` decides, as it stands: figures with and without are not comparable."""
    return {
        "cuda_graphs": os.environ.get("MLX_USE_CUDA_GRAPHS", "1") != "0",
        "memory_kept": _keeps_memory,
    }
