"""Memory that a training on a CPU keeps from one step to the next.

XLA:CPU allocates up to gigabytes anew at every step; that Linux found and cleared them every time
took a third of the time (docs/performance.md). A script calls `keep_memory` in its first line:

    if __name__ == "__main__":
        keep_memory()
        ...
"""

import ctypes
import os
import sys

# All allocations from one heap, of which nothing below 16 GB is given back to Linux, and where
# what is freed joins its neighbours at once.
KEEP_MEMORY = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=17179869184"
    ":glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"
)


def keep_memory() -> None:
    """Starts a program again with memory kept, and has each step reuse that of the one before.

    It returns the second time. Call it before anything is computed. What has no file, as a
    notebook, is not started again.
    """
    restart_with_memory_kept()
    reuse_memory()


def restart_with_memory_kept() -> None:
    """Starts this program again with glibc's malloc keeping memory, in huge pages.

    glibc reads the settings at the start of a process only; other C libraries ignore them.
    """
    has_file = os.path.isfile(getattr(sys.modules["__main__"], "__file__", None) or "")
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ and has_file:
        os.environ["GLIBC_TUNABLES"] = KEEP_MEMORY
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def reuse_memory() -> None:
    """Has each step on a CPU take over the memory of the one before.

    A step then begins when the one before has freed its memory. And what is small and stays is
    not allocated above that memory, as there is room left below: glibc does not take a freed
    piece in the middle of the heap for an aligned one of the same size, so that the next step
    would have a second. The room is in pieces, too small for a data set or for what most steps
    take, which would fill it.
    """
    import jax  # late: the program may be about to be started again

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
        libc.free.argtypes = [ctypes.c_void_p]
        # They take no memory before they are written to. Every other one stays, or they would
        # be one, and the end of the heap again.
        pieces = [libc.malloc(128 << 20) for _ in range(16)]
        for piece in pieces[::2]:
            libc.free(piece)
