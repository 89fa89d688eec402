"""Shows runs in one HTML file that needs neither a network nor anything beside it.

    python -m flax_resnet.report RUN [RUN ...] [--output FILE]

It has the curves of all runs, overlaid, and for each: accuracy with its 95% interval,
confusion matrix, classes, calibration, the most confident mistakes and the first layer's
filters, all of the newest checkpoint, and config, versions and hardware. It is written as
report.html into the first run's folder, and train.py writes it at the end of a run.

A run may still be at work. Exits with 2 and one line on standard error where the input
cannot be used.
"""

import argparse
import base64
import importlib.metadata
import io
import os
import re
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jinja2
import matplotlib
import matplotlib.ticker
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from flax_resnet.cli import Parser, run_program
from flax_resnet.data import Dataset, Examples
from flax_resnet.errors import InputError, one_line
from flax_resnet.evaluate import (
    Evaluation,
    evaluate,
    open_test_set,
    percent,
    percent_range,
    summarize,
)
from flax_resnet.progress import say, warn
from flax_resnet.runs import Run, load_run, open_run
from flax_resnet.training import check_config, hosts
from flax_resnet.training.data import Split
from flax_resnet.training.history import best_of
from flax_resnet.training.jsonfiles import user_path, write_whole
from flax_resnet.training.own import without_replaced

_BINS = 15
_MISTAKES = 12
_FILTERS = 64
# A table of the confusions has so many classes at most.
_CLASSES = 20
# And a drawing of them so many rows: it has no more pixels.
_SIDE = 500
# Of the runs, on light and on dark paper.
_COLORS = (
    ("#1f77b4", "#4ea3e0"),
    ("#d9730d", "#f5994a"),
    ("#2c8c3c", "#57bd68"),
    ("#c2342c", "#f0685f"),
    ("#7d54b8", "#ab8ade"),
    ("#8a5a44", "#c08f78"),
    ("#c4479b", "#ea83c4"),
    ("#16858f", "#45bac4"),
)
# Matplotlib draws with colours that stand for those of the page, light or dark.
_INK, _GOOD = "#010203", "#010204"
_RUN_INKS = tuple(f"#0102{16 + i}" for i in range(len(_COLORS)))
_PAGE_COLORS = {_INK: "currentColor", _GOOD: "var(--good)"} | {
    ink: f"var(--run{i})" for i, ink in enumerate(_RUN_INKS)
}
_DRAWING: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "flax_resnet",  # the same file every time
    "text.parse_math": False,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _INK,
    "grid.alpha": 0.15,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "font.size": 10,
}


def write_report(
    workdirs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    data_dir: str | None = None,
    model: nn.Module | None = None,
    data: Dataset | Examples | None = None,
) -> Path:
    """Writes the report of one run or several, and evaluates each once for it.

    Where the test split of a run cannot be read, or its model is its script's own and not given
    here, its part says so and lacks what needs it.

    Args:
      workdirs: folders of the runs.
      output: the file; report.html in the first of the folders by default.
      data_dir: folder of TFDS, if it is not where the runs found it.
      model, data: model and test split of the runs whose script brought their own.

    Returns:
      The file.

    Raises:
      InputError: if a folder is not a run's or has no checkpoint that can be read, or if the
        file cannot be written.
    """
    runs = [open_run(workdir, "newest") for workdir in workdirs]
    if model is not None:
        runs = [
            load_run(r.workdir, "newest", model=model) if "model" in r.brought else r for r in runs
        ]
    path = runs[0].workdir / "report.html" if output is None else user_path(output)
    if os.path.exists(path) and not os.path.isfile(path):  # a folder, or a device
        raise InputError(f"{path} is not a file: name one by --output")
    short = [run.workdir.resolve().name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run.workdir) for run in runs]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flax_resnet"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = percent
    with matplotlib.rc_context(_DRAWING):
        page = environment.get_template("report.html").render(
            title=", ".join(names),
            written=time.strftime("%Y-%m-%d %H:%M"),
            version=importlib.metadata.version("flax_resnet"),
            colors=_COLORS,
            bins=_BINS,
            charts=_curves(runs),
            runs=[
                {"name": name, "color": i % len(_COLORS)} | _describe(run, data_dir, data)
                for i, (name, run) in enumerate(zip(names, runs, strict=True))
            ],
        )
    try:
        write_whole(path, page)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}; name another --output") from error
    return path


