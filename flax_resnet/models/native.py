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


def lanes() -> int | None:
    """Channels that convolution.cc takes at a time; its functions are known to XLA then.

    It is compiled once, by the compiler that $CXX names or c++, in two to three seconds,
    and kept in the user's cache folder for as long as source, compiler, kind of CPU and
    jaxlib stay the same.

    Returns:
      None, with one warning in the log, where it cannot be compiled.
    """
    with _one_at_a_time:
        return _load()


_one_at_a_time = threading.Lock()


@functools.cache
def _load() -> int | None:
    try:
        library = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.CalledProcessError) as error:
        reason: object = error
        if isinstance(error, subprocess.CalledProcessError):
            reason = error.stderr.decode(errors="replace")
        logging.getLogger(__name__).warning(
            "training on this CPU will be over three times slower than it could be: "
            "convolution.cc could not be compiled: %s",
            reason,
        )
        return None
    for name in ("forward", "input_gradient", "kernel_gradient"):
        target = jax.ffi.pycapsule(getattr(library, name))
        jax.ffi.register_ffi_target(f"flax_resnet_{name}", target, platform="cpu")
    return library.lanes()


def _compiled() -> Path:
    """The compiled library, from the cache if it is there."""
    compiler = shlex.split(os.environ.get("CXX") or shutil.which("c++") or "")
    if not compiler:
        raise OSError("there is no C++ compiler")
    # What a compiler defines for a CPU tells its version and every set of instructions.
    macros = _run(*compiler, "-march=native", "-x", "c++", "-dM", "-E", os.devnull)
    sources = b"".join(path.read_bytes() for path in (_SOURCE, *_HEADERS))
    key = hashlib.sha256(sources + macros + f"{_FLAGS} {jaxlib.version.__version__}".encode())
    folder = platformdirs.user_cache_path("flax_resnet") / "native"
    path = folder / f"convolution-{key.hexdigest()[:16]}.so"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Whole before it has its name: another process may be looking for it.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            built = Path(scratch) / path.name
            options = [*_FLAGS, "-isystem", jax.ffi.include_dir(), "-o", str(built)]
            _run(*compiler, *options, str(_SOURCE))
            built.replace(path)
    return path


def _run(*command: str) -> bytes:
    return subprocess.run(command, check=True, capture_output=True).stdout
