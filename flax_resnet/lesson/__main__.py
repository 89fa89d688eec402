"""Measures what the lesson on skip connections explains, and draws it. See `--help`."""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm import tqdm

from flax_resnet.cli import Parser, run_program
from flax_resnet.data import channel_statistics, load_dataset, normalize
from flax_resnet.errors import InputError
from flax_resnet.lesson import figures, measure
from flax_resnet.models import lab10_resnet50
from flax_resnet.progress import bar, say, shows_bars
from flax_resnet.training.jsonfiles import user_path

_DESCRIPTION = """\
Measures on real images what the lesson on skip connections explains, and
draws it.

  identity   a block whose last BatchNorm starts at zero passes its input on
             unchanged
  gradients  norm of the gradient by layer, plain and residual, 20, 56 and 110
             layers, at initialisation and in the first steps of training
  fields     shape and receptive field of every stage, over an image
  curves     loss and error of plain-20, plain-56, residual-20 and residual-56
             over whole runs, from their metrics.jsonl; prints the commands of
             those that are not there

Each part writes its figures, and the numbers in them as JSON, into the output
folder, and prints the numbers that matter.
"""

_EPILOG = """\
On 2 cores of a CPU all parts take about five minutes, most of it for
gradients; choose others with --parts. docs/lesson.md tells what there is to
see in the figures.

examples:
  python -m flax_resnet.lesson --dataset digits         no download
  python -m flax_resnet.lesson --parts identity fields  the quick ones
  python -m flax_resnet.lesson --parts curves --metrics runs/cifar_plain20 \\
      runs/cifar_plain56 runs/cifar_resnet20 runs/cifar_resnet56
"""

_RECIPE = "configs/cifar_resnet20.py"


class Images(NamedTuple):
    """The training split.

    Attributes:
      dataset: its name.
      raw: uint8 [N, H, W, C].
      normalised: float32 [N, H, W, C].
      labels: int32 [N].
    """

    dataset: str
    raw: np.ndarray
    normalised: jax.Array
    labels: np.ndarray


def make_parser() -> Parser:
    """The command line of `python -m flax_resnet.lesson`."""
    parser = Parser("lesson", _DESCRIPTION)
    parser.epilog = _EPILOG
    add = parser.add_argument
    add("--output", type=Path, default=Path("lesson"), metavar="DIR", help="default: lesson")
    add(
        "--dataset",
        choices=("cifar10", "digits"),
        help="default: cifar10 where TFDS has prepared it, digits elsewhere",
    )
    add(
        "--data_dir",
        metavar="DIR",
        help="folder of TFDS; default: $TFDS_DATA_DIR, or ~/tensorflow_datasets",
    )
    add(
        "--parts",
        nargs="+",
        metavar="PART",
        choices=tuple(_PARTS),
        default=tuple(_PARTS),
        help=f"{', '.join(_PARTS)}; default: all",
    )
    add("--steps", type=at_least(2), default=30, help="of training, for gradients; default: 30")
    add("--batch_size", type=at_least(2), default=64, help="for gradients; default: 64")
    add("--seed", type=at_least(0), default=0, help="of weights and batches; default: 0")
    add(
        "--metrics",
        type=Path,
        nargs="+",
        metavar="PATH",
        help="for curves: folders of runs, or files MODEL.jsonl; default: those in docs/results",
    )
    return parser


def at_least(least: int) -> Callable[[str], int]:
    """A type of argparse: an integer from `least` to 2**31 - 1."""

    def integer(text: str) -> int:
        value = int(text)
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{value} is not from {least} to 2**31 - 1")
        return value

    return integer


def main(options: argparse.Namespace) -> int:
    """Runs the parts that the command line asks for; returns the exit code."""
    output = user_path(options.output)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot write into {output}: {error.strerror}") from error
    images = None
    for part in dict.fromkeys(options.parts):
        started = time.monotonic()
        if part != "curves" and images is None:
            images = load_images(options)
        measure_part, draw = _PARTS[part]
        numbers = measure_part(options, images)
        if numbers is None:
            continue
        try:
            (output / f"{part}.json").write_text(json.dumps(numbers) + "\n")
            draw(numbers, output / f"{part}.png")
        except OSError as error:
            raise InputError(f"cannot write into {output}: {error.strerror}") from error
        say(f"{part}: {time.monotonic() - started:.0f} s, {output / part}.png")
    return 0


