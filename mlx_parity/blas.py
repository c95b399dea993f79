"""A BLAS worth the name under MLX's CPU backend on Linux.

MLX's Linux wheel links netlib's reference BLAS, about thirty times slower than OpenBLAS. Nothing in
MLX selects another one. Preloading an OpenBLAS would replace the symbols of PyTorch as well; a
comparison of the two would then hold OpenBLAS against itself. :func:`use_openblas` replaces MLX's
alone: it loads the OpenBLAS of the pip package ``scipy-openblas32``, whose symbols carry a prefix
and so can take nobody's place, and writes its addresses into the three slots of ``libmlx.so``'s
global offset table that the dynamic linker filled, or would fill, with netlib's.

Sources
    System V ABI, "Object Files" and "Dynamic Linking"; its x86-64 and AArch64 supplements for the
    relocation types. libmlx.so of mlx 0.32: ``cblas_sgemm``, ``cblas_dgemm`` and ``cblas_cgemm``
    are its only BLAS symbols (LAPACK stays netlib's).
"""

import ctypes
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

ROUTINES = ("cblas_sgemm", "cblas_dgemm", "cblas_cgemm")
PREFIX = "scipy_"

_SHT_RELA, _SHT_DYNSYM = 4, 11
# GLOB_DAT and JUMP_SLOT by ELF machine: the two relocations whose slot holds a plain address.
_SLOT_RELOCATIONS = {62: (6, 7), 183: (1025, 1026)}  # x86-64, AArch64


@dataclass(frozen=True)
class Blas:
    """Which matrix multiplication MLX's default device runs.

    name: for instance "openblas 0.3.34 (SkylakeX)", "netlib", "accelerate"; "" on a GPU, whose
        kernels are MLX's own or the vendor's.
    fast: whether a figure measured with it says anything about MLX.
    threads: of the BLAS; None where it does not tell.
    note: one sentence for a report.
    """

    name: str
    fast: bool
    threads: int | None
    note: str

    def __str__(self) -> str:
        return self.name or self.note


class _Mapping(NamedTuple):
    """One line of /proc/self/maps."""

    start: int
    stop: int
    permissions: str
    offset: int
    inode: int
    path: str


_in_use: Blas | None = None  # the answer for Linux's CPU backend, which never changes once given
_loan: tuple[Blas, list[tuple[ctypes.c_void_p, int | None, int | None]]] | None = None
_keep_alive: list[ctypes.CDLL] = []  # unloading the library would leave the slots dangling


def use_openblas() -> Blas:
    """Give MLX's CPU backend an OpenBLAS where it has none; return what it has afterwards.

    Acts on Linux with the CPU as default device, once for a process; elsewhere it only tells.
    PyTorch's and NumPy's BLAS stay as they are. Where it cannot act, MLX keeps its BLAS and one
    RuntimeWarning says why and how to get the other; nothing is ever left half replaced. The number
    of threads is OpenBLAS's own choice: ``OPENBLAS_NUM_THREADS`` before the call changes it.
    """
    global _in_use
    if mx.default_device().type == mx.DeviceType.gpu:
        backend = "Metal" if mx.metal.is_available() else "CUDA"
        return Blas("", True, None, f"{backend}: MLX's matrix multiplication runs on the GPU")
    if sys.platform == "darwin":
        return Blas("accelerate", True, None, "MLX links Apple's Accelerate")
    if not sys.platform.startswith("linux"):
        return Blas("unknown", True, None, f"the BLAS that MLX's wheel links on {sys.platform}")
    if _in_use is None:
        _in_use = _use_openblas_on_linux()
    return _in_use


@contextmanager
def borrowed() -> Iterator[Blas]:
    """Within, as after :func:`use_openblas`; afterwards MLX has again what it had.

    For work of the kit's own in somebody else's process: nothing is said where it cannot be done.
    """
    global _loan
    here = sys.platform.startswith("linux") and mx.default_device().type != mx.DeviceType.gpu
    if not here or _in_use is not None or _linked().fast:
        yield use_openblas()
        return
    try:
        if _loan is None:
            before = [(slot, slot.value) for slot in _slots(ROUTINES).values()]
            blas = _redirect()
            _loan = blas, [(slot, slot.value, old) for slot, old in before]
            for slot, old in before:
                slot.value = old
    except (ImportError, OSError):
        yield _linked()
        return
    blas, slots = _loan
    if all(slot.value == new for slot, new, _ in slots):  # on loan already
        yield blas
        return
    for slot, new, _ in slots:
        slot.value = new
    try:
        yield blas
    finally:
        mx.synchronize()
        for slot, _, old in slots:
            slot.value = old


