"""Keeps the memory of activations in the process between calls.

glibc returns freed memory to the system: blocks above 32 MB at once, smaller ones when 64 MB lie
free at the end of the heap. A forward pass frees and asks again for hundreds of megabytes, and each
page costs a fault and its clearing; with the settings below, none. PyTorch's convolutions take no
output buffer, so a pool of our own could not serve them.
"""

from __future__ import annotations

import ctypes
import functools

from ... import settings

# mallopt(3), from glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_MAX = -4
_KEPT_BYTES = 1 << 30


@functools.cache
def keep_freed_memory() -> bool:
    """Makes malloc keep up to 1 GiB of freed memory, for the whole process; once, where it can.

    Returns whether it did: not without glibc, nor with `RESNET_FUSED_CPU_KEEP_MEMORY=off`.
    `malloc_trim(0)` gives back what is free.

    The heap takes some calls to settle, and settles above what is in use: before 2.38 glibc asks
    for more than an aligned block needs and keeps less of it, so that the block, once freed, is too
    small to serve its own request again until a neighbour is free too.
    """
    if not settings.cpu_keeps_memory():
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  (only glibc has it, and means mallopt as above)
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0) and mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES))
