"""A run before its first step: all that its config, and what a script brings, come to."""

import functools
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from flax_resnet.errors import InputError, short_reason
from flax_resnet.models import ResNet, create_model, native, stack_blocks, unstack_blocks
from flax_resnet.models.registry import Model
from flax_resnet.models.shapes import variable_shapes
from flax_resnet.training import files, hosts
from flax_resnet.training.compilation import keep_compiled_programs
from flax_resnet.training.config import Config
from flax_resnet.training.data import Data, find_room, open_data
from flax_resnet.training.initial import Weights, fit_initial, read_initial
from flax_resnet.training.mesh import make_mesh, platform
from flax_resnet.training.optimizer import (
    learning_rate_schedule,
    make_optimizer,
    without_frozen,
)
from flax_resnet.training.own import Augment, Own, check_keys
from flax_resnet.training.steps import (
    Batch,
    Loss,
    TrainState,
    apply_in_training,
    create_state,
    cross_entropy,
    train_step,
)


@dataclass(frozen=True)
class Plan:
    """What stays the same from the first step of a run to the last.

    Attributes:
      config: of the run.
      workdir: its folder.
      brought: by name, what a script has brought in place of what the config names.
      mesh: the devices.
      data: the two splits.
      model: takes images and `train`.
      initial: weights to start from, where they are not random.
      loss: of each example in training.
      test_loss: of each example in evaluation.
      augment: a script's own; None for the config's.
      optimizer: of all parameters that `config.freeze` does not name.
      learning_rate: by the number of the step; None where a script's optimizer has its own.
      total_steps: length of the run.
    """

    config: Config
    workdir: Path
    brought: dict[str, str]
    mesh: Mesh
    data: Data
    model: nn.Module
    initial: Weights
    loss: Loss
    test_loss: Loss
    augment: Augment | None
    optimizer: optax.GradientTransformation
    learning_rate: optax.Schedule | None
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train) // self.config.batch_size

    @property
    def num_epochs(self) -> int:
        return math.ceil(self.total_steps / self.steps_per_epoch)

    @property
    def model_name(self) -> str:
        return self.brought.get("model", self.config.model)

    @property
    def scans_blocks(self) -> bool:
        return isinstance(self.model, ResNet) and self.model.scan_blocks

    def unstacked(self, state: TrainState) -> TrainState:
        """A state of the loop as checkpoints have it: each block by itself."""
        return unstack_blocks(state) if self.scans_blocks else state

    def learning_rate_of(self, step: int) -> float | None:
        """Of a step, counted from 0."""
        if self.learning_rate is None:
            return None
        epoch, place = divmod(step, self.steps_per_epoch)
        return float(_learning_rates(self.learning_rate, epoch, self.steps_per_epoch)[place])


@functools.lru_cache(maxsize=1)  # one epoch is asked for at many of its steps
def _learning_rates(schedule: optax.Schedule, epoch: int, steps: int) -> np.ndarray:
    # At once: each by itself would be computed on the device, behind the steps at hand.
    return np.asarray(jax.vmap(schedule)(epoch * steps + jnp.arange(steps)))


def make_plan(config: Config, workdir: Path, own: Own) -> Plan:
    """Opens and builds all that a run needs; what cannot work is refused here.

    Raises:
      InputError: if the folder, the data, the devices or what a script has brought cannot be
        used, or do not go together.
    """
    check_keys(config, own.names)
    files.check_workdir(workdir, config, own.names)
    state_dict = read_initial(config, workdir)
    mesh = make_mesh(config.batch_size, config.accumulation_steps)
    if jax.process_count() == 1:
        # Of several the first alone would write, and find at the next start what the others
        # compile anew. On GPUs they would then wait for what it finds out while it compiles.
        keep_compiled_programs()
    if mesh.size == 1 and platform(mesh) == "cpu":
        # Its convolutions are compiled while the data is opened.
        threading.Thread(target=native.load, daemon=True).start()
    data = hosts.first_host_first("data", open_data, config, workdir, find_room(mesh), own.data)
    _check_sizes(config, data, own)
    steps_per_epoch = len(data.train) // config.batch_size
    total_steps = config.num_steps or config.num_epochs * steps_per_epoch
    if total_steps >= 2**31:  # they are counted in 32 bits
        raise InputError(f"a run of {total_steps:,} steps is too long: of 2**31 - 1 at most")
    if config.profile_steps and config.profile_steps[0] >= total_steps:
        raise InputError(
            f"profile_steps={config.profile_steps} begin after the run, which has {total_steps} "
            "steps"
        )
    model = _choose_model(config, data, mesh, own)
    initial: Weights = {}
    if state_dict is not None:
        initial = fit_initial(config, model, state_dict, data.train.image_shape)
    optimizer, learning_rate = _choose_optimizer(
        config,
        own,
        learning_rate_schedule(config, steps_per_epoch=steps_per_epoch, total_steps=total_steps),
    )
    plan = Plan(
        config=config,
        workdir=workdir,
        brought=own.names,
        mesh=mesh,
        data=data,
        model=model,
        initial=initial,
        loss=own.loss or partial(cross_entropy, label_smoothing=config.label_smoothing),
        test_loss=own.loss or cross_entropy,
        augment=own.augment,
        optimizer=optimizer,
        learning_rate=learning_rate,
        total_steps=total_steps,
    )
    if plan.scans_blocks and not own.optimizer and config.optimizer in ("lars", "lamb"):
        raise InputError(
            f"optimizer {config.optimizer!r} goes by the norm of each array, and scan_blocks=True "
            "makes one of those of many blocks: leave out one of the two"
        )
    _check_shapes(plan)
    return plan


