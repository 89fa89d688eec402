"""Evaluates a run's checkpoint on the run's test split, each example once.

    python -m flax_resnet.evaluate --workdir RUN [--checkpoint best|newest|STEP]

The best checkpoint is the one with the highest accuracy on this very split, so
its accuracy is biased upwards; that of the newest is the last one in
metrics.jsonl, unless the run stopped inside an epoch. A run that trained on
GPU or TPU in bfloat16 is evaluated in float32 on a CPU.

The interval is Wilson's score interval for a binomial proportion (E. B.
Wilson, Probable inference, the law of succession, and statistical inference,
JASA 22, 1927): it holds for other test images from the same source, not for
other seeds.

Exits with 2 and one line on standard error where the input cannot be used.
"""

import argparse
import contextlib
import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import log_softmax, softmax

from flax_resnet.cli import Parser, run_program
from flax_resnet.data import (
    Dataset,
    EvalBatches,
    Examples,
    stream,
)
from flax_resnet.errors import InputError, printable
from flax_resnet.progress import bar, warn
from flax_resnet.runs import Run, load_run, make_classifier
from flax_resnet.training.config import FOLDER
from flax_resnet.training.data import Split, open_own, open_split
from flax_resnet.training.hardware import host_memory
from flax_resnet.training.jsonfiles import read_json

# A split that takes more bytes is streamed, where its files allow that.
_LARGE = 2**30
_TOP = 5
# It, and what is made of it in float64.
_BYTES_A_LOGIT = 32


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What a model says of every example of a split, in the split's order.

    Attributes:
      logits: float32 [N, K].
      labels: int32 [N].
    """

    logits: np.ndarray
    labels: np.ndarray

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [N, K]."""
        return softmax(self.logits.astype(np.float64), axis=-1)

    @property
    def predictions(self) -> np.ndarray:
        """int [N], the most probable classes."""
        return self.logits.argmax(-1)

    @property
    def correct(self) -> np.ndarray:
        """bool [N]."""
        return self.predictions == self.labels

    @property
    def loss(self) -> float:
        """Mean cross-entropy, in nats."""
        log_probabilities = log_softmax(self.logits.astype(np.float64), axis=-1)
        return -float(np.mean(np.take_along_axis(log_probabilities, self.labels[:, None], -1)))

    def accuracy_among(self, top: int) -> float:
        """How often the label is among the `top` most probable classes."""
        classes = np.argsort(-self.logits, axis=-1, stable=True)[:, :top]
        return float(np.mean((classes == self.labels[:, None]).any(-1)))


def open_test_set(
    run: Run, data_dir: str | None = None, own: Dataset | Examples | None = None
) -> Split:
    """The run's test split: in memory, or on disk if it is large.

    Args:
      run: says which.
      data_dir: folder of TFDS or of the pictures, if it is not where the run found it.
      own: the split itself, of a run whose script brought its data.

    Raises:
      InputError: if it cannot be read, or is not what the run was trained for.
    """
    config = run.config
    if own is not None:
        name, data = "the data", open_own(own)
    elif "data" in run.brought:
        raise InputError(
            f"the run in {run.workdir} has data of its own, {run.brought['data']}: "
            "in Python call flax_resnet.evaluate.evaluate(run, test)"
        )
    else:
        name = _dataset(run, data_dir)
        data, facts = open_split(config, config.eval_split, data_dir=data_dir)
        before = read_json(run.workdir / "dataset.json").get("test")
        if facts and before and facts != before:
            warn(f"the pictures of {name} are not all the same as in training")
    if not (isinstance(data, Dataset) or (data.can_be_streamed and data.nbytes > _LARGE)):
        data = data.load()
    trained_for = f"than the run in {run.workdir} was trained for"
    if data.class_names != run.class_names:
        raise InputError(f"{name} has other classes {trained_for}")
    if data.image_shape != run.image_shape:
        raise InputError(f"{name} has images of another shape, {data.image_shape}, {trained_for}")
    return data


