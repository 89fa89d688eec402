"""What a script brings to `train` in place of what the config names."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import flax.linen as nn
import jax
import optax

from flax_resnet.data import Dataset, Examples
from flax_resnet.errors import InputError
from flax_resnet.training.config import Config
from flax_resnet.training.steps import Loss

# Images, uint8 [N, H, W, C], and a key for each, [N], to images.
Augment = Callable[[jax.Array, jax.Array], jax.Array]

# The keys of a config that each takes the place of.
REPLACED = {
    "model": ("model", "model_fields", "dtype", "batch_norm", "freeze"),
    "data": (
        *("dataset", "data_dir", "train_split", "eval_split", "label_key", "channels"),
        *("image_size", "eval_resize", "interpolation", "bad_images"),
        *("crop", "crop_area", "crop_ratio", "auto_augment"),
    ),
    "loss": ("label_smoothing",),
    "optimizer": (
        "optimizer",
        "momentum",
        "nesterov",
        "weight_decay",
        "decay_bn_and_bias",
        "clip_norm",
    ),
    "augment": ("crop_padding", "horizontal_flip", "alternating_flip", "cutout"),
}

# Those that say how a model or images are to be, which one's own would not be.
_REFUSED = {
    "model": ("batch_norm", "freeze", "init_from"),
    "data": ("channels", "image_size", "eval_resize", "crop"),
}


@dataclass(frozen=True)
class Own:
    """A model, data, ... of a script's own, see `train`; None where the config's is taken.

    Raises (when made):
      InputError: if one is of another type.
    """

    model: nn.Module | None = None
    data: tuple[Dataset | Examples, Dataset | Examples] | None = None
    loss: Loss | None = None
    optimizer: (
        optax.GradientTransformation
        | Callable[[optax.Schedule], optax.GradientTransformation]
        | None
    ) = None
    augment: Augment | None = None

    def __post_init__(self):
        if self.model is not None and not isinstance(self.model, nn.Module):
            raise InputError(f"model is a flax.linen.Module, not {_type(self.model)}")
        if self.data is not None:
            pair = isinstance(self.data, tuple | list) and len(self.data) == 2
            if not pair or not all(isinstance(split, Dataset | Examples) for split in self.data):
                raise InputError(
                    "data is (train, test), each an fr.Dataset or an object with __len__, "
                    f"__getitem__ and class_names, not {_type(self.data)}"
                )
        for name in ("loss", "augment"):
            value = getattr(self, name)
            if value is not None and not callable(value):
                raise InputError(f"{name} is a function, not {_type(value)}")
        is_one = isinstance(self.optimizer, optax.GradientTransformation)
        if self.optimizer is not None and not (is_one or callable(self.optimizer)):
            raise InputError(
                "optimizer is an optax.GradientTransformation, or a function of the learning "
                f"rate that gives one, not {_type(self.optimizer)}"
            )

    @property
    def names(self) -> dict[str, str]:
        """What config.json says of each that was brought."""
        brought = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: _name(value) for name, value in brought.items() if value is not None}


def check_keys(config: Config, brought: Mapping[str, str]) -> None:
    """Refuses a key that would have no effect on what was brought.

    Raises:
      InputError: names it.
    """
    for name in brought:
        for key in _REFUSED.get(name, ()):
            if getattr(config, key) != getattr(Config(), key):
                raise InputError(f"{key} has no effect with {name}=: leave it out of the config")


def _name(value: Any) -> str:
    """Of a function, or of the class of an object; of data both splits'."""
    if isinstance(value, tuple | list) and not isinstance(value, optax.GradientTransformation):
        return ", ".join(map(_name, value))
    while isinstance(value, functools.partial):
        value = value.func
    return getattr(value, "__name__", type(value).__name__)


def _type(value: Any) -> str:
    if isinstance(value, tuple | list):
        return f"({', '.join(map(_type, value))})"
    return f"a {type(value).__name__}"


def without_replaced(config: Mapping[str, Any], brought: Mapping[str, str]) -> dict[str, Any]:
    """A config's keys, but those that what was brought takes the place of."""
    replaced = {key for name in brought for key in REPLACED.get(name, ())}
    return {key: value for key, value in config.items() if key not in replaced}
