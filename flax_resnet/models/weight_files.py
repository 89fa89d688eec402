"""state_dicts in files and on the Hugging Face Hub; nothing that is in them is run."""

import argparse
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

# What training scripts wrap a state_dict in: timm's, torchvision's, PyTorch's tutorials.
_WRAPPERS = ("state_dict", "model", "model_state_dict")
_PREFIXES = re.compile(r"^(module\.|_orig_mod\.)+")


def read_state_dict(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The state_dict in a file or on the Hugging Face Hub.

    A `.pth` or `.pt` file may hold it as "state_dict", "model" or "model_state_dict" in
    another dict; "module." and "_orig_mod." before a name are taken off.

    Args:
      source: path of a `.safetensors`, `.pth` or `.pt` file, or id of a Hub repository with
        a `model.safetensors`, as in "timm/resnet18.a1_in1k". The latter needs
        `huggingface_hub`, and a network only for as long as it is not in its cache.

    Returns:
      Arrays or, from `.pth` and `.pt`, tensors by name.

    Raises:
      ValueError: if there is no such file or repository, or no state_dict can be read
        from it without unpickling more than tensors and a script's arguments.
      ImportError: if torch or huggingface_hub would be needed and is not installed.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    # os.path says no where Path raises: a name too long, a folder not to be looked into.
    if not os.path.exists(path) and suffix not in (".safetensors", ".pth", ".pt"):
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", os.fspath(source)):
            raise ValueError(f"{source} is neither a file nor the id of a Hub repository")
        path = Path(_download(os.fspath(source)))
        suffix = path.suffix
    if not os.path.exists(path):
        raise ValueError(f"there is no file {path}")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    if suffix == ".safetensors":
        state_dict = _read_safetensors(path)
    elif suffix in (".pth", ".pt"):
        state_dict = _read_pickle(path)
    else:
        raise ValueError(f"weights are read from .safetensors, .pth and .pt, not {path}")
    return without_prefixes(state_dict)


def without_prefixes(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The entries without what DataParallel and torch.compile put before their names."""
    return {_PREFIXES.sub("", name): value for name, value in state_dict.items()}


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        # bfloat16 too: NumPy knows it as soon as JAX is imported.
        return safetensors.numpy.load_file(path)
    except Exception as error:  # its own, the system's and, for float8, NumPy's
        raise ValueError(f"cannot read {path}: {_guess(path) or _one_line(error)}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        import torch
        from torch.serialization import safe_globals
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch 2.5 or newer; .safetensors does not"
        ) from error
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of pickles that are not PyTorch's
            # The script's arguments, as timm and torchvision keep them: attributes, no code.
            safe_globals([argparse.Namespace]),
        ):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        # PyTorch's own message says how to run what is in the file.
        reason = _guess(path) or "it is damaged, or holds more than tensors; nothing in it was run"
        raise ValueError(f"cannot read {path}: {reason}") from error
    if isinstance(content, Mapping):
        wrapped = (content.get(name) for name in _WRAPPERS)
        content = next((w for w in wrapped if isinstance(w, Mapping)), content)
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and torch.is_tensor(value) for name, value in content.items()
    ):
        raise ValueError(f"{path} holds no state_dict, which is a dict of tensors")
    return dict(content)


def _guess(path: Path) -> str | None:
    """Why a file cannot be read, where that is easily told."""
    try:
        with path.open("rb") as file:
            head = file.read(64).lstrip()
    except OSError as error:
        return error.strerror
    if not head:
        return "it is empty"
    if head.startswith(b"<"):
        return "it is a web page"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` fetches the file"
    return None


def _download(repository: str) -> str:
    """Path of a Hub repository's model.safetensors, in the Hub's own cache."""
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError as error:
        raise ImportError(
            f"there is no file {repository}, and to fetch it from the Hugging Face Hub needs "
            "huggingface_hub: pip install huggingface_hub"
        ) from error
    try:
        try:
            return huggingface_hub.hf_hub_download(
                repository, "model.safetensors", local_files_only=True
            )
        except LocalEntryNotFoundError:
            # Without a network this fails at once, where hf_hub_download tries for 23 seconds.
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repository, "model.safetensors")
            )
            return huggingface_hub.hf_hub_download(repository, "model.safetensors")
    except Exception as error:  # its own, and those of its HTTP library, which it has changed
        raise ValueError(
            f"there is no file {repository}, and it cannot be fetched from the Hugging Face Hub: "
            f"{_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
