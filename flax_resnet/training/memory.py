"""Settings of the C library's allocator for training on a CPU."""

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def keep_memory() -> None:
    """Has glibc keep the memory that is freed, for the rest of the process.

    XLA:CPU allocates its temporary buffer anew at every step. By default glibc maps it
    and unmaps it again, and a step of cifar_resnet20 then begins with 76,000 page faults.
    Threads that start later share one pool of memory, so that what one frees another
    takes. Other C libraries are left as they are.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
    mallopt(_M_ARENA_MAX, 1)
