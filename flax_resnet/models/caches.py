"""Where what can be made anew is kept from one process to the next, and paths in a home."""

import os
from pathlib import Path

import platformdirs


def cache_folder(name: str) -> Path | None:
    """The folder of that name in the user's cache, made or not; None where there is no home."""
    try:
        folder = platformdirs.user_cache_path("flax_resnet")
    except RuntimeError:
        return None
    return folder / name if folder.is_absolute() else None


def expanded(path: str | os.PathLike[str]) -> Path:
    """A path in which ~ stands for a home folder; ValueError where there is none."""
    path = os.path.expanduser(path)
    if path.startswith("~"):
        raise ValueError(f"there is no home folder for {path}: name another path")
    return Path(path)
