"""JSON files of a run, whoever has written to them since, and paths that a user names."""

import json
import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax_resnet.errors import InputError, short_reason
from flax_resnet.models.caches import expanded

# A checkpoint's history of a million steps stays below it.
_MOST_BYTES = 2**28
_DEEPEST = 20


def read_json(
    path: Path, schema: Mapping[str, Callable[[Any], bool]] | None = None
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
      path: of the file.
      schema: by key, whether a value will do; the key has to be there.

    Raises:
      InputError: if it cannot be read, is no file or a very large one, or holds something else.
    """
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {short_reason(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it does not hold a JSON object")
    if _is_deeper(content, _DEEPEST):
        raise InputError(f"{path} is damaged: it is nested more than {_DEEPEST} deep")
    checks = (schema or {}).items()
    if bad := [key for key, fits in checks if key not in content or not fits(content[key])]:
        raise InputError(f"{path} is damaged: it does not hold {', '.join(bad)} as a run has it")
    return content


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a file of a run.

    Args:
      path: of the file.
      errors: of the decoding, as in Python.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is not text, no file or a very large one.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would never end
        raise ValueError("it is not a file")
    if status.st_size > _MOST_BYTES:
        raise ValueError(f"it has {status.st_size:,} bytes")
    return path.read_bytes().decode(errors=errors)


def is_list_of(kind: type, value: Any) -> bool:
    """Whether a value of a JSON file is a list, not empty, of one type."""
    return isinstance(value, list) and bool(value) and all(type(v) is kind for v in value)


def _is_deeper(content: Any, depth: int) -> bool:
    if not isinstance(content, dict | list):
        return False
    inner = content.values() if isinstance(content, dict) else content
    return depth == 0 or any(_is_deeper(value, depth - 1) for value in inner)


def write_json(path: Path, content: Any) -> None:
    """Writes an object, indented, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.unlink(missing_ok=True)  # it may be anything, as a pipe
    # The name of a file need not be UTF-8.
    temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    temporary.replace(path)


def user_path(path: str | os.PathLike[str]) -> Path:
    """A path as a user names it; ~ stands for a home folder.

    Raises:
      InputError: if there is no such home, or it is no path of this machine.
    """
    if "\0" in os.fspath(path) or "://" in os.fspath(path):
        raise InputError(f"{short_reason(path)} is no path of this machine")
    try:
        return expanded(path)
    except ValueError as error:
        raise InputError(short_reason(error)) from error