def report_after_training(workdir: str | Path) -> None:
    """Writes the report of a run that is done, on the first host; says so where it cannot."""

    def write() -> None:
        if jax.process_index() > 0:
            return
        say(f"writing {Path(workdir) / 'report.html'}")
        try:
            write_report([workdir])
        except Exception as error:  # whatever it is, the run is done and on disk
            warn(f"there is no report: {one_line(error)}")

    hosts.first_host_first("report", write)


# What the page shows of a run.


def _describe(
    run: Run, data_dir: str | None, own_data: Dataset | Examples | None
) -> dict[str, Any]:
    defaults = check_config({})
    config = [(name, f"{value}, of its own", True) for name, value in run.brought.items()] + [
        (key, str(value), value != getattr(defaults, key))
        for key, value in without_replaced(vars(run.config), run.brought).items()
    ]
    described: dict[str, Any] = {
        "config": config,
        "environment": run.hardware | run.versions,
        "class_names": run.class_names,
        "filters": _filters(run),
    }
    try:
        if run.model is None:
            raise InputError(f"its model, {run.brought['model']}, is its script's own")
        data = open_test_set(run, data_dir, own_data if "data" in run.brought else None)
        evaluation = evaluate(run, data)
    except InputError as error:
        return described | {"problem": str(error), "facts": _facts(run)}
    summary = summarize(run, evaluation)
    probabilities = evaluation.probabilities
    confidence = probabilities.max(-1)
    bins = calibration_bins(confidence, evaluation.correct, _BINS)
    error = calibration_error(*bins)
    return described | {
        "problem": None,
        "facts": _facts(run, summary, error),
        "confusion": _confusion(run, evaluation),
        "classes": summary["classes"],
        "calibration_error": error,
        "reliability": _reliability(*bins),
        "mistakes": _mistakes(run, data, evaluation, probabilities),
    }


def _facts(
    run: Run, summary: dict[str, Any] | None = None, calibration: float | None = None
) -> dict[str, str]:
    """The table at the top of the page."""
    config, records = run.config, run.records
    parameters = sum(leaf.size for leaf in jax.tree.leaves(run.variables["params"]))
    facts = dict.fromkeys(
        ("test accuracy", "95% interval", "top-5", "test loss", "calibration error"), "-"
    )
    if summary is not None:
        facts = {
            "test accuracy": f"{percent(summary['accuracy'])} of {summary['examples']:,} images",
            "95% interval": percent_range(summary["interval"]),
            "top-5": percent(summary["top5_accuracy"]),
            "test loss": f"{summary['loss']:.4f}",
            "calibration error": percent(calibration),
        }
    facts |= {
        "checkpoint": f"the newest, step {run.step:,}",
        "epochs done": f"{len(records)} of {config.num_epochs}",
        "best epoch": "-",
        "model": run.brought.get("model", config.model),
        "parameters": f"{parameters:,}",
        "evaluated in": np.dtype(getattr(run.model, "dtype", None) or np.float32).name,
        "data": run.brought.get("data", config.dataset),
        "splits": "-" if "data" in run.brought else f"{config.train_split}, {config.eval_split}",
        "speed": "-",
        "time": "-",
    }
    if config.num_steps:
        facts["epochs done"] = f"{len(records)}, for {config.num_steps:,} steps in all"
    if records:
        if best := best_of(records):
            facts["best epoch"] = f"{best['epoch']}, with {percent(best['test_accuracy'])}"
        speed = np.median([record["images_per_second"] for record in records])
        facts["speed"] = f"{speed:,.0f} training images/s"
        facts["time"] = tqdm.format_interval(sum(record["seconds"] for record in records))
    return facts


