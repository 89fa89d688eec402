"""The configuration of a run: every key, its default and its range."""

import difflib
import math
import numbers
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict, config_dict

from flax_resnet.errors import InputError
from flax_resnet.models import create_model

SCHEDULES = ("constant", "step", "cosine", "onecycle")
DTYPES = ("auto", "float32", "bfloat16")


def default_config() -> ConfigDict:
    """Every key of a run with its default; a recipe changes some and adds none."""
    config = ConfigDict()

    # Seed of the initial weights, the order of the examples and their augmentation.
    config.seed = 0

    # Data: a TFDS name, its folder (None: $TFDS_DATA_DIR or ~/tensorflow_datasets),
    # and TFDS split strings.
    config.dataset = "cifar10"
    config.data_dir = config_dict.placeholder(str)
    config.train_split = "train"
    config.eval_split = "test"
    # Pixels of black added on every side before a random crop; 0 for no crop.
    config.crop_padding = 4
    config.horizontal_flip = True

    # One of fr.list_models(), and fields of ResNet that differ from its own.
    config.model = "cifar_resnet18"
    config.model_fields = ConfigDict({"zero_init_residual": False})
    # Type of the compute; "auto" is bfloat16 on GPU and TPU and float32 on CPU.
    config.dtype = "auto"

    # Examples a step, over all devices together. What is left of an epoch is dropped:
    # another part of the examples every epoch.
    config.batch_size = 128
    config.eval_batch_size = 512
    # Length of the run; num_steps, where it is set, is the length instead.
    config.num_epochs = 200
    config.num_steps = config_dict.placeholder(int)

    # Learning rate: `learning_rate` is its peak. Linear warm-up over `warmup_epochs`,
    # then "constant"; "step", times `decay_factor` at each of the fractions `decay_at`
    # of the run; "cosine" to 0; or "onecycle", whose rise is the warm-up.
    config.learning_rate = 0.1
    config.schedule = "cosine"
    config.warmup_epochs = 0.0
    config.decay_at = (0.5, 0.75)
    config.decay_factor = 0.1

    # SGD, as torch.optim.SGD means it.
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4
    # Whether weight decay also acts on BatchNorm's scale and bias and on fc's bias.
    config.decay_bn_and_bias = True
    config.label_smoothing = 0.0
    return config


# What a value has to be, beyond its type.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    "crop_padding": (lambda v: v >= 0, "at least 0"),
    "dtype": (lambda v: v in DTYPES, f"one of {', '.join(DTYPES)}"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "num_epochs": (lambda v: v >= 1, "at least 1"),
    "num_steps": (lambda v: v is None or v >= 1, "at least 1"),
    "learning_rate": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    "schedule": (lambda v: v in SCHEDULES, f"one of {', '.join(SCHEDULES)}"),
    "warmup_epochs": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "decay_at": (
        lambda v: all(isinstance(f, numbers.Real) and 0 < f < 1 for f in v),
        "fractions of the run, between 0 and 1",
    ),
    "decay_factor": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "label_smoothing": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
}


def check_config(config: ConfigDict) -> ConfigDict:
    """A complete, locked copy of `config`, its missing keys at their defaults.

    Raises:
      InputError: names every unknown key, wrong type and value out of range.
    """
    checked = default_config()
    problems = []
    for key, value in config.items():
        if key not in checked:
            near = difflib.get_close_matches(key, checked.keys(), n=1)
            hint = f": did you mean {near[0]!r}?" if near else ""
            problems.append(f"unknown config key {key!r}{hint}")
            continue
        try:
            checked[key] = value
        except (TypeError, ValueError):
            expected = checked.get_type(key).__name__
            problems.append(f"{key} must be of type {expected}, not {value!r}")
            continue
        valid, rule = _RANGES.get(key, (None, ""))
        if valid is not None and not valid(checked[key]):
            problems.append(f"{key} must be {rule}, not {value!r}")
    if checked.schedule == "onecycle" and not checked.warmup_epochs:
        problems.append("schedule 'onecycle' needs warmup_epochs above 0: the rise of the cycle")
    if checked.nesterov and not checked.momentum:
        problems.append("nesterov needs momentum above 0")
    try:
        create_model(checked.model, **checked.model_fields)
    except ValueError as error:
        problems.append(str(error))
    except TypeError as error:
        problems.append(f"model_fields do not fit {checked.model}: {error}")
    if problems:
        raise InputError("; ".join(problems))
    return checked.lock()