def build_model(config: Config, num_classes: int, mesh: Mesh) -> Model:
    """The model of a config; dtype "auto" is that of `fastest_dtype`."""
    dtype = fastest_dtype(mesh.devices.flat[0]) if config.dtype == "auto" else config.dtype
    fields: dict[str, Any] = dict(config.model_fields) | {"frozen": config.freeze}
    if config.batch_norm == "per_replica":
        fields["bn_splits"] = mesh.size
    return create_model(config.model, num_classes=num_classes, dtype=jnp.dtype(dtype), **fields)


def fastest_dtype(device: Any) -> str:
    """bfloat16 on a TPU, and on a GPU whose convolutions know it: Ampere and newer."""
    if device.platform == "gpu":
        capability = str(device.compute_capability)  # of AMD's the architecture, e.g. gfx90a
        is_old = not capability.startswith("gfx") and float(capability) < 8
        return "float32" if is_old else "bfloat16"
    return "float32" if device.platform == "cpu" else "bfloat16"


def _choose_model(config: Config, data: Data, mesh: Mesh, own: Own) -> nn.Module:
    if own.model is not None:
        return own.model
    model = build_model(config, len(data.train.class_names), mesh)
    try:
        variable_shapes(model, data.train.image_shape)
    except ValueError as error:
        if config.batch_norm == "per_replica" and "bn_splits" in str(error):
            raise InputError(
                f"batch_norm='per_replica' is for BatchNorm, and this {config.model} has none"
            ) from error
        raise InputError(f"{config.model} cannot be trained so: {short_reason(error)}") from error
    return model


def _choose_optimizer(
    config: Config, own: Own, schedule: optax.Schedule
) -> tuple[optax.GradientTransformation, optax.Schedule | None]:
    if own.optimizer is None:
        return make_optimizer(config, schedule), schedule
    if isinstance(own.optimizer, optax.GradientTransformation):
        return without_frozen(own.optimizer, config.freeze), None
    optimizer = _attempt("optimizer", own.optimizer, schedule)
    if not isinstance(optimizer, optax.GradientTransformation):
        raise InputError(
            f"optimizer gives a {type(optimizer).__name__} for a learning rate, not an "
            "optax.GradientTransformation"
        )
    return without_frozen(optimizer, config.freeze), schedule


def _check_sizes(config: Config, data: Data, own: Own) -> None:
    if len(data.train) >= 2**31:  # they are counted in 32 bits
        raise InputError(f"{len(data.train):,} training examples are too many: 2**31 - 1 at most")
    if len(data.train) < config.batch_size:
        raise InputError(
            f"batch_size={config.batch_size} is more than the {len(data.train)} training examples"
        )
    pixels = max(data.train.image_shape[:2])
    used = ("cutout",) if config.crop == "resized" else ("crop_padding", "cutout")
    for key in () if own.augment else used:
        if getattr(config, key) > pixels:
            raise InputError(
                f"{key}={getattr(config, key)} is more than the {pixels} pixels that the images "
                "have a side"
            )
    if not any(data.std):
        raise InputError(f"all training images of {data.name} are of one colour")