def calibration_bins(
    confidence: np.ndarray, correct: np.ndarray, bins: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean confidence and accuracy of examples by confidence, in bins of equal width.

    C. Guo et al., On Calibration of Modern Neural Networks, ICML 2017, arXiv:1706.04599.

    Args:
      confidence: float [N], the probability of each prediction; above 0, at most 1.
      correct: bool [N].
      bins: how many; each has its upper bound, and not its lower one.

    Returns:
      Examples, int [bins], and their mean confidence and accuracy, float [bins], which are
      NaN for a bin without examples.
    """
    of_each = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    counts, sums, hits = (
        np.bincount(of_each, weights, minlength=bins) for weights in (None, confidence, correct)
    )
    with np.errstate(invalid="ignore"):
        return counts, sums / counts, hits / counts


def calibration_error(counts: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> float:
    """Expected calibration error, of `calibration_bins`: their mean gap, by examples."""
    return float(np.nansum(counts * np.abs(accuracy - confidence)) / counts.sum())


def _confusion(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """Rows for a table, or a drawing and the most frequent pairs where there are many classes."""
    count = len(run.class_names)
    matrix = _confusion_matrix(evaluation, count)
    # The root, for mistakes to be seen beside what is right.
    tint = np.sqrt(matrix / np.maximum(matrix.sum(1, keepdims=True), 1))
    if count <= _CLASSES:
        rows = [
            (name, [(int(matrix[i, j]), round(85 * tint[i, j]), i == j) for j in range(count)])
            for i, name in enumerate(run.class_names)
        ]
        return {"rows": rows}
    figure = Figure(figsize=(5, 5), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=False)
    color = np.array([0.55, 0.35, 0.75])  # seen on light paper and on dark
    axes.imshow(np.dstack([np.broadcast_to(color, (*tint.shape, 3)), tint]), interpolation="none")
    axes.set(xlabel="predicted", ylabel="true")
    wrong = ~evaluation.correct
    mistakes = np.stack([evaluation.labels[wrong], evaluation.predictions[wrong]])
    (labels, predictions), counts = np.unique(mistakes, axis=1, return_counts=True)
    frequent = [
        (run.class_names[labels[i]], run.class_names[predictions[i]], int(counts[i]))
        for i in np.argsort(-counts, stable=True)[:_CLASSES]
    ]
    return {"rows": None, "svg": _svg(figure, "confusion matrix"), "pairs": frequent}


def _confusion_matrix(evaluation: Evaluation, count: int) -> np.ndarray:
    """Numbers of images by true and predicted class; of very many classes neighbours are one."""
    side = min(count, _SIDE)
    labels, predictions = (
        classes.astype(np.int64) * side // count
        for classes in (evaluation.labels, evaluation.predictions)
    )
    return np.bincount(labels * side + predictions, minlength=side**2).reshape(side, side)


def _mistakes(
    run: Run, data: Split, evaluation: Evaluation, probabilities: np.ndarray
) -> list[dict[str, Any]]:
    (wrong,) = np.nonzero(~evaluation.correct)
    confidence = probabilities[wrong].max(-1)
    chosen = wrong[np.argsort(-confidence, stable=True)[:_MISTAKES]]
    if not len(chosen):
        return []
    images, _ = data.read(chosen)
    return [
        {
            "index": int(i),
            "picture": _png(image),
            "prediction": run.class_names[evaluation.predictions[i]],
            "probability": probabilities[i].max(),
            "label": run.class_names[evaluation.labels[i]],
            "own_probability": probabilities[i, evaluation.labels[i]],
        }
        for i, image in zip(chosen, images, strict=True)
    ]


def _filters(run: Run) -> dict[str, str] | None:
    """The kernels that see pixels; None where the model begins otherwise."""
    channels = run.image_shape[2]
    if channels not in (1, 3):
        return None
    kernels = jax.tree.leaves(run.variables["params"])
    of_pixels = [k for k in kernels if k.ndim == 4 and k.shape[2] == channels]
    if not of_pixels:
        return None
    kernel = np.asarray(of_pixels[0], np.float32)
    height, width, _, total = kernel.shape
    filters = np.moveaxis(kernel, -1, 0)[:_FILTERS]
    largest = np.maximum(np.abs(filters).max((1, 2, 3), keepdims=True), 1e-12)
    pixels = (127.5 + 127.5 * filters / largest).round().astype(np.uint8)
    # On clear ground, every weight a square.
    scale, gap, columns = max(1, 36 // width), 4, min(8, len(filters))
    rows = -(-len(filters) // columns)
    step_y, step_x = height * scale + gap, width * scale + gap
    sheet = np.zeros((rows * step_y - gap, columns * step_x - gap, 4), np.uint8)
    for i, one in enumerate(pixels):
        large = one.repeat(scale, 0).repeat(scale, 1)
        top, left = i // columns * step_y, i % columns * step_x
        sheet[top:, left:][: height * scale, : width * scale, :3] = large
        sheet[top:, left:][: height * scale, : width * scale, 3] = 255
    which = f"the first {len(filters)} of {total}" if total > len(filters) else f"{total}"
    return {
        "picture": _png(sheet),
        "caption": f"Filters of {height}x{width} pixels, {which}; grey is 0, and each is scaled "
        "to its own largest weight.",
    }


# Drawings.


def _curves(runs: Sequence[Run]) -> dict[str, Markup]:
    """A chart by what it shows, of all runs in one."""
    if not any(run.records for run in runs):
        return {}

    def of(name: str, change: Callable[[float], float] = float) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for i, run in enumerate(runs):
                for key, style in ((f"test_{name}", "-"), (f"train_{name}", "--"), (name, "-")):
                    shown = [record for record in run.records if record.get(key) is not None]
                    if shown:
                        epochs = [record["epoch"] for record in shown]
                        values = [change(record[key]) for record in shown]
                        marker = "." if len(values) < 40 else ""
                        color = _RUN_INKS[i % len(_RUN_INKS)]
                        axes.plot(epochs, values, style, marker=marker, color=color, linewidth=1.4)

        return draw

    def logarithmic(draw: Callable[[Axes], None]) -> Callable[[Axes], None]:
        def draw_so(axes: Axes) -> None:
            draw(axes)
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
            # Between powers of ten where there are few of them.
            few = matplotlib.ticker.LogFormatter(minor_thresholds=(1.5, 0.5))
            axes.yaxis.set_minor_formatter(few)

        return draw_so

    # No error at all has no logarithm.
    error = of("accuracy", lambda accuracy: 100 * (1 - accuracy) or np.nan)
    charts = {
        "Loss, logarithmic": logarithmic(of("loss")),
        "Accuracy (%)": of("accuracy", lambda accuracy: 100 * accuracy),
        "Error (%), logarithmic": logarithmic(error),
        "Learning rate": of("learning_rate"),
        "Training images per second": of("images_per_second"),
    }
    return {name: _chart(name, draw) for name, draw in charts.items()}


def _chart(name: str, draw: Callable[[Axes], None]) -> Markup:
    figure = Figure(figsize=(4.6, 2.9), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
    return _svg(figure, f"{name} by epoch")


def _reliability(counts: np.ndarray, confidence: np.ndarray, accuracy: np.ndarray) -> Markup:
    figure = Figure(figsize=(4.6, 4.2), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    centres = 100 * (np.arange(len(counts)) + 0.5) / len(counts)
    bars = partial(Axes.bar, width=92 / len(counts), color=_GOOD)
    bars(upper, centres, 100 * np.nan_to_num(accuracy), alpha=0.75)
    upper.plot(100 * confidence, 100 * confidence, "_", color=_INK, markersize=9)
    upper.plot([0, 100], [0, 100], "--", color=_INK, linewidth=1)
    upper.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    bars(lower, centres, 100 * counts / counts.sum(), alpha=0.4)
    lower.set(ylabel="images (%)", xlabel="confidence (%)")
    return _svg(figure, "accuracy by confidence")


def _svg(figure: Figure, label: str) -> Markup:
    """A drawing to stand inside the page, in the page's colours and as wide as there is room.

    Nothing of a run's folder is drawn, so there is nothing to escape.
    """
    file = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    view_box = re.findall(r'viewBox="[^"]*"', svg)[0]
    svg = re.sub(r"<svg[^>]*>", f'<svg role="img" aria-label="{label}" {view_box}>', svg, count=1)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # the same in every drawing
    svg = svg.replace("xlink:href", "href")
    for ink, color in _PAGE_COLORS.items():
        svg = svg.replace(ink, color)
    return Markup(svg)


def _png(pixels: np.ndarray) -> str:
    """uint8 [H, W, C] as the address of a picture."""
    file = io.BytesIO()
    Image.fromarray(pixels.squeeze()).save(file, "png")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _parser() -> Parser:
    parser = Parser("report", __doc__ or "")
    parser.add_argument("workdirs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the first run's folder"
    )
    parser.add_argument(
        "--data_dir", metavar="DIR", help="folder of TFDS, if it is not where the runs found it"
    )
    return parser


def _main(options: argparse.Namespace) -> int:
    path = write_report(options.workdirs, options.output, data_dir=options.data_dir)
    print(path)
    return 0


if __name__ == "__main__":
    run_program(_parser(), _main)