def load_images(options: argparse.Namespace) -> Images:
    """The training split of the data set that was asked for, or that is there."""
    dataset = options.dataset
    if dataset is None:
        folder = options.data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
        there = os.path.exists(os.path.join(os.path.expanduser(folder), "cifar10"))
        dataset = "cifar10" if there else "digits"
        if dataset == "digits":
            say(f"there is no cifar10 in {folder}: using digits")
    data = load_dataset(dataset, "train", options.data_dir)
    if options.batch_size > len(data):
        raise InputError(f"--batch_size {options.batch_size}: {dataset} has {len(data)} images")
    statistics = channel_statistics([data.images])
    return Images(dataset, data.images, normalize(data.images, *statistics), data.labels)


def describe(options: argparse.Namespace, images: Images) -> dict[str, Any]:
    """What a part's numbers come from."""
    device = jax.devices()[0]
    kind = f"{os.cpu_count()}-core CPU" if device.platform == "cpu" else device.device_kind
    return {"dataset": images.dataset, "seed": options.seed, "device": kind}


def measure_identity(options: argparse.Namespace, images: Images) -> dict[str, Any]:
    """The blocks of a plain net, a residual one and one that starts at zero, of 56 layers."""
    nets = {
        "plain": measure.net("plain", 56),
        "residual": measure.net("residual", 56),
        "residual, last scale 0": measure.net("residual", 56, zero_init_residual=True),
    }
    batch = images.normalised[:64]
    numbers = describe(options, images) | {"image": images.raw[_SHOWN].tolist(), "nets": {}}
    for name, model in bar(nets.items(), len(nets), "identity"):
        variables = measure.initial_variables(model, options.seed, batch.shape[1:])
        maps = measure.stage_maps(model, variables, batch)
        changes = measure.block_changes(maps)
        values = dict(maps)
        shown = [x for x in ("stem", "layer1_0", "layer1_2", "layer1_8") if x in values]
        numbers["nets"][name] = {
            "changes": [change._asdict() for change in changes],
            "maps": {block: rounded(values[block][_SHOWN].mean(-1)) for block in shown},
        }
        largest = max(change.largest for change in changes)
        relative = [change.relative for change in changes]
        print(
            f"identity: {name}: largest |output - input| of {len(changes)} blocks {largest:.4g}, "
            f"relative change {min(relative):.3g} to {max(relative):.3g}"
        )
    return numbers


def measure_gradients(options: argparse.Namespace, images: Images) -> dict[str, Any]:
    """Gradient norms of six nets, before and during training."""
    numbers = describe(options, images) | {
        "steps": options.steps,
        "batch_size": options.batch_size,
        "nets": {},
    }
    nets = [(kind, depth) for depth in measure.DEPTHS for kind in measure.KINDS]
    total = options.steps * sum(depth for _, depth in nets)
    with tqdm(total=total, unit=" layers", disable=not shows_bars(), dynamic_ncols=True) as shown:
        for kind, depth in nets:
            name = f"{kind}-{depth}"
            shown.set_description(f"gradients: {name}")
            if shown.disable:
                say(f"gradients: {name} ...")
            model = measure.net(kind, depth)
            variables = measure.initial_variables(model, options.seed, images.raw.shape[1:])
            measured = []
            for step in measure.measure_training(
                model,
                variables,
                images.normalised,
                images.labels,
                batch_size=options.batch_size,
                steps=options.steps,
                seed=options.seed,
            ):
                measured.append(step)
                shown.update(depth)
            start, end = measured[0], measured[-1]
            numbers["nets"][name] = {
                "loss": rounded([step.loss for step in measured]),
                "first_gradient": rounded([step.gradients[0] for step in measured]),
                "first_kernel": rounded([step.kernels[0] for step in measured]),
                "at_start": rounded_norms(start),
                "at_end": rounded_norms(end),
            }
            norms = "; ".join(
                f"step {at}: first layer {x.gradients[0]:.3g} (kernel {x.kernels[0]:.3g}), "
                f"last convolution {x.gradients[-2]:.3g} (kernel {x.kernels[-2]:.3g})"
                for at, x in ((1, start), (options.steps, end))
            )
            last = [step.loss for step in measured[-5:]]
            print(
                f"gradients: {name}: {norms}; loss {start.loss:.3f}, "
                f"mean of the last {len(last)} steps {np.mean(last):.3f}",
                flush=True,
            )
    return numbers


