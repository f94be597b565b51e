"""The C library's heap, told to keep what is freed.

glibc gives the memory of every large tensor back to the system when it is freed, and the next one's pages are got and
zeroed anew: of a loss on 12 MB of logits that is most of the time, and on a virtual machine whose host has taken free
pages back several times that.
"""

import ctypes
from functools import cache

_LARGEST_KEPT = 128 << 20
"""Bytes of a tensor whose memory is kept; of all that is free at the end of the heap twice as many."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


@cache
def keep_freed_memory() -> None:
    """For the whole process; nothing where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT)
        mallopt(_M_TRIM_THRESHOLD, 2 * _LARGEST_KEPT)
