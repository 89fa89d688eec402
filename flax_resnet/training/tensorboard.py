"""What a run shows in TensorBoard: scalars, its config, augmented images, histograms of its layers.

TensorBoard has a card for each name and a line on it for each folder: so what is measured on the
test split lies in a folder of its own, under the same names. Cards are in the order of the
alphabet: epoch/, inputs, run/, step/, weights/.
"""

import io
import re
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.hparams.summary_v2 import hparams_pb
from tensorboard.plugins.text.summary_v2 import text_pb
from tensorboard.summary.writer.record_writer import RecordWriter

from flax_resnet.errors import printable
from flax_resnet.models import unstack_blocks
from flax_resnet.models.dialects import torch_name
from flax_resnet.training.history import Record

_PIXELS_BETWEEN_IMAGES = 2

# Of the summaries only the old kinds are written, and not tensors, but at step 0: those are not
# forgotten everywhere when a run goes back to an earlier step.


def open_writer(folder: Path, step: int) -> RecordWriter:
    """An event file, with which TensorBoard forgets what came after so many steps.

    Unlike TensorBoard's EventFileWriter it has no thread, which would end with a traceback
    when the disk is full. All functions here raise OSError then.
    """
    folder.mkdir(exist_ok=True)
    # TensorBoard reads a run's files in the order of their names, and clocks go back.
    earlier = [re.search(r"tfevents\.(\d+)", path.name) for path in folder.glob("events.out.*")]
    now = max([time.time_ns(), *(int(match[1]) + 1 for match in earlier if match)])
    path = folder / f"events.out.tfevents.{now}.{socket.gethostname()}"
    writer = RecordWriter(path.open("wb"))
    _write(writer, _event(0, file_version="brain.Event:2"))
    _write(writer, _event(step + 1 if step else 0, session_log={"status": "START"}))
    return writer


def write_scalars(writer: RecordWriter, step: int, group: str, values: Record) -> None:
    """Shows group/NAME of every value that is not None."""
    shown = [
        {"tag": f"{group}/{name}", "simple_value": value}
        for name, value in values.items()
        if value is not None
    ]
    _write(writer, _event(step, summary={"value": shown}))


def write_epoch(train: RecordWriter, test: RecordWriter, record: Record) -> None:
    """Shows a line of metrics.jsonl: epoch/ has loss and accuracy of both splits, run/ the rest."""
    for writer, split in ((train, "train_"), (test, "test_")):
        values = {k.removeprefix(split): v for k, v in record.items() if k.startswith(split)}
        write_scalars(writer, record["step"], "epoch", values)
    shown = ("epoch", "step", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
    rest = {name: value for name, value in record.items() if name not in shown}
    write_scalars(train, record["step"], "run", rest)


def write_config(writer: RecordWriter, config: Mapping[str, Any]) -> None:
    """Shows the config as text, and as what runs are compared by under HParams."""
    # A path need not be UTF-8.
    config = {k: printable(v) if isinstance(v, str) else v for k, v in config.items()}
    lines = [f"| `{key}` | `{value}` |" for key, value in config.items()]
    table = "\n".join(["| key | value |", "|---|---|", *lines])
    _write(writer, _event(0, summary=text_pb("config", table)))
    values = {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in config.items()
    }
    _write(writer, _event(0, summary=hparams_pb(values)))


def write_histograms(writer: RecordWriter, step: int, scales: Any, gradient_norms: Any) -> None:
    """Shows weights/scale/LAYER and weights/gradient/LAYER, layers by their names in PyTorch.

    Args:
      writer: see `open_writer`.
      step: number of steps done.
      scales: of the normalisations, a tree like the model's parameters; the blocks of a
        stage may be on top of each other, here and in the next.
      gradient_norms: see `split_layers`.
    """
    histograms = []
    for kind, tree in (("scale", scales), ("gradient", gradient_norms)):
        arrays: dict[tuple[str, ...], np.ndarray] = flatten_dict(unstack_blocks(tree))  # pyright: ignore[reportAssignmentType]
        for path, values in arrays.items():
            if values.size and np.isfinite(values).all():
                tag = f"weights/{kind}/{_layer(path)}"
                histograms.append({"tag": tag, "histo": _histogram(values)})
    _write(writer, _event(step, summary={"value": histograms}))


def write_images(writer: RecordWriter, images: np.ndarray) -> None:
    """Shows inputs, uint8 [N, H, W, C], side by side in one, if C is 1 or 3."""
    if images.shape[-1] not in (1, 3):
        return
    count, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(count)))
    rows = -(-count // columns)
    gap = _PIXELS_BETWEEN_IMAGES
    grid = np.zeros(
        (rows * (height + gap) - gap, columns * (width + gap) - gap, channels), np.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[top : top + height, left : left + width] = image
    png = io.BytesIO()
    Image.fromarray(grid.squeeze(-1) if channels == 1 else grid).save(png, "png")
    picture = {
        "height": grid.shape[0],
        "width": grid.shape[1],
        "colorspace": channels,
        "encoded_image_string": png.getvalue(),
    }
    _write(writer, _event(0, summary={"value": [{"tag": "inputs", "image": picture}]}))


def _layer(path: tuple[str, ...]) -> str:
    return torch_name(("params", *path)).removesuffix(".weight")


def _histogram(values: np.ndarray) -> dict[str, Any]:
    values = values.astype(np.float64)  # in which even neighbours have 30 bins between them
    low, high = values.min(), values.max()
    counts, edges = [values.size], np.array([low, np.nextafter(low, np.inf)])
    if low < high:
        counts, edges = np.histogram(values, bins=30)
    return {
        "min": low,
        "max": high,
        "num": values.size,
        "sum": values.sum(),
        "sum_squares": np.square(values).sum(),
        "bucket_limit": edges[1:],
        "bucket": counts,
    }


def _write(writer: RecordWriter, event: Any) -> None:
    writer.write(event.SerializeToString())
    writer.flush()


def _event(step: int, **what: Any) -> Any:
    # Its types are made at run time.
    return event_pb2.Event(wall_time=time.time(), step=step, **what)  # pyright: ignore[reportAttributeAccessIssue]