def _use_openblas_on_linux() -> Blas:
    linked = _linked()
    if linked.fast:
        return linked
    try:
        return _redirect()
    except (ImportError, OSError) as error:
        warnings.warn(
            f"MLX's matrix multiplication stays on the slow BLAS it links ({linked.name}), about "
            f"thirty times slower than OpenBLAS: {error}. To get OpenBLAS: "
            "pip install scipy-openblas32",
            RuntimeWarning,
            stacklevel=3,
        )
        return linked


def _linked() -> Blas:
    """The BLAS that the dynamic linker gives libmlx.so, before any redirection."""
    try:
        path = _library("libmlx.so")[0].path
        # The linker's own order: the program and what it preloads, then the library's dependencies.
        for scope in (ctypes.CDLL(None), ctypes.CDLL(path)):
            if hasattr(scope, ROUTINES[0]):
                owner = ctypes.CDLL(_owner(_address(scope, ROUTINES[0])))
                break
        else:
            return Blas("unknown", True, None, "libmlx.so imports no BLAS: it carries its own")
    except OSError as error:
        return Blas("unknown", False, None, f"the BLAS that MLX links was not found: {error}")
    if hasattr(owner, "openblas_get_config"):
        return _describe(owner, "", "linked by MLX, or preloaded")
    name = Path(owner._name).name
    if "libblas" in name:
        return Blas("netlib", False, 1, f"the reference BLAS that MLX's wheel links ({name})")
    return Blas(name, True, None, "linked by MLX, or preloaded")


def _redirect() -> Blas:
    """Point libmlx.so's slots at OpenBLAS. ImportError, OSError: it cannot, nothing changed."""
    import scipy_openblas32

    path = Path(scipy_openblas32.get_lib_dir()) / scipy_openblas32.get_library(fullname=True)
    library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    try:
        targets = {name: _address(library, PREFIX + name) for name in ROUTINES}
    except AttributeError as error:
        raise OSError(str(error)) from error
    slots = _slots(ROUTINES)
    _keep_alive.append(library)
    before = {name: slot.value for name, slot in slots.items()}
    for name, slot in slots.items():
        slot.value = targets[name]
    try:
        _check_products()
    except OSError:
        for name, slot in slots.items():
            slot.value = before[name]
        raise
    return _describe(library, PREFIX, "from scipy-openblas32, for MLX alone")


def _describe(library: ctypes.CDLL, prefix: str, note: str) -> Blas:
    def call(name: str, restype: Any) -> Any:
        function = getattr(library, f"{prefix}openblas_{name}")
        function.restype = restype
        return function()

    version = call("get_config", ctypes.c_char_p).decode().split()[1]  # "OpenBLAS 0.3.34 ..."
    version = ".".join(version.split(".")[:3])  # without the package's build number
    core = call("get_corename", ctypes.c_char_p).decode()
    return Blas(f"openblas {version} ({core})", True, call("get_num_threads", ctypes.c_int), note)


def _address(library: ctypes.CDLL, name: str) -> int:
    return ctypes.cast(getattr(library, name), ctypes.c_void_p).value or 0


def _maps() -> list[_Mapping]:
    mappings = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, permissions, offset, _, inode, *path = line.split(maxsplit=5)
        start, stop = (int(x, 16) for x in span.split("-"))
        mappings.append(
            _Mapping(start, stop, permissions, int(offset, 16), int(inode), "".join(path))
        )
    return mappings


def _library(file_name: str) -> list[_Mapping]:
    """The mappings of a loaded library, the one that starts the file first."""
    found = [m for m in _maps() if Path(m.path).name == file_name]
    paths = {m.path for m in found}
    if len(paths) != 1:
        raise OSError(f"{len(paths)} libraries named {file_name} are loaded, not one")
    return sorted(found, key=lambda m: m.offset)


def _owner(address: int) -> str:
    """The file whose mapping holds an address."""
    for m in _maps():
        if m.start <= address < m.stop:
            return m.path
    raise OSError(f"address {address:#x} is in no mapping")


