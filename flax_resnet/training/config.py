"""The configuration of a run: every key, its type, its default and its range."""

import dataclasses
import difflib
import json
import math
import reprlib
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_dict

from flax_resnet.errors import InputError, short_reason
from flax_resnet.models import VGG, ResNet, ResNet9, create_model
from flax_resnet.models.freezing import is_frozen, unmatched
from flax_resnet.models.shapes import variable_shapes

_LARGEST_INT = 2**32
FOLDER = "folder:"  # before the path of a folder of pictures, as a data set


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run's configuration, checked; recipes and the command line set a `ConfigDict`."""

    # Seeds the initial weights, the order of the examples and their
    # augmentation.
    seed: int = 0

    # The data set: a name of TFDS, its folder (None: $TFDS_DATA_DIR or
    # ~/tensorflow_datasets), and split strings of TFDS. Or "folder:PATH", with
    # PATH/train/CLASS/* and PATH/val/CLASS/*.
    dataset: str = "cifar10"
    data_dir: str | None = None
    train_split: str = "train"
    eval_split: str = "test"
    # The feature of TFDS that is the label. cifar100 also has "coarse_label".
    label_key: str = "label"
    # Channels of the images. 3 repeats gray images as red, green and blue;
    # None changes nothing.
    channels: int | None = None
    # Pictures of any size become square, with so many pixels a side. None is
    # for data whose images all have one size, and keeps it. In evaluation the
    # shorter side of a picture becomes `eval_resize` (None: image_size /
    # 0.875), and the middle is cut out.
    image_size: int | None = None
    eval_resize: int | None = None
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    # Pictures of a folder that cannot be read: "stop" names them, "skip"
    # leaves them out.
    bad_images: Literal["stop", "skip"] = "stop"
    # The mean and standard deviation by which images are normalised: those of
    # the training images ("data"), those of ImageNet ("imagenet"), or numbers
    # for each channel, of pixels from 0 to 1: "0.5,0.5,0.5/0.2,0.2,0.2".
    # "auto" is "data". With `init_from`, "auto" is what those weights were
    # trained with: the other run's numbers; for published weights ImageNet's,
    # or 0.5 for a resnetv2.
    normalize: str = "auto"
    # "resident" keeps the decoded data set in the memory of every device.
    # "stream" reads it from disk all the time, with `stream_workers` processes
    # on each host for each of the two splits (0: in the run's own process).
    # "auto" streams a data set that would take over a quarter of the device's
    # memory or the host's. Processes of a run that share a host divide its
    # memory. The batches are the same. Pictures with crop "resized" are always
    # streamed. Unless "stream" is set, those that fit in a quarter of the
    # host's memory stay decoded there, and `stream_workers` threads read them.
    data_feed: Literal["auto", "resident", "stream"] = "auto"
    stream_workers: int = 4
    # "padded" moves each training image by up to `crop_padding` pixels, and
    # black comes in from the sides. "resized" takes a random part of each
    # picture and resizes it to `image_size`, as torchvision's
    # RandomResizedCrop (arXiv:1409.4842, section 6). `crop_area` is the range
    # of the part's share of the picture, `crop_ratio` the range of its width
    # divided by its height.
    crop: Literal["padded", "resized"] = "padded"
    crop_padding: int = 4
    crop_area: tuple[float, ...] = (0.08, 1.0)
    crop_ratio: tuple[float, ...] = (3 / 4, 4 / 3)
    # What follows crop "resized". "randaugment" does two operations to each
    # image (Cubuk et al., arXiv:1909.13719), "trivialaugment" does one of any
    # strength (Mueller and Hutter, arXiv:2103.10158). They are torchvision's
    # RandAugment and TrivialAugmentWide.
    auto_augment: Literal["none", "randaugment", "trivialaugment"] = "none"
    horizontal_flip: bool = True
    # Mirrors in each epoch the half of the images that the epoch before did
    # not (K. Jordan, arXiv:2404.00498, section 3.6). False mirrors each by
    # chance.
    alternating_flip: bool = False
    # Hides a square at a random place of every training image, so many pixels
    # a side; 0 for none.
    cutout: int = 0
    # Share of the training images that lose a rectangle (Zhong et al.,
    # arXiv:1708.04896).
    random_erasing: float = 0.0
    # Mixes images, and their targets, with their neighbours in the batch. The
    # number is the parameter alpha of the Beta distribution of their shares; 0
    # for none. mixup (Zhang et al., arXiv:1710.09412) takes weighted means of
    # two images, cutmix (Yun et al., arXiv:1905.04899) puts a rectangle of one
    # into the other. With both, each image gets one of the two.
    mixup: float = 0.0
    cutmix: float = 0.0

    # One of fr.list_models(), and the fields of ResNet, ResNet9 or VGG that
    # are to differ from that model's.
    model: str = "cifar_resnet18"
    model_fields: Mapping[str, Any] = field(default_factory=dict)
    # The dtype of the computation. "auto" is bfloat16 on TPUs and on GPUs from
    # Ampere on, else float32.
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # The weights to start from: a run's folder (its best checkpoint), a file
    # that PyTorch or safetensors wrote, or the id of a Hugging Face Hub
    # repository. A classifier for another number of classes starts anew. None
    # is for random weights. A recipe that has to be given weights sets "",
    # which is refused. The weights are read before the first step only: after
    # it the run's own checkpoints hold everything.
    init_from: str | None = None
    # Modules and parameters that stay as they are, by their names in PyTorch,
    # e.g. ("conv1", "bn1", "layer1", "layer2.0"), in which *, ? and [] are as
    # in file names. They get no update and no weight decay, and a frozen
    # BatchNorm keeps its running statistics and normalises by them in training
    # too.
    freeze: tuple[str, ...] = ()

    # Examples per step, on all devices together. The examples that do not fill
    # a last batch are left out: different ones in every epoch.
    batch_size: int = 128
    # A batch goes through the model in so many parts, one after the other, to
    # save memory.
    accumulation_steps: int = 1
    # BatchNorm's statistics: those of the whole batch, or, "per_replica", of
    # each device's share.
    batch_norm: Literal["global", "per_replica"] = "global"
    eval_batch_size: int = 512
    # The length of the run. If `num_steps` is set, it is the length instead;
    # on the command line the later of the two counts.
    num_epochs: int = 200
    num_steps: int | None = None
    # The test split is evaluated after every so many epochs, and after the
    # last.
    eval_every: int = 1

    # The learning rate rises linearly over `warmup_epochs` to its peak,
    # `learning_rate`. Then it stays ("constant"), falls to 0 along a cosine
    # ("cosine"), or is multiplied by `decay_factor` at each of the fractions
    # `decay_at` of the run ("step"). "onecycle" rises and falls along cosines;
    # its rise is the warm-up.
    schedule: Literal["constant", "step", "cosine", "onecycle"] = "cosine"
    learning_rate: float = 0.1
    warmup_epochs: float = 0.0
    decay_at: tuple[float, ...] = (0.5, 0.75)
    decay_factor: float = 0.1

    # "sgd" is torch.optim.SGD, "adamw" torch.optim.AdamW. "lars" (You et al.,
    # arXiv:1708.03888) and "lamb" (You et al., arXiv:1904.00962) are for large
    # batches. "muon" (K. Jordan, "Muon: An optimizer for hidden layers in
    # neural networks", 2024) is for short trainings, with a larger learning
    # rate and weight decay, such as 0.2 and 0.1, and less momentum, such as
    # 0.6. It takes the kernels of convolutions; adamw takes the rest, with a
    # twentieth of the learning rate.
    optimizer: Literal["sgd", "adamw", "lars", "lamb", "muon"] = "sgd"
    # `momentum` and `nesterov` are for sgd, lars and muon.
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    # Whether weight decay also acts on BatchNorm's scale and bias and on fc's
    # bias.
    decay_bn_and_bias: bool = True
    # The largest norm that the gradient of all parameters together may have,
    # as in torch.nn.utils.clip_grad_norm_; None for no limit.
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    # The decay of an exponential moving average of the weights and of
    # BatchNorm's statistics, such as 0.999; 0 for none. The average is what is
    # evaluated, and what `fr.load_run` gives. After t steps the decay is (1 +
    # t) / (10 + t) if that is less, as in tf.train.ExponentialMovingAverage.
    # So the first weights are soon forgotten.
    ema_decay: float = 0.0

    # A checkpoint is written after every epoch, and within an epoch when the
    # last one is so many minutes old. The newest `keep_checkpoints` and the
    # best one are kept.
    checkpoint_minutes: float = 10.0
    keep_checkpoints: int = 3
    # Every so many steps, steps.jsonl gets a line and TensorBoard a point.
    log_every: int = 50
    # (first, stop): JAX's profiler traces the steps first ... stop - 1,
    # counted from 0, for the Profile tab of TensorBoard; () for none.
    profile_steps: tuple[int, ...] = ()
    # What happens when the loss or its gradient is not finite. "stop" ends the
    # run. "rollback" goes back to the newest checkpoint and on from there with
    # other batches.
    on_nan: Literal["stop", "rollback"] = "stop"


