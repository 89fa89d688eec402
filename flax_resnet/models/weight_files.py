"""state_dicts in files and on the Hugging Face Hub; nothing that is in them is run."""

import argparse
import contextlib
import logging
import os
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from flax_resnet.models.caches import expanded
from flax_resnet.models.checks import some
from flax_resnet.models.dialects import in_our_names
from flax_resnet.models.hub import download, shards

# What training scripts call a state_dict in a larger dict: timm's, torchvision's, PyTorch's
# tutorials, kuangliu's. The averaged weights first, which are those that scripts evaluate.
_WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model", "model_state_dict", "net")
# Without one of these a source may be the id of a Hub repository.
_SUFFIXES = (".safetensors", ".pth", ".pt", ".th", ".tar", ".bin", ".ckpt", ".json")


def read_state_dict(source: str | os.PathLike[str]) -> dict[str, Any]:
    """The state_dict in a file or on the Hugging Face Hub.

    What a file is its content tells, not its name: safetensors, what `torch.save` writes, or
    the `.index.json` of several such files beside it. It may hold the state_dict in another
    dict, as "state_dict", "model", "model_state_dict" or "net"; averaged weights beside them
    ("state_dict_ema", "model_ema") come first, and a warning in the log says so.

    Args:
      source: path of a file (`.safetensors`, `.pth`, `.pt`, `.th`, `.tar`, `.bin`, `.ckpt`), or
        id of a Hub repository with a `model.safetensors` or a `pytorch_model.bin`, as in
        "timm/resnet18.a1_in1k" or, at some revision, "timm/resnet18.a1_in1k@main". The
        latter needs `huggingface_hub`, and a network only for as long as it is not in its cache.

    Returns:
      Arrays or, from PyTorch's files, tensors by name; names are ours, as far as those in the
      file are known: see `dialects.py`.

    Raises:
      ValueError: if there is no such file or repository, or no state_dict can be read
        from it without unpickling more than tensors and a script's arguments.
      ImportError: if torch or huggingface_hub would be needed and is not installed.
    """
    return in_our_names(read_as_written(source))


def read_as_written(source: str | os.PathLike[str]) -> Mapping[str, Any]:
    """What `read_state_dict` reads, under the names that it has there."""
    path = expanded(source)
    # os.path says no where Path raises: a name too long, a folder not to be looked into.
    if not os.path.exists(path) and path.suffix.lower() not in _SUFFIXES:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", os.fspath(source)):
            raise ValueError(
                f"{source} is neither a file nor the id of a Hub repository, which looks like "
                "timm/resnet18.a1_in1k"
            )
        path = download(os.fspath(source))
    return _read(path)


def _read(path: Path, *, is_shard: bool = False) -> Mapping[str, Any]:
    if not os.path.exists(path):
        raise ValueError(f"there is no file {path}")
    if os.path.exists(path / "config.json"):
        raise ValueError(f"{path} is the folder of a run: write fr.load_run({str(path)!r})")
    if not os.path.isfile(path):
        raise ValueError(f"{path} is not a file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    # The length of a header of at most 100 MB, and the header, which is JSON.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 2**27:
        return _read_safetensors(path)
    if head.startswith(b"{") and not is_shard:  # or an index might name itself
        parts = (_read(shard, is_shard=True) for shard in shards(path))
        return {name: value for part in parts for name, value in part.items()}
    if head.startswith((b"PK", b"\x80")):  # a zip archive, as torch.save writes it, or a pickle
        return _read_pickle(path)
    reason = _guess(head) or "it is neither of safetensors nor of torch.save"
    raise ValueError(f"cannot read {path}: {reason}")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    try:
        # bfloat16 too: NumPy knows it as soon as JAX is imported.
        return safetensors.numpy.load_file(path)
    except Exception as error:  # its own, the system's and, for float8, NumPy's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"cannot read {path}: {reason}") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        import torch
        from torch.serialization import safe_globals
    except ImportError as error:
        raise ImportError(
            f"reading {path} needs PyTorch 2.6 or newer; .safetensors does not"
        ) from error
    try:
        with (
            warnings.catch_warnings(action="ignore"),  # of pickles that are not PyTorch's
            safe_globals(_harmless()),
            path.open("rb") as file,  # of a path torch.load takes the suffix for the content
        ):
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise nearly anything
        raise ValueError(f"cannot read {path}: {_why_not(path, error)}") from error
    return _unwrap(path, content)


def _why_not(path: Path, error: Exception) -> str:
    """Why PyTorch does not read a file; its own message says how to run what is in it."""
    names: list[str] = []
    with contextlib.suppress(Exception), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any(name.endswith("/constants.pkl") for name in names):
        return (
            "it is TorchScript, which is code. In PyTorch write "
            "torch.save(torch.jit.load(path).state_dict(), other_path)"
        )
    if any(name.endswith(".npy") for name in names):
        return "it is an archive of NumPy: give the dict of its arrays"
    if unknown := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"it holds more than tensors, {unknown[1]}; nothing in it was run. In PyTorch "
            "write torch.save(model.state_dict(), path)"
        )
    return "it is damaged, or holds more than tensors; nothing in it was run"


def _harmless() -> list[Any]:
    """What scripts keep beside tensors: their arguments, and a value of NumPy's, the accuracy."""
    scalar = np.float64(0).__reduce__()[0]
    names = [f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")]
    kinds = [type(np.dtype(name)) for name in ("f8", "f4", "i8", "i4", "?")]
    return [argparse.Namespace, np.dtype, *kinds, *((scalar, name) for name in names)]


def _unwrap(path: Path, content: Any) -> dict[str, Any]:
    """The state_dict, which has to be one, in what a training script has saved."""
    content = inner_state_dict(content, path)
    no_state_dict = f"{path} holds no state_dict, which is a dict of tensors, but"
    if not isinstance(content, Mapping):
        raise ValueError(f"{no_state_dict} {type(content).__name__}")
    tensors = {
        name: value
        for name, value in content.items()
        if isinstance(name, str) and hasattr(value, "detach")
    }
    if len(tensors) != len(content):
        others = some(name for name in content if name not in tensors)
        raise ValueError(f"{no_state_dict} a dict of {'tensors and ' * bool(tensors)}{others}")
    return tensors


def inner_state_dict(content: Any, whose: str | os.PathLike[str]) -> Any:
    """What lies in a larger dict as `state_dict`, `model`, ...; else the content itself."""
    wrapped = content if isinstance(content, Mapping) else {}
    found = [name for name in _WRAPPERS if isinstance(wrapped.get(name), Mapping)]
    if len(found) > 1:
        logging.getLogger(__name__).warning(
            "%s holds %s: %s is taken", whose, " and ".join(found), found[0]
        )
    return wrapped[found[0]] if found else content


def _guess(head: bytes) -> str | None:
    """Why a file cannot be read, where that is easily told."""
    head = head.lstrip()
    if not head:
        return "it is empty"
    if head.startswith(b"<"):
        return "it is a web page"
    if head.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer; `git lfs pull` fetches the file"
    return None