def measure_fields(options: argparse.Namespace, images: Images) -> dict[str, Any]:
    """Shapes and receptive fields of ResNet-20 and the lesson's ResNet-50."""
    shape = images.raw.shape[1:]
    numbers = describe(options, images) | {"image": images.raw[_SHOWN].tolist()}
    nets = {"cifar_resnet20": measure.net("residual", 20), "lab10_resnet50": lab10_resnet50()}
    for name, model in bar(nets.items(), len(nets), "fields"):
        stages = measure.stages(model, shape)
        numbers[name] = [stage._asdict() for stage in stages]
        for stage in stages:
            size = " x ".join(map(str, stage.shape))
            print(f"fields: {name} {stage.name}: {size}, sees {stage.field} x {stage.field} pixels")
    for kind in measure.KINDS:
        model = measure.net(kind, 20)
        variables = measure.initial_variables(model, options.seed, shape)
        seen = measure.influence(model, variables, images.normalised[:256], "layer3")
        half = measure.central_square(seen, 0.5)
        numbers[kind] = {"influence": rounded(seen), "half": half}
        print(f"fields: {kind}-20: half of the influence on a layer3 unit is in {half} x {half}")
    return numbers


def read_curves(options: argparse.Namespace, _: Any) -> dict[str, Any] | None:
    """The metrics of the four runs; None, with the commands that make them, if one lacks."""
    if options.metrics is None:
        stored = [Path("docs/results") / f"{name}.jsonl" for name in figures.CURVES]
        paths = [path for path in stored if path.exists()]
    else:
        paths = [user_path(path) for path in options.metrics]
    found = dict(map(read_metrics, paths))
    missing = [name for name in figures.CURVES if name not in found]
    if not missing:
        for name in figures.CURVES:
            last = found[name][-1]
            print(
                f"curves: {name}: epoch {last['epoch']:.0f}, "
                f"training loss {last['train_loss']:.4f}, test accuracy {last['test_accuracy']:.2%}"
            )
        return {name: found[name] for name in figures.CURVES}
    print(f"curves: no metrics of {', '.join(missing)}, which lie in docs/results of the project.")
    print("These commands make others:")
    for name in missing:
        keys = f"--config.model={name} --config.num_steps=7800"
        print(f"  python train.py --config {_RECIPE} {keys} --workdir runs/{name}")
    print("and --metrics takes their folders.")
    return None


def read_metrics(path: Path) -> tuple[str, list[dict[str, float]]]:
    """Model and records of a run, from its folder or a copy of its metrics.jsonl.

    Raises:
      InputError: if that is not what the path leads to.
    """
    file, name = path, path.stem
    try:
        if path.is_dir() or path.name == "metrics.jsonl":
            folder = path if path.is_dir() else path.parent
            file = folder / "metrics.jsonl"
            name = json.loads((folder / "config.json").read_text())["model"]
        keys = ("epoch", "train_loss", "train_accuracy", "test_loss", "test_accuracy")
        records = [json.loads(line) for line in file.read_text().splitlines()]
        evaluated = [record for record in records if record["test_accuracy"] is not None]
        records = [{key: float(record[key]) for key in keys} for record in evaluated]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not hold the metrics of a run: {error!r}") from error
    if name not in figures.CURVES:
        raise InputError(f"{path} is a run of {name}; curves are of {', '.join(figures.CURVES)}")
    if not records:
        raise InputError(f"{file} has no epoch yet")
    return name, records


# How each is measured (None: it cannot be yet) and drawn.
_PARTS: dict[str, tuple[Callable[..., dict[str, Any] | None], Callable[..., None]]] = {
    "identity": (measure_identity, figures.draw_identity),
    "gradients": (measure_gradients, figures.draw_gradients),
    "fields": (measure_fields, figures.draw_fields),
    "curves": (read_curves, figures.draw_curves),
}
_SHOWN = 7  # the image in the figures


def rounded_norms(step: measure.StepMeasure) -> dict[str, list[float]]:
    """The norms of one step, to be written."""
    return {"kernels": rounded(step.kernels), "gradients": rounded(step.gradients)}


def rounded(values: Any) -> Any:
    """Nested lists of floats with five digits."""
    values = np.asarray(values)
    return np.vectorize(lambda x: float(f"{x:.5g}"))(values).tolist()


if __name__ == "__main__":
    run_program(make_parser(), main)