_DECIDED_BY_OTHER_KEYS = {
    "block",
    "num_classes",
    "dtype",
    "bn_splits",
    "frozen",
    "weights",
    "name",
    "parent",
}

# What a field of a model may be, before it is built to see whether it fits.
_MOST_BLOCKS = 400  # a stage; ResNet-1202 has 200
_LARGEST_FIELD = 2**16

# What a value has to be, beyond its type.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: 0 <= v < 2**32, "from 0 to 2**32 - 1"),
    "channels": (lambda v: v is None or v >= 1, "at least 1"),
    "image_size": (lambda v: v is None or 1 <= v <= 4096, "from 1 to 4096"),
    "eval_resize": (lambda v: v is None or 1 <= v <= 8192, "from 1 to 8192"),
    "normalize": (
        lambda v: v in ("auto", "data", "imagenet") or numbers_of(v) is not None,
        "auto, data, imagenet, or a mean and a deviation above 0 of each channel, "
        "as 0.5,0.5,0.5/0.2,0.2,0.2",
    ),
    "crop_area": (
        lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
        "two shares of the picture, above 0 and at most 1, the smaller one first",
    ),
    "crop_ratio": (
        lambda v: len(v) == 2 and 0.01 <= v[0] <= v[1] <= 100,
        "two numbers from 0.01 to 100, the smaller one first",
    ),
    "stream_workers": (lambda v: v >= 0, "at least 0"),
    "crop_padding": (lambda v: v >= 0, "at least 0"),
    "cutout": (lambda v: v >= 0, "at least 0"),
    "random_erasing": (lambda v: 0 <= v <= 1, "from 0 to 1"),
    "mixup": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "cutmix": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "accumulation_steps": (lambda v: v >= 1, "at least 1"),
    "eval_batch_size": (lambda v: v >= 1, "at least 1"),
    "num_epochs": (lambda v: v >= 1, "at least 1"),
    "num_steps": (lambda v: v is None or v >= 1, "at least 1"),
    "eval_every": (lambda v: v >= 1, "at least 1"),
    "learning_rate": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    "warmup_epochs": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "decay_at": (
        lambda v: all(0 < at < 1 for at in v),
        "fractions of the run, between 0 and 1",
    ),
    "decay_factor": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "momentum": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "weight_decay": (lambda v: 0 <= v < math.inf, "at least 0 and finite"),
    "clip_norm": (lambda v: v is None or 0 < v < math.inf, "above 0 and finite"),
    "label_smoothing": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "ema_decay": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "checkpoint_minutes": (lambda v: 0 < v < math.inf, "above 0 and finite"),
    "keep_checkpoints": (lambda v: v >= 1, "at least 1"),
    "log_every": (lambda v: v >= 1, "at least 1"),
    "profile_steps": (
        lambda v: not v or (len(v) == 2 and 0 <= v[0] < v[1]),
        "(first, stop), with 0 <= first < stop, or ()",
    ),
}


