"""Where what can be made anew is kept from one process to the next."""

from pathlib import Path

import platformdirs


def cache_folder(name: str) -> Path | None:
    """The folder of that name in the user's cache, made or not; None where there is no home."""
    try:
        folder = platformdirs.user_cache_path("flax_resnet")
    except RuntimeError:
        return None
    return folder / name if folder.is_absolute() else None
