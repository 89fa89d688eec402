"""Classifies pictures with a run's best checkpoint.

    python -m flax_resnet.predict --workdir RUN image.png folder/ - [--maps DIR]

A folder stands for all pictures in it and below, by their names' endings; `-`
for one on standard input. Any size, mode and format that Pillow reads will do:
the picture is turned upright as its EXIF data say, laid on white where it is
transparent, reduced to 8 bits, and of several frames the first is taken. A run
with `image_size` sees it as in its evaluation. Else the largest part around
its middle with the training images' aspect ratio is resized to their size,
antialiased (bicubic).

With --maps a PNG of each is written: the picture as the net takes it, and
beside it the same under the class activation map of the most probable class,
see `flax_resnet.class_activation_maps`.

A picture that cannot be read is named on standard error and left out, and the
exit code is 1 after the others. Other input that cannot be used ends with one
line there and exit code 2.
"""

import argparse
import itertools
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy.special import softmax
from tqdm import tqdm

from flax_resnet.cli import Parser, run_program
from flax_resnet.data.pictures import find_pictures, opened, read_for_evaluation, upright
from flax_resnet.errors import InputError, printable
from flax_resnet.maps import beside_its_map, has_maps, make_mapper
from flax_resnet.progress import bar, warn
from flax_resnet.runs import Run, load_run, make_classifier
from flax_resnet.training.data import sizing
from flax_resnet.training.jsonfiles import user_path

_BATCH_SIZE = 64
_TOP = 5
# Pixels of a picture's longer side in a map's file, at least.
_MAP_SIZE = 224


def read_image(source: str | Path | BytesIO, image_shape: Sequence[int]) -> np.ndarray:
    """Reads a picture as a training image of a run without `image_size`.

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
    with opened(source) as image:
        sized = ImageOps.fit(upright(image), (width, height), Image.Resampling.BICUBIC)
        return np.asarray(sized.convert("L" if channels == 1 else "RGB")).reshape(image_shape)


def load_run_of_pictures(workdir: str | Path) -> Run:
    """As `load_run`, of a run on grey or RGB images."""
    run = load_run(workdir)
    if run.image_shape[2] not in (1, 3):
        raise InputError(f"{run.workdir} was trained on images of {run.image_shape[2]} channels")
    return run


def make_reader(run: Run) -> Callable[[str | BytesIO], np.ndarray]:
    """A picture as the run's evaluation has it."""
    if run.config.image_size is None:
        return partial(read_image, image_shape=run.image_shape)
    return partial(read_for_evaluation, sizing=sizing(run.config, run.image_shape[2]))


def _parser() -> Parser:
    parser = Parser("predict", __doc__ or "")
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--json",
        action="store_true",
        help='print one JSON object per picture, one per line: {"image", "predictions": [{"class", '
        '"probability"}, ...]}, the most probable class first',
    )
    parser.add_argument(
        "--maps", metavar="DIR", help="write where the net looked, a PNG for each picture"
    )
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="a picture, a folder, or - for standard input"
    )
    return parser


def _main(options: argparse.Namespace) -> int:
    run = load_run_of_pictures(options.workdir)
    failed: list[str] = []

    def skip(name: str, error: InputError) -> None:
        failed.append(name)
        warn(f"{printable(name)}: {error}")

    paths: list[str] = []
    for given in options.images:
        try:
            paths += _pictures_in(given) if os.path.isdir(given) else [given]
        except InputError as error:
            skip(given, error)

    write_maps = None if options.maps is None else _map_writer(run, user_path(options.maps), paths)
    read_one = make_reader(run)

    def read() -> Iterator[tuple[str, np.ndarray]]:
        count = len(paths)
        shown = bar(paths, count, f"reading {count} pictures") if count > 1 else paths
        for path in shown:
            try:
                source = _standard_input() if path == "-" else path
                yield path, read_one(source)
            except InputError as error:
                skip(path, error)

    show = _as_json if options.json else _as_table
    size = min(_BATCH_SIZE, len(paths))
    classify = make_classifier(run, size)
    pictures = read()
    while batch := list(itertools.islice(pictures, size)):
        names, images = zip(*batch, strict=True)
        logits = classify(np.stack(images)).astype(np.float64)
        if write_maps:
            write_maps(names, np.stack(images), logits.argmax(-1))
        for name, probabilities in zip(names, softmax(logits, axis=-1), strict=True):
            tqdm.write(show(name, _best(run, probabilities)))
    return 1 if failed else 0


def _standard_input() -> BytesIO:
    if sys.stdin is None:
        raise InputError("standard input is closed")
    return BytesIO(sys.stdin.buffer.read())


def _pictures_in(folder: str) -> list[str]:
    found = list(map(str, find_pictures(folder)))
    if not found:
        raise InputError("a folder without pictures")
    return found


def _map_writer(
    run: Run, folder: Path, pictures: Sequence[str]
) -> Callable[[Sequence[str], np.ndarray, np.ndarray], None]:
    """Writes maps of pictures, by name, for their classes.

    FILE-2.png where FILE.png is another's map, or one of the pictures themselves.
    """
    if not has_maps(run):
        raise InputError("--maps is for runs of a ResNet, ResNet9 or VGG")
    activation_maps = make_mapper(run)
    taken = {os.path.realpath(picture) for picture in pictures}
    # A stem goes on where it has come to: many folders may hold the same names.
    numbers: defaultdict[str, Iterator[int]] = defaultdict(lambda: itertools.count(1))

    def free(stem: str) -> str:
        names = (stem if number == 1 else f"{stem}-{number}" for number in numbers[stem])
        paths = (os.path.realpath(folder / f"{name}.png") for name in names)
        path = next(path for path in paths if path not in taken)
        taken.add(path)
        return path

    def write(names: Sequence[str], images: np.ndarray, classes: np.ndarray) -> None:
        for name, image, one in zip(names, images, activation_maps(images, classes), strict=True):
            stem = "stdin" if name == "-" else Path(name).stem
            beside_its_map(image, one, _MAP_SIZE).save(free(stem))

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--maps: {error}") from error
    return write


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
