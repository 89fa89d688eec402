"""Classifies pictures with a run's best checkpoint.

    python -m flax_resnet.predict --workdir RUN image.png folder/ -

A folder stands for all pictures in it and below, by their names' endings; `-` for one on
standard input. Any size, mode and format that Pillow reads will do: the picture is turned
upright as its EXIF data say, laid on white where it is transparent, reduced to 8 bits, and
of several frames the first is taken. The largest part around its middle with the training
images' aspect ratio is then resized to their size, antialiased (bicubic).

A picture that cannot be read is named on standard error and left out, and the exit code is
1 after the others. Other input that cannot be used ends with one line there and exit code 2.
"""

import argparse
import contextlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy.special import softmax
from tqdm import tqdm

from flax_resnet.cli import Parser, run_program
from flax_resnet.errors import InputError, one_line, printable
from flax_resnet.progress import bar, warn
from flax_resnet.runs import Run, load_run, make_classifier

_BATCH_SIZE = 64
_TOP = 5


def read_image(source: str | Path | BytesIO, image_shape: Sequence[int]) -> np.ndarray:
    """Reads a picture as a training image, as the top of this file says.

    Args:
      source: a file, or what it holds.
      image_shape: (H, W, C) of the training images, with C 1 (grey) or 3 (RGB).

    Returns:
      uint8 [H, W, C].

    Raises:
      InputError: if it is not a picture, is damaged, or has more than twice as many pixels as
        `PIL.Image.MAX_IMAGE_PIXELS`, 179 million as Pillow comes.
    """
    height, width, channels = image_shape
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of Pillow: large, or with odd metadata
            with Image.open(source) as image:
                image.load()
                upright = image
                with contextlib.suppress(Exception):  # where its metadata alone is damaged
                    upright = ImageOps.exif_transpose(image)
                sized = ImageOps.fit(_to_8_bits(upright), (width, height), Image.Resampling.BICUBIC)
    except Exception as error:  # Pillow's decoders raise what they like
        raise InputError(_reason(error)) from error
    return np.asarray(sized.convert("L" if channels == 1 else "RGB")).reshape(image_shape)


def _to_8_bits(image: Image.Image) -> Image.Image:
    """As "L" or "RGB"."""
    if image.mode.startswith(("I", "F")):  # Pillow would cut off what is above 255
        values = np.asarray(image, np.float64)
        white = 65535
        if image.mode == "F":  # where two conventions live
            white = 1 if values.max() <= 1 else 255
        return Image.fromarray(np.uint8(np.clip(values / white, 0, 1) * 255 + 0.5))
    if image.has_transparency_data:
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not a picture that Pillow reads"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return one_line(error)


def find_images(path: Path) -> list[Path]:
    """The pictures in a folder and below, in order, by their names' endings.

    Raises:
      InputError: if there is none.
    """
    endings = {
        ending
        for ending, kind in Image.registered_extensions().items()
        if kind in Image.OPEN  # some are only written
    }
    found = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and os.path.isfile(p))
    if not found:
        raise InputError("a folder without pictures")
    return found


def _parser() -> Parser:
    parser = Parser("predict", __doc__ or "")
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print a JSON object a line and picture: {"image", "predictions": [{"class", '
        '"probability"}, ...]}, the most probable class first',
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a picture, a folder, or - for standard input"
    )
    return parser


def _main(options: argparse.Namespace) -> int:
    run = load_run(options.workdir)
    if run.image_shape[2] not in (1, 3):
        raise InputError(f"{run.workdir} was trained on images of {run.image_shape[2]} channels")
    failed: list[str] = []

    def skip(name: str, error: InputError) -> None:
        failed.append(name)
        warn(f"{printable(name)}: {error}")

    paths: list[str] = []
    for given in options.images:
        try:
            paths += map(str, find_images(Path(given))) if os.path.isdir(given) else [given]
        except InputError as error:
            skip(given, error)

    def read() -> Iterator[tuple[str, np.ndarray]]:
        count = len(paths)
        shown = bar(paths, count, f"reading {count} pictures") if count > 1 else paths
        for path in shown:
            try:
                source = BytesIO(sys.stdin.buffer.read()) if path == "-" else path
                yield path, read_image(source, run.image_shape)
            except InputError as error:
                skip(path, error)

    show = _as_json if options.json else _as_table
    size = min(_BATCH_SIZE, len(paths))
    classify = make_classifier(run, size)
    pictures = read()
    while batch := list(itertools.islice(pictures, size)):
        names, images = zip(*batch, strict=True)
        logits = classify(np.stack(images)).astype(np.float64)
        for name, probabilities in zip(names, softmax(logits, axis=-1), strict=True):
            tqdm.write(show(name, _best(run, probabilities)))
    return 1 if failed else 0


def _best(run: Run, probabilities: np.ndarray) -> list[tuple[str, float]]:
    order = np.argsort(-probabilities, stable=True)[:_TOP]
    return [(run.class_names[i], float(probabilities[i])) for i in order]


def _as_json(image: str, best: list[tuple[str, float]]) -> str:
    predictions = [{"class": name, "probability": p} for name, p in best]
    return json.dumps({"image": image, "predictions": predictions})


def _as_table(image: str, best: list[tuple[str, float]]) -> str:
    return "\n".join([printable(image), *(f"  {p:7.2%}  {printable(name)}" for name, p in best)])


if __name__ == "__main__":
    run_program(_parser(), _main)
