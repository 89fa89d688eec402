"""Building and loading of convolution.cc for the CPU that this process runs on."""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import jax
import jaxlib.version
import platformdirs

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


_one_at_a_time = threading.Lock()


@functools.cache
def _load() -> int | None:
    try:
        library = _library()
        for name in ("forward", "input_gradient", "kernel_gradient"):
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
    try:
        return _cached(compiler, platformdirs.user_cache_path("flax_resnet") / "native" / name)
    except (OSError, RuntimeError):  # no home, no room in it, or nothing there may be run
        with tempfile.TemporaryDirectory() as scratch:
            return ctypes.CDLL(str(_build(compiler, Path(scratch) / name)))


def _cached(compiler: list[str], path: Path) -> ctypes.CDLL:
    if path.exists():
        try:
            return ctypes.CDLL(str(path))
        except OSError:  # damaged, or of another machine that shares the home
            path.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Whole before it has its name: another process may be looking for it.
    with tempfile.TemporaryDirectory(dir=path.parent, ignore_cleanup_errors=True) as scratch:
        built = _build(compiler, Path(scratch) / path.name)
        with built.open("rb+") as file:
            os.fsync(file.fileno())
        built.replace(path)
    return ctypes.CDLL(str(path))


def _build(compiler: list[str], path: Path) -> Path:
    _run(*compiler, *_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", str(path), str(_SOURCE))
    return path


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