def default_config() -> ConfigDict:
    """Every key of `Config` with its default, for a recipe to change.

    `model_fields` has the fields of `ResNet`, `ResNet9` and `VGG`; None, as all of them are,
    leaves a field as the model has it.
    """
    config = ConfigDict(dataclasses.asdict(Config()))
    _add_placeholders(config, typing.get_type_hints(Config))
    fields = {
        name: hint
        for model in (ResNet, ResNet9, VGG)
        for name, hint in typing.get_type_hints(model).items()
    }
    model_fields = ConfigDict()
    _add_placeholders(
        model_fields, {name: fields[name] for name in set(fields) - _DECIDED_BY_OTHER_KEYS}
    )
    config.model_fields = model_fields
    return config


def _add_placeholders(config: ConfigDict, hints: Mapping[str, Any]) -> None:
    """Lets keys that are None, or not there, be set to a value of their type."""
    for name in sorted(hints):
        kind = hints[name]
        if typing.get_origin(kind) is types.UnionType:  # with None
            kind = typing.get_args(kind)[0]
        if typing.get_origin(kind) is Sequence:
            kind = tuple
        if kind in (bool, int, float, str, tuple) and config.get(name) is None:
            if name in config:
                del config[name]
            config[name] = config_dict.placeholder(kind)


