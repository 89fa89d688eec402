"""A page to try a run's best checkpoint on, in a browser.

    python -m flax_resnet.demo --workdir RUN

One drops a picture on it, or takes one with the camera, and gets the five most
probable classes, and for a ResNet, ResNet9 or VGG where in the picture it sees
the first of them. Pictures of the test split are there to begin with, where it
can be read. The page is for this machine alone unless --host says otherwise:
0.0.0.0 is for all that reach it. Ctrl-C ends it.

It needs gradio: pip install -e '.[demo]'. Exits with 2 and one line on
standard error where the input cannot be used.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Sized
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy.special import softmax

from flax_resnet.cli import Parser, run_program
from flax_resnet.data.photos import Photos
from flax_resnet.data.pictures import opened, upright
from flax_resnet.errors import InputError, one_line
from flax_resnet.evaluate import open_test_set
from flax_resnet.maps import beside_its_map, has_maps, make_mapper
from flax_resnet.predict import load_run_of_pictures, make_reader
from flax_resnet.progress import say, warn
from flax_resnet.runs import Run, make_classifier
from flax_resnet.training.data import open_split

_EXAMPLES = 8
_TOP = 5
_MAP_SIZE = 448

Answer = tuple[dict[str, float], Image.Image | None]


def make_answer(run: Run) -> Callable[[str | Path], Answer]:
    """The way from a picture's file to what the page shows of it.

    Returns:
      A file -> the probability of every class by its name, and the picture beside the same under
      the map of its most probable class, or None for a model without maps.

    Raises (the function):
      InputError: if it is not a picture that can be read.
    """
    read, classify = make_reader(run), make_classifier(run, 1)
    activation_maps = make_mapper(run) if has_maps(run) else None

    def answer(path: str | Path) -> Answer:
        image = read(str(path))
        (logits,) = classify(image[None])
        probabilities = softmax(logits.astype(np.float64))
        # Of classes with one name the most probable is shown.
        order = np.argsort(probabilities, stable=True)
        named = {run.class_names[i]: float(probabilities[i]) for i in order}
        if activation_maps is None:
            return named, None
        (shown,) = activation_maps(image[None], logits[None].argmax(-1))
        return named, beside_its_map(image, shown, _MAP_SIZE)

    return answer


def write_examples(run: Run, folder: Path) -> list[str]:
    """Writes a test picture of each of eight classes at most; none where they cannot be read."""
    try:
        pictures = _test_pictures(run)
    except InputError as error:
        warn(f"there are no examples: {one_line(error)}")
        return []
    paths = [str(folder / f"{i}.png") for i in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        picture.save(path)
    return paths


def _test_pictures(run: Run) -> list[Image.Image]:
    """The first of each class, before what `make_reader` does to them."""
    if run.config.image_size is None:
        data = open_test_set(run)
        chosen = _one_of_each(data.read(_first(data))[1])
        return [Image.fromarray(image.squeeze()) for image in data.read(chosen)[0]]
    data, _ = open_split(run.config, run.config.eval_split)
    assert isinstance(data, Photos)
    chosen = _one_of_each(data.pictures.files(_first(data))[1])
    pictures = []
    for file in data.pictures.files(chosen)[0]:
        with opened(file) as picture:
            pictures.append(upright(picture))
    return pictures


def _first(data: Sized) -> np.ndarray:
    return np.arange(min(len(data), 100 * _EXAMPLES))


def _one_of_each(labels: np.ndarray) -> np.ndarray:
    _, firsts = np.unique(labels, return_index=True)
    return np.sort(firsts)[:_EXAMPLES]


def make_page(run: Run, examples: list[str]) -> Any:
    """The page, a `gradio.Interface`.

    Raises:
      InputError: if gradio is not installed, or too old.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # nothing is told to anybody
    try:
        import gradio  # pyright: ignore[reportMissingImports]

        if int(gradio.__version__.partition(".")[0]) < 6:
            raise ImportError(gradio.__version__)
    except ImportError as error:
        raise InputError("the page needs gradio 6 or newer: pip install -U gradio") from error
    answer = make_answer(run)

    def shown(path: str | None) -> Any:
        if path is None:
            return None, None
        try:
            return answer(path)
        except InputError as error:
            raise gradio.Error(one_line(error)) from error

    return gradio.Interface(
        shown,
        gradio.Image(
            type="filepath",
            image_mode=None,  # the file as it is: `upright` knows what to do with transparency
            label="Picture",
            sources=["upload", "webcam", "clipboard"],
        ),
        [
            gradio.Label(num_top_classes=_TOP, label="What it says"),
            gradio.Image(
                label="As it sees it, and where it sees that", buttons=["download", "fullscreen"]
            ),
        ],
        title=run.workdir.resolve().name,
        description=f"{run.config.model}, trained on {run.data_name}, {run.step:,} steps",
        examples=examples or None,
        cache_examples=False,
        live=True,
        flagging_mode="never",
        analytics_enabled=False,
    )


def _parser() -> Parser:
    parser = Parser("demo", __doc__ or "")
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: this machine alone)"
    )
    parser.add_argument("--port", type=int, default=7860, help="port to listen on (default: 7860)")
    return parser


def _main(options: argparse.Namespace) -> int:
    run = load_run_of_pictures(options.workdir)
    with tempfile.TemporaryDirectory() as folder:
        page = make_page(run, write_examples(run, Path(folder)))
        try:
            page.launch(
                server_name=options.host,
                server_port=options.port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                allowed_paths=[folder],
            )
        except (OSError, OverflowError, ValueError) as error:  # a port that is none, a proxy
            raise InputError(f"cannot listen on {options.host}:{options.port}: {error}") from error
        say(f"open http://{options.host}:{options.port} in a browser; Ctrl-C ends it")
        page.block_thread()
    return 0


if __name__ == "__main__":
    run_program(_parser(), _main)
