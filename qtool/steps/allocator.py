"""Memory that is freed and asked for again: for a while it stays with the process.

glibc gives a large block back as soon as it is freed, and pages that come again cost more time than it takes to fill
them: half of what ``pack`` takes for some layouts (``recipes/README.md``).
"""

from __future__ import annotations

import ctypes
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# Of malloc.h; the defaults are those that glibc has after it has freed a block of 32 MiB.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4
_LARGEST_INT = 2**31 - 1
_DEFAULTS = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 1 << 25), (_TRIM_THRESHOLD, 1 << 26))


@contextmanager
def freed_memory_kept() -> Iterator[None]:
    """Keep freed memory until the end, where the C library is glibc; elsewhere do nothing.

    Blocks fit less well than pages do: at the peak a process may hold up to twice as much.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    library = ctypes.CDLL(None)
    library.mallopt(_MMAP_MAX, 0)
    library.mallopt(_TRIM_THRESHOLD, _LARGEST_INT)
    try:
        yield
    finally:
        for parameter, value in _DEFAULTS:
            library.mallopt(parameter, value)
        library.malloc_trim(0)