def _slots(names: tuple[str, ...]) -> dict[str, ctypes.c_void_p]:
    """libmlx.so's slots for the named functions, in memory: read or assign ``.value``.

    Checked before anyone writes: the file on disk is the one loaded, every name has a slot, each
    lies on a page that may be written (a library linked with ``-z now -z relro`` protects them),
    and holds the address of code. OSError where one of these fails.
    """
    mappings = _library("libmlx.so")
    path = mappings[0].path
    if os.stat(path).st_ino != mappings[0].inode:
        raise OSError("libmlx.so has been replaced on disk since it was loaded")
    offsets, first_address = _slot_offsets(Path(path).read_bytes(), names)
    base = mappings[0].start - first_address
    maps = _maps()

    def permissions(address: int) -> str:
        return next((m.permissions for m in maps if m.start <= address < m.stop), "unmapped")

    slots = {}
    for name in names:
        if name not in offsets:
            raise OSError(f"libmlx.so has no slot for {name}")
        address = base + offsets[name]
        if "w" not in permissions(address):
            raise OSError(f"libmlx.so's slot for {name} is write-protected")
        slots[name] = ctypes.c_void_p.from_address(address)
        if "x" not in permissions(slots[name].value or 0):
            raise OSError(f"libmlx.so's slot for {name} does not hold the address of code")
    return slots


def _slot_offsets(elf: bytes, names: tuple[str, ...]) -> tuple[dict[str, int], int]:
    """Addresses, relative to the load bias, of the slots an ELF file has for imported functions.

    Also the address at which the file's first byte is loaded. OSError for a file that is not
    little-endian ELF64 for x86-64 or AArch64.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise OSError("not a little-endian ELF64 file")
    (machine,) = struct.unpack_from("<H", elf, 18)
    if machine not in _SLOT_RELOCATIONS:
        raise OSError(f"ELF machine {machine} is neither x86-64 nor AArch64")
    segments_at, sections_at = struct.unpack_from("<QQ", elf, 32)
    segment_size, segment_count, section_size, section_count = struct.unpack_from("<4H", elf, 54)

    first_address = 0
    for i in range(segment_count):
        kind, _, offset, address = struct.unpack_from("<IIQQ", elf, segments_at + i * segment_size)
        if kind == 1 and offset == 0:  # PT_LOAD of the file's beginning
            first_address = address

    # name, type, flags, address, offset, size, link, info, alignment, entry size
    sections = [
        struct.unpack_from("<IIQQQQIIQQ", elf, sections_at + i * section_size)
        for i in range(section_count)
    ]
    offsets = {}
    for _, kind, _, _, start, size, link, *_ in sections:
        if kind != _SHT_RELA or sections[link][1] != _SHT_DYNSYM:
            continue
        symbols_at, strings_at = sections[link][4], sections[sections[link][6]][4]
        for slot, info, _ in struct.iter_unpack("<QQq", elf[start : start + size]):
            if info & 0xFFFFFFFF not in _SLOT_RELOCATIONS[machine]:
                continue
            (name_at,) = struct.unpack_from("<I", elf, symbols_at + 24 * (info >> 32))
            name_at += strings_at
            name = elf[name_at : elf.index(b"\0", name_at)].decode()
            if name in names:
                offsets[name] = slot
    return offsets, first_address


def _check_products() -> None:
    """Small products of the three routines against NumPy's, plain and transposed. OSError if wrong.

    The bound is the textbook one for a product of inner length k in any order of summation,
    ``|error| <= k u |A| |B|`` (Higham, Accuracy and Stability of Numerical Algorithms, Eq. 3.13),
    with room for complex arithmetic and for NumPy's own rounding. A wrong integer width or argument
    order misses it by many orders of magnitude.
    """
    rng = np.random.default_rng(0)

    def draw(rows: int, columns: int, dtype: mx.Dtype) -> mx.array:
        real, imaginary = rng.standard_normal((2, rows, columns))
        return mx.array(real + 1j * imaginary if dtype == mx.complex64 else real, dtype=dtype)

    m, k, n = 33, 65, 17
    for dtype in (mx.float32, mx.float64, mx.complex64):
        unit = 2.0**-53 if dtype == mx.float64 else 2.0**-24
        wide = np.complex128 if dtype == mx.complex64 else np.float64
        for a in (draw(m, k, dtype), draw(k, m, dtype).T):
            for b in (draw(k, n, dtype), draw(n, k, dtype).T):
                got = np.asarray(mx.matmul(a, b, stream=mx.cpu))
                a_, b_ = np.asarray(a).astype(wide), np.asarray(b).astype(wide)
                bound = 8 * k * unit * (np.abs(a_) @ np.abs(b_))
                if not (np.abs(got - a_ @ b_) <= bound).all():
                    raise OSError(f"OpenBLAS's {dtype} products under MLX are wrong")
