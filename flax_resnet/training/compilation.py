"""JAX's cache of compiled programs, on by default."""

import os

import jax
import platformdirs


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, where nothing else is set.

    Set JAX_COMPILATION_CACHE_DIR for another folder, or JAX_ENABLE_COMPILATION_CACHE=false
    for none.
    """
    if not jax.config.values["jax_compilation_cache_dir"]:
        folder = platformdirs.user_cache_path("flax_resnet") / "xla"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # A start has a dozen small programs, which together take seconds.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
