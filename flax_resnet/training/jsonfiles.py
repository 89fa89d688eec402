"""JSON files of a run, whoever has written to them since."""

import json
import os
from pathlib import Path
from typing import Any

from flax_resnet.errors import InputError, short_reason

# A checkpoint's history of a million steps stays below it.
_MOST_BYTES = 2**28


def read_json(path: Path) -> dict[str, Any]:
    """The object that a JSON file holds.

    Raises:
      InputError: if it cannot be read, is no file or a very large one, or holds something else.
    """
    try:
        if not os.path.isfile(path) and os.path.exists(path):  # a pipe would never end
            raise InputError(f"{path} cannot be read: it is not a file")
        if os.stat(path).st_size > _MOST_BYTES:
            raise InputError(f"{path} is damaged: it has {os.stat(path).st_size:,} bytes")
        content = json.loads(path.read_text())
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {short_reason(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: it does not hold a JSON object")
    return content


def write_json(path: Path, content: Any) -> None:
    """Writes an object, indented, whole or not at all."""
    write_whole(path, json.dumps(content, indent=2) + "\n")


def write_whole(path: Path, content: str) -> None:
    """Writes a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(content, encoding="utf-8")
    temporary.replace(path)