def check_config(config: Mapping[str, Any] | ConfigDict | Config) -> Config:
    """The run that `config` describes; keys that it lacks have their defaults.

    Raises:
      InputError: names every unknown key, wrong type and value out of range.
    """
    if isinstance(config, Config):  # of an earlier run
        config = dataclasses.asdict(config)
    if not isinstance(config, Mapping | ConfigDict):
        raise InputError(
            f"a config is what fr.default_config() gives, or a dict, not {reprlib.repr(config)}"
        )
    hints = typing.get_type_hints(Config)
    checked, problems = {}, []
    for key, value in config.items():
        value = value.item() if isinstance(value, np.generic) else value
        if key not in hints:
            problems.append(
                f"unknown config key {reprlib.repr(key)}{near_key(str(key), list(hints))}"
            )
        elif not _has_type(value, hints[key]):
            expected = _expected(hints[key], value)
            problems.append(f"{key} must be {expected}, not {reprlib.repr(value)}")
        elif key in _RANGES and not _RANGES[key][0](value):
            problems.append(f"{key} must be {_RANGES[key][1]}, not {reprlib.repr(value)}")
        else:
            checked[key] = _plain(value)
    run = Config(**checked)
    # With a value that is refused already the default stands here.
    refused = set(config) - set(checked)
    problems += [text for keys, text in _contradictions(run) if refused.isdisjoint(keys)]
    problems += _model_problems(run)
    if problems:
        raise InputError("; ".join(problems))
    return run


def _contradictions(run: Config) -> Iterator[tuple[Sequence[str], str]]:
    """Keys that do not go together, and what is to be said of them."""
    if run.schedule == "onecycle" and not run.warmup_epochs:
        text = "schedule 'onecycle' needs warmup_epochs above 0: the rise of the cycle"
        yield ("schedule", "warmup_epochs"), text
    if run.image_size is None:
        for key, needs_it, what in (
            ("dataset", run.dataset.startswith(FOLDER), "a folder of pictures"),
            ("crop", run.crop == "resized", "crop 'resized'"),
            ("eval_resize", run.eval_resize is not None, "eval_resize"),
        ):
            if needs_it:
                yield (key, "image_size"), f"{what} needs image_size, such as 224"
    elif run.eval_resize is not None and run.eval_resize < run.image_size:
        text = f"eval_resize must be at least image_size, {run.image_size}, not {run.eval_resize}"
        yield ("eval_resize", "image_size"), text
    if run.auto_augment != "none" and run.crop != "resized":
        text = f"auto_augment {run.auto_augment!r} needs crop 'resized' and image_size"
        yield ("auto_augment", "crop"), text
    if run.freeze and run.model_fields.get("scan_blocks"):
        text = "model_fields.scan_blocks=True runs blocks as one: freeze cannot name some of them"
        yield ("freeze", "model_fields"), text
    if run.alternating_flip and not run.horizontal_flip:
        yield ("alternating_flip", "horizontal_flip"), "alternating_flip needs horizontal_flip"
    if run.optimizer in ("sgd", "lars") and run.nesterov and not run.momentum:
        text = "nesterov needs momentum above 0: set momentum, or nesterov=False"
        yield ("optimizer", "nesterov", "momentum"), text


