"""What a run shows in TensorBoard: scalars, augmented images, histograms of its layers."""

import io
import re
import socket
import time
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict
from PIL import Image
from tensorboard.compat.proto import event_pb2
from tensorboard.summary.writer.record_writer import RecordWriter

from flax_resnet.models import unstack_blocks
from flax_resnet.models.torch_weights import torch_name
from flax_resnet.training.history import Record

_PIXELS_BETWEEN_IMAGES = 2

# Of the summaries only the old kinds are written, and not tensors: those are not forgotten
# everywhere when a run goes back to an earlier step.


def open_writer(workdir: Path, step: int) -> RecordWriter:
    """An event file, with which TensorBoard forgets what came after so many steps.

    Unlike TensorBoard's EventFileWriter it has no thread, which would end with a traceback
    when the disk is full. All functions here raise OSError then.
    """
    # TensorBoard reads a run's files in the order of their names, and clocks go back.
    earlier = [re.search(r"tfevents\.(\d+)", path.name) for path in workdir.glob("events.out.*")]
    now = max([time.time_ns(), *(int(match[1]) + 1 for match in earlier if match)])
    path = workdir / f"events.out.tfevents.{now}.{socket.gethostname()}"
    writer = RecordWriter(path.open("wb"))
    _write(writer, _event(0, file_version="brain.Event:2"))
    _write(writer, _event(step + 1 if step else 0, session_log={"status": "START"}))
    return writer


def write_scalars(writer: RecordWriter, record: Record, group: str = "") -> None:
    """Shows a record, as train/loss, test/loss, learning_rate, ..., after the group's name."""
    values = [
        {"tag": group + re.sub("^(train|test)_", r"\1/", name), "simple_value": value}
        for name, value in record.items()
        if name not in ("epoch", "step") and value is not None
    ]
    _write(writer, _event(record["step"], summary={"value": values}))


def write_histograms(writer: RecordWriter, step: int, scales: Any, gradient_norms: Any) -> None:
    """Shows scale/LAYER and gradient/LAYER, the layers by their names in PyTorch.

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
                histograms.append({"tag": f"{kind}/{_layer(path)}", "histo": _histogram(values)})
    _write(writer, _event(step, summary={"value": histograms}))


def write_images(writer: RecordWriter, images: np.ndarray) -> None:
    """Shows train/images, uint8 [N, H, W, C], side by side in one, if C is 1 or 3."""
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
    _write(writer, _event(0, summary={"value": [{"tag": "train/images", "image": picture}]}))


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
