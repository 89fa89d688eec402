"""Weights on the Hugging Face Hub, in its own cache."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

# What repositories call them, the best first; an index names the files of several shards.
_FILES = (
    "model.safetensors",
    "pytorch_model.bin",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)

_LARGEST_INDEX = 2**26  # bytes, a hundred times those of the largest models


def download(repository: str) -> Path:
    """Path of a Hub repository's weights, or of the index of their shards, all downloaded.

    Args:
      repository: its id, as in "timm/resnet18.a1_in1k"; "@" and a branch, a tag or a commit
        may follow it.

    Raises:
      ValueError: if there is no such repository, or no weights in it.
      ImportError: if huggingface_hub is not installed.
    """
    name, _, revision = repository.partition("@")
    try:
        import huggingface_hub as hub
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"there is no file or folder {repository}, and fetching it from the Hugging Face Hub "
            "needs huggingface_hub: pip install huggingface_hub"
        ) from error
    where: dict[str, Any] = {"revision": revision} if revision else {}

    def cached(file: str) -> str | None:
        try:
            return hub.hf_hub_download(name, file, local_files_only=True, **where)
        except LocalEntryNotFoundError:
            return None

    def fetched(file: str) -> str | None:
        try:
            # Without a network this fails at once, where hf_hub_download tries for 23 seconds.
            hub.get_hf_file_metadata(hub.hf_hub_url(name, file, **where))
        except EntryNotFoundError:
            return None
        return hub.hf_hub_download(name, file, **where)

    def first(files: Iterable[str]) -> str | None:
        found = (path for find in (cached, fetched) for file in files if (path := find(file)))
        return next(found, None)

    try:
        path = first(_FILES)
        if path and path.endswith(".index.json"):
            for shard in shards(Path(path)):
                first([shard.name])
    except Exception as error:  # its own, and those of its HTTP library, which it has changed
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(
            f"there is no file or folder {repository}, and it cannot be fetched from the Hugging "
            f"Face Hub: {reason}"
        ) from error
    if path is None:
        raise ValueError(
            f"{repository} has no weights that can be read: neither {_FILES[0]} nor {_FILES[1]}, "
            "whole or in shards"
        )
    return Path(path)


def shards(index: Path) -> list[Path]:
    """The files that an index names, beside it.

    Raises:
      ValueError: if it is no index.
    """
    try:
        if index.stat().st_size > _LARGEST_INDEX:
            raise ValueError(index)
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        is_index = all(Path(name).name == name for name in names)  # no other folder's
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        is_index, names = False, []
    if not is_index:
        raise ValueError(f"cannot read {index}: it is JSON, but no index of weights in shards")
    return [index.parent / name for name in names]