def _check_shapes(plan: Plan) -> None:
    """Refuses what of a script's own cannot work, before anything is computed."""
    size, classes = plan.config.batch_size, len(plan.data.train.class_names)
    images = jax.ShapeDtypeStruct((size, *plan.data.train.image_shape), jnp.uint8)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), size))
    if plan.augment is not None:
        images = _shape_of("augment", plan.augment, images, keys)
        channels = plan.data.train.image_shape[2]
        if images.ndim != 4 or (images.shape[0], images.shape[3]) != (size, channels):
            raise InputError(
                f"augment gives {_words(images)}, not images [{size}, H, W, {channels}]"
            )
    floats = jax.ShapeDtypeStruct(images.shape, jnp.float32)
    labels = jax.ShapeDtypeStruct((size,), jnp.int32)
    if "model" in plan.brought:
        variables = _attempt("model", variable_shapes, plan.model, plan.data.train.image_shape)
        if others := sorted(set(variables) - {"params", "batch_stats"}):
            raise InputError(
                f"model {plan.model_name} has the collections {', '.join(others)}; params and "
                "batch_stats are what is trained and kept"
            )
        for train, when in ((False, ""), (True, " in training")):
            what = f"model {plan.model_name}{when}"
            logits = _shape_of(what, partial(_logits, plan.model, train), variables, floats)
            if logits.shape != (size, classes):
                raise InputError(
                    f"{what} gives {_words(logits)} for {size} images of {classes} classes, not "
                    f"logits [{size}, {classes}]"
                )
    if "optimizer" in plan.brought:
        params = variable_shapes(plan.model, plan.data.train.image_shape)["params"]
        _attempt("optimizer", jax.eval_shape, partial(_one_update, plan), params)
    if "loss" in plan.brought:
        logits = jax.ShapeDtypeStruct((size, classes), jnp.float32)
        losses = _shape_of("loss", plan.loss, logits, labels)
        if losses.shape != (size,):
            raise InputError(
                f"loss gives {_words(losses)} for {size} examples, not one number for each, "
                f"[{size}]"
            )
    if brought := [name for name in ("model", "loss") if name in plan.brought]:
        batch = {"image": floats, "label": labels}
        _attempt(" and ".join(brought), jax.eval_shape, partial(_one_step, plan), batch)


def _one_step(plan: Plan, batch: Batch) -> Any:
    """With the gradients, which `_logits` lacks."""
    shape = plan.data.train.image_shape
    state = create_state(plan.model, plan.optimizer, jax.random.key(0), shape)
    return train_step(
        stack_blocks(state) if plan.scans_blocks else state,
        batch,
        model=plan.model,
        optimizer=plan.optimizer,
        loss=plan.loss,
        dropout_key=jax.random.key(0),
        frozen=plan.config.freeze,
    )


def _logits(model: nn.Module, train: bool, variables: Any, images: jax.Array) -> Any:
    """As `train_step` and `eval_step` have them."""
    if not train:
        return model.apply(variables, images, train=False)
    logits, after = apply_in_training(model, variables, images, jax.random.key(0))
    before = variables.get("batch_stats", {})
    if not _are_alike(after, before):
        raise ValueError("its batch_stats are not those that it has with train=False")
    return logits


def _one_update(plan: Plan, params: Any) -> Any:
    """As `train_step` has it, of parameters as they are initialised."""
    opt_state = plan.optimizer.init(params)
    if plan.scans_blocks:
        params, opt_state = stack_blocks((params, opt_state))
    updates, after = plan.optimizer.update(params, opt_state, params)
    if not _are_alike(after, opt_state):
        hint = "; with scan_blocks=False it might" if plan.scans_blocks else ""
        raise ValueError(f"its state does not keep its shapes and dtypes in a step{hint}")
    return updates


def _are_alike(one: Any, other: Any) -> bool:
    """Whether two trees have the same structure, shapes and dtypes."""

    def form(leaf):
        kind = jax.typeof(leaf)
        return kind.shape, kind.dtype

    return jax.tree.map(form, one) == jax.tree.map(form, other)


def _shape_of(what: str, function: Callable[..., Any], *arguments: Any) -> jax.ShapeDtypeStruct:
    result = _attempt(what, jax.eval_shape, function, *arguments)
    if not isinstance(result, jax.ShapeDtypeStruct):
        raise InputError(f"{what} gives a {type(result).__name__}, not an array")
    return result


def _attempt(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """What a script's own gives; its errors in a line."""
    try:
        return function(*arguments)
    except Exception as error:
        raise InputError(
            f"{what} cannot be used: {type(error).__name__}: {short_reason(error)}"
        ) from error


def _words(array: jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}{list(array.shape)}"
