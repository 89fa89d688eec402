"""Where what can be made anew is kept from one process to the next."""

from pathlib import Path

import platformdirs


def cache_folder(name: str) -> Path | None:
    """The folder of that name in the user's cache, made or not; None where there is no home."""
    try:
        return platformdirs.user_cache_path("flax_resnet") / name
    except RuntimeError:
        return None