def near_key(key: str, keys: Sequence[str]) -> str:
    """The key that is meant perhaps, to be put after that there is no such key; "" if none is."""
    asked = key.lower().replace("-", "_")
    initials = {"".join(word[0] for word in name.split("_")): name for name in keys}  # lr, wd
    near = difflib.get_close_matches(asked, keys, n=1) or [initials.get(asked)]
    return f": did you mean {near[0]!r}?" if near[0] else ""


def numbers_of(normalize: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """(mean, std) of each channel, where `Config.normalize` is numbers."""
    try:
        mean, std = (tuple(map(float, part.split(","))) for part in normalize.split("/"))
    except ValueError:
        return None
    fits = len(mean) == len(std) and all(map(math.isfinite, mean + std)) and min(std) > 0
    return (mean, std) if fits else None


def _has_type(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is types.UnionType:
        return any(_has_type(value, argument) for argument in arguments)
    if origin is tuple:
        return isinstance(value, tuple | list) and all(_has_type(v, arguments[0]) for v in value)
    if origin is Mapping:
        return isinstance(value, Mapping | ConfigDict)
    if isinstance(value, bool):
        return hint is bool
    if isinstance(value, int) and hint in (int, float):  # not all of Python's suit JAX
        return abs(value) <= _LARGEST_INT
    return isinstance(value, hint)


def _expected(hint: Any, value: Any) -> str:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, int) and abs(value) > _LARGEST_INT:
        return "from -2**32 to 2**32"
    if origin is Literal:
        return f"one of {', '.join(arguments)}"
    if origin is types.UnionType:
        return " or ".join("None" if a is type(None) else _expected(a, value) for a in arguments)
    if origin is tuple:
        kinds = {int: "whole numbers", float: "numbers", str: "strings"}
        return f"a tuple of {kinds[arguments[0]]}"
    return "a dict" if origin is Mapping else f"of type {hint.__name__}"


def _plain(value: Any) -> Any:
    """As the fields of `Config` have it, whether from Python, a ConfigDict or a JSON file."""
    if isinstance(value, Mapping | ConfigDict):  # model_fields
        return {name: _plain(field) for name, field in dict(value).items() if field is not None}
    return tuple(value) if isinstance(value, list) else value


def refused_fields(names: Iterable[str]) -> str:
    """What to say of the fields that `model_fields` cannot set; "" if it can set all."""
    taken = ", ".join(sorted(_DECIDED_BY_OTHER_KEYS.intersection(names)))
    return f"model_fields cannot set {taken}: other keys decide it" if taken else ""


def _model_problems(run: Config) -> list[str]:
    if refused := refused_fields(run.model_fields):
        return [refused]
    for name, value in run.model_fields.items():
        numbers = value if isinstance(value, tuple | list) else [value]
        most = _MOST_BLOCKS if name == "layers" else _LARGEST_FIELD
        if any(isinstance(n, int | float) and not abs(n) <= most for n in numbers):
            return [f"model_fields.{name} must be at most {most}, not {reprlib.repr(value)}"]
    try:
        json.dumps(run.model_fields)
    except (TypeError, ValueError) as error:
        return [f"model_fields are of numbers, text and lists: {short_reason(error, 200)}"]
    try:
        model = create_model(run.model, **run.model_fields)
    except ValueError as error:
        return [short_reason(error, 200)]
    except TypeError as error:
        return [f"model_fields do not fit {run.model}: {short_reason(error, 200)}"]
    if not (run.model_fields or run.freeze):
        return []  # a model as it is fits
    try:
        variables = variable_shapes(model, (32, 32, 3))
    except Exception as error:  # of whatever a field is used for
        return [f"model_fields do not fit {run.model}: {short_reason(error, 200)}"]
    return _freeze_problems(run, flatten_dict(variables))


def _freeze_problems(run: Config, paths: Iterable[tuple[str, ...]]) -> list[str]:
    problems = [
        f"freeze: nothing in {run.model} is called {reprlib.repr(pattern)}: {hint}"
        for pattern, hint in unmatched(run.freeze, paths)
    ]
    if all(is_frozen(path, run.freeze) for path in paths if path[0] == "params"):
        problems.append("freeze leaves nothing to train")
    return problems
