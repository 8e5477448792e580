"""The C library's allocator, held constant on all sides of a comparison.

glibc gives large freed blocks back to the system and takes fresh, zeroed pages for the next ones, depending on what was
freed before. One network of a comparison may pay for that where another does not: an unfused network has measured 1.84
times the speed of its own copy. Held constant, no block goes back: every side has warm pages, as in a program that sets
``MALLOC_MMAP_THRESHOLD_`` and ``MALLOC_TRIM_THRESHOLD_``, or that runs under another allocator. On a GPU PyTorch's own
allocator keeps all it was given, and none of this matters.
"""

from __future__ import annotations

import ctypes
import os
import platform

MODES = ("constant", "default")
CHOICES = (*MODES, "both")
VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # malloc.h
_LARGEST = (1 << 31) - 1
_PROBE = 128 << 20  # above any threshold that glibc chooses by itself, 32 MiB at most
_held = False


def hold(mode: str) -> dict:
    """Measure with the allocator ``mode`` from here on; returns :func:`describe`.

    "constant" lasts as long as the process: what glibc does by default cannot be brought back, so "default" comes
    first where both are measured.

    Raises:
        ValueError: ``mode`` is unknown, or "default" after "constant".
    """
    global _held
    if mode not in MODES:
        raise ValueError(f"allocator is {mode!r}, expected one of {', '.join(MODES)}")
    if mode == "default" and _held:
        raise ValueError("allocator is 'default', but this process already holds it constant; start another process")
    if mode == "constant" and not _held:
        _held = _keep_all()
    return describe(mode)


def describe(mode: str) -> dict:
    """JSON-ready: what was asked for, the C library, and whether large freed blocks stay with the process (tried)."""
    return {
        "mode": mode,
        "library": " ".join(platform.libc_ver()).strip() or "unknown",
        "large_blocks": _tried(),
        "environment": {name: os.environ[name] for name in VARIABLES if name in os.environ},
    }


def sentence(found: dict) -> str | None:
    """What a reader of the times must know of the allocator, None where it was held constant."""
    if found["large_blocks"] == "kept":
        return None
    if found["mode"] == "default":
        return "allocator as it is by default: large freed blocks may go back to the system on one side only"
    return f"the allocator of {found['library']} could not be held constant; see the control"


def _library() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL(None)
        library.mallopt  # noqa: B018  (missing outside glibc)
    except (OSError, AttributeError, TypeError):
        return None
    return library


def _keep_all() -> bool:
    library = _library()
    if library is None:
        return False
    # Older versions take thresholds up to 32 MiB only; without any mapping the threshold does not matter.
    large = library.mallopt(_M_MMAP_THRESHOLD, _LARGEST) or library.mallopt(_M_MMAP_MAX, 0)
    return bool(large and library.mallopt(_M_TRIM_THRESHOLD, _LARGEST))


class _Statistics(ctypes.Structure):
    """glibc's ``struct mallinfo2``."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    ]


def _tried() -> str:
    """ "kept", "returned", or "unknown": what becomes of a large block when it is freed."""
    library = _library()
    if library is None or not hasattr(library, "mallinfo2"):
        return "unknown"
    library.mallinfo2.restype = _Statistics
    library.malloc.restype, library.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    library.free.argtypes = [ctypes.c_void_p]

    def held() -> int:
        found = library.mallinfo2()
        return found.arena + found.hblkhd

    block = library.malloc(_PROBE)
    if not block:
        return "unknown"
    before = held()
    library.free(block)
    return "kept" if held() == before else "returned"
