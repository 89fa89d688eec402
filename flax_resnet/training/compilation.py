"""JAX's cache of compiled programs."""

import os

import jax

from flax_resnet.models.caches import cache_folder


def keep_compiled_programs() -> None:
    """Has JAX keep what it compiles in the user's cache folder, where nothing else is set.

    Set JAX_COMPILATION_CACHE_DIR for another folder, or JAX_ENABLE_COMPILATION_CACHE=false
    for none.
    """
    folder = cache_folder("xla")
    if folder and not jax.config.values["jax_compilation_cache_dir"]:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
            # A start has a dozen small programs, which together take seconds.
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
