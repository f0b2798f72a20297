"""Memory settings for training on a CPU."""

import ctypes

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # from malloc.h


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory instead of returning it to the system. Returns whether it could.

    By default glibc maps every large tensor afresh, and the kernel clears its pages at first touch. An update on the
    CPU allocates gigabytes in large tensors; it takes about a quarter less time when their memory is used again.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # glibc only
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
