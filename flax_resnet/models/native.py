"""Building and loading of convolution.cc for the CPU that this process runs on."""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import stat
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any

import jax
import jaxlib.version
import numpy as np

from flax_resnet.models.caches import cache_folder

_SOURCE = Path(__file__).with_name("convolution.cc")
_HEADERS = [_SOURCE.with_name(name) for name in ("winograd.h", "tile.h")]
_FLAGS = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-w"]


def load() -> int | None:
    """Registers the functions of convolution.cc with XLA.

    It is compiled once, by the compiler that $CXX names or c++, and kept in the user's cache
    folder for as long as source, compiler, kind of CPU and jaxlib stay the same.

    Returns:
      How many channels they take at a time. None, with one warning in the log, where it cannot
      be compiled or loaded.
    """
    with _one_at_a_time:
        return _load()


def applies(ctx: Any, channels: int) -> bool:
    """Whether what is lowered in that context can be done by convolution.cc.

    Args:
      ctx: a `jax.interpreters.mlir.LoweringRuleContext`.
      channels: of its result.
    """
    return (
        all(aval.dtype == np.float32 and aval.size for aval in ctx.avals_in)
        # XLA cannot divide a function that it does not know among devices.
        and _num_devices(ctx.module_context.axis_context) == 1
        # An exported program runs where there is no convolution.cc.
        and not ctx.module_context.lowering_parameters.for_export
        and (lanes := load()) is not None
        and channels % lanes == 0
    )


def _num_devices(axis_context: Any) -> int:
    # That of jax.shard_map and jax.pmap has a mesh alone.
    mesh = getattr(axis_context, "mesh", None)
    return axis_context.num_devices if mesh is None else mesh.size


_one_at_a_time = threading.Lock()


@functools.cache
def _load() -> int | None:
    try:
        library = _library()
        for name in ("forward", "input_gradient", "kernel_gradient", "max_pool"):
            target = jax.ffi.pycapsule(getattr(library, name))
            jax.ffi.register_ffi_target(f"flax_resnet_{name}", target, platform="cpu")
        return library.lanes()
    # ValueError: a $CXX that no shell would read.
    except (OSError, ValueError, AttributeError, subprocess.CalledProcessError) as error:
        reason: object = error
        if isinstance(error, subprocess.CalledProcessError):
            reason = error.stderr.decode(errors="replace")
        logging.getLogger(__name__).warning(
            "convolutions on this CPU will be slower than they could be: "
            "convolution.cc could not be compiled or loaded: %s",
            reason,
        )
        return None


def _library() -> ctypes.CDLL:
    """The library, from the cache if it is there."""
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("c++") or "")
    if not compiler:
        raise OSError("there is no C++ compiler")
    # What a compiler defines for a CPU tells its version and every set of instructions.
    macros = _run(*compiler, "-march=native", "-x", "c++", "-dM", "-E", os.devnull)
    sources = b"".join(path.read_bytes() for path in (_SOURCE, *_HEADERS))
    key = hashlib.sha256(sources + macros + f"{_FLAGS} {jaxlib.version.__version__}".encode())
    name = f"convolution-{key.hexdigest()[:16]}.so"
    folder = cache_folder("native")
    kept = folder / name if folder else None
    if kept and _is_our_own(kept.parent) and _is_our_own(kept):
        with contextlib.suppress(OSError):  # damaged, or nothing there may be run
            return ctypes.CDLL(str(kept))
    with tempfile.TemporaryDirectory() as scratch:
        built = Path(scratch) / name
        _run(*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", str(built), str(_SOURCE))
        if kept:
            # No room, a folder of somebody else's, or nothing there may be run.
            with contextlib.suppress(OSError):
                _copy(built, kept)
                return ctypes.CDLL(str(kept))
        return ctypes.CDLL(str(built))


def _is_our_own(path: Path) -> bool:
    """Whether this user alone can have written what lies there, as ssh asks of its files."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.geteuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _copy(built: Path, kept: Path) -> None:
    kept.parent.mkdir(parents=True, exist_ok=True)
    if kept.parent.stat().st_uid != os.geteuid():
        raise PermissionError(f"{kept.parent} belongs to another user")
    kept.parent.chmod(0o700)  # whatever the umask
    # Whole before it has its name: another process may be looking for it.
    with tempfile.TemporaryDirectory(dir=kept.parent, ignore_cleanup_errors=True) as scratch:
        copy = Path(shutil.copy(built, scratch))
        copy.chmod(0o600)
        with copy.open("rb+") as file:
            os.fsync(file.fileno())
        copy.replace(kept)


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