def evaluate(run: Run, data: Split, *, flip: bool = False) -> Evaluation:
    """Classifies every example of a split once.

    Args:
      run: its model, variables and `eval_batch_size` are used.
      data: see `open_test_set`.
      flip: take the mean of the logits of each image and of its mirror image.

    Raises:
      InputError: if the examples cannot be read, or what is said of them would take most of the
        memory.
    """
    needed = _BYTES_A_LOGIT * len(data) * len(run.class_names)
    if needed > host_memory() / 2:
        raise InputError(
            f"the evaluation of {len(data):,} images of {len(run.class_names):,} classes would "
            f"take {needed / 2**30:.0f} GiB: name a part of the split"
        )
    size = min(run.config.eval_batch_size, len(data))
    classify = make_classifier(run, size, flip=flip)
    what = f"evaluating {len(data)} images"
    with contextlib.closing(_batches(data, size, run.config.stream_workers)) as batches:
        shown = bar(batches, -(-len(data) // size), what, unit=" batches")
        pairs = [(classify(images), labels) for images, labels in shown]
    logits, labels = (np.concatenate(arrays) for arrays in zip(*pairs, strict=True))
    return Evaluation(logits, labels)


def _batches(data: Split, size: int, workers: int) -> Generator[tuple[np.ndarray, np.ndarray]]:
    if isinstance(data, Dataset):
        for start in range(0, len(data), size):
            yield data.images[start:][:size], data.labels[start:][:size]
        return
    with contextlib.closing(stream(EvalBatches(data, size, slice(None)), workers)) as batches:
        for batch in batches:
            yield batch["image"][batch["mask"]], batch["label"][batch["mask"]]


def wilson_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95% score interval of a proportion; see the top of this file for the source."""
    from scipy.stats import binomtest  # a second of import

    interval = binomtest(correct, count).proportion_ci(0.95, method="wilson")
    return float(interval.low), float(interval.high)


def percent(share: float | None) -> str:
    """A share to two digits, "-" for None."""
    return "-" if share is None else f"{share:.2%}"


def percent_range(interval: tuple[float, float] | None) -> str:
    """An interval of shares, as `percent`."""
    return "-" if interval is None else f"{percent(interval[0])} to {percent(interval[1])}"


def summarize(run: Run, evaluation: Evaluation) -> dict[str, Any]:
    """The numbers of an evaluation, as `--json` prints them.

    Returns:
      "examples", "correct", "accuracy", "interval" (low, high), "top5_accuracy" and "loss",
      and "classes", in their order, each with "name" and the first four of these, of which
      "accuracy" and "interval" are None for a class without examples.
    """

    def proportion(hits: int, count: int) -> dict[str, Any]:
        return {
            "examples": count,
            "correct": hits,
            "accuracy": hits / count if count else None,
            "interval": wilson_interval(hits, count) if count else None,
        }

    labels, correct = evaluation.labels, evaluation.correct
    counts, hits = (
        np.bincount(of, minlength=len(run.class_names)).tolist() for of in (labels, labels[correct])
    )
    return proportion(sum(hits), sum(counts)) | {
        "top5_accuracy": evaluation.accuracy_among(_TOP),
        "loss": evaluation.loss,
        "classes": [
            {"name": name} | proportion(hit, count)
            for name, hit, count in zip(run.class_names, hits, counts, strict=True)
        ],
    }


def _parser() -> Parser:
    parser = Parser("evaluate", __doc__ or "")
    parser.add_argument("--workdir", required=True, metavar="RUN", help="folder of the run")
    parser.add_argument(
        "--checkpoint",
        default="best",
        metavar="best|newest|STEP",
        help="which checkpoint: best (the default), newest, or that of a step",
    )
    parser.add_argument(
        "--tta",
        action="store_true",
        help="take the mean of the logits (not of the probabilities) of each image and of its "
        "mirror image, left to right; no help where mirror images mean something else",
    )
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        help="folder of TFDS, or of the pictures, if it is not where the run found it",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, not a table")
    return parser


def _main(options: argparse.Namespace) -> int:
    run = load_run(options.workdir, options.checkpoint)
    data = open_test_set(run, options.data_dir)
    evaluation = evaluate(run, data, flip=options.tta)
    summary = {
        "workdir": str(run.workdir),
        "checkpoint": run.step,
        "dataset": _dataset(run, options.data_dir),
        "split": run.config.eval_split,
        "tta": options.tta,
    } | summarize(run, evaluation)
    print(json.dumps(summary, indent=2) if options.json else _table(summary))
    return 0


def _dataset(run: Run, data_dir: str | None) -> str:
    """Its name; of pictures the folder that is read."""
    name = run.config.dataset
    return f"{FOLDER}{data_dir}" if data_dir and name.startswith(FOLDER) else name


def _table(summary: dict[str, Any]) -> str:
    rows = [
        (
            printable(one["name"]),
            str(one["examples"]),
            str(one["correct"]),
            percent(one["accuracy"]),
            percent_range(one["interval"]),
        )
        for one in summary["classes"]
    ]
    rows = [("class", "images", "correct", "accuracy", "95% interval"), *rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    split = f"{summary['dataset']} {summary['split']}"
    flips = ", with horizontal flips" if summary["tta"] else ""
    return "\n".join(
        [
            f"checkpoint {summary['checkpoint']} of {printable(summary['workdir'])} on "
            f"{summary['examples']} images of {printable(split)}{flips}",
            "",
            f"accuracy  {percent(summary['accuracy']):>7}, "
            f"95% interval {percent_range(summary['interval'])}",
            f"top-{_TOP}     {percent(summary['top5_accuracy']):>7}",
            f"loss      {summary['loss']:7.4f}",
            "",
            *(
                "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
                for row in rows
            ),
        ]
    )


if __name__ == "__main__":
    run_program(_parser(), _main)
