"""The compiled programs of a run: its steps and its evaluation.

Parameters are replicated over the mesh and every batch is divided among its devices, so
the compiler adds the sums over devices: of gradients, and of BatchNorm's statistics, which
are those of the global batch unless the config says otherwise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from flax_resnet.data import augment, normalize
from flax_resnet.errors import InputError, short_reason
from flax_resnet.models.registry import Model, create_model
from flax_resnet.training.config import Config
from flax_resnet.training.steps import Batch, Metrics, TrainState, eval_step, train_step

Statistics = tuple[Sequence[float], Sequence[float]]
Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]
EvalStep = Callable[[TrainState, Batch], Metrics]


def find_devices(*, local: bool = False) -> list[Any]:
    """The devices of all hosts, or of this one.

    Raises:
      InputError: if they cannot be used, as a TPU that another program has.
    """
    try:
        return jax.local_devices() if local else jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where there is no plugin for it
        raise InputError(
            f"JAX cannot start: {short_reason(error)}; JAX_PLATFORMS=cpu takes the CPU"
        ) from error


def make_mesh(
    batch_size: int, accumulation_steps: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """One axis, "data", over `devices`; all there are, on all hosts, by default.

    Raises:
      InputError: if they do not divide the batch, or its parts, or cannot be used.
    """
    mesh = Mesh(np.array(devices or find_devices()), ("data",))
    multiple = mesh.size * accumulation_steps
    if batch_size % multiple:
        among = f"{mesh.size} devices"
        if accumulation_steps > 1:
            among += f" in {accumulation_steps} accumulation_steps"
        raise InputError(
            f"batch_size={batch_size} cannot be divided among {among}: "
            f"take a multiple of {multiple}"
        )
    return mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


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


def random_keys(seed: int, rollbacks: int = 0) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Independent keys of a run's initial weights, its augmentation and its dropout.

    Args:
      seed: of the run.
      rollbacks: how often it has gone back; each changes the last two.
    """
    init, augmentation = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    dropout = jax.random.fold_in(init, 1)
    if rollbacks:
        augmentation, dropout = (jax.random.fold_in(k, rollbacks) for k in (augmentation, dropout))
    return init, augmentation, dropout


def make_augment(
    config: Config, statistics: Statistics, rollbacks: int = 0
) -> Callable[[ArrayLike, ArrayLike, ArrayLike], jax.Array]:
    """(images, index, epoch) -> images: `augment`, as it is in that epoch of a run.

    Args:
      config: see `Config`.
      statistics: mean and std of each channel; what cutout hides gets the mean.
      rollbacks: see `random_keys`.
    """
    _, key, _ = random_keys(config.seed, rollbacks)

    def in_epoch(images, index, epoch):
        return augment(
            images,
            index,
            jax.random.fold_in(key, epoch),
            crop_padding=config.crop_padding,
            flip=config.horizontal_flip,
            cutout=config.cutout,
            fill=statistics[0],
        )

    return in_epoch


def make_train_step(
    config: Config,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    *,
    statistics: Statistics,
    steps_per_epoch: int,
    rollbacks: int = 0,
) -> Step:
    """(state, batch) -> (state, metrics), from pixels on: augmentation and `train_step`.

    A batch is "image", uint8 [N, H, W, C], "label", int32 [N], and "index", int32 [N],
    the examples' places in the data set.

    Args:
      config: see `Config`.
      model, optimizer: see `train_step`.
      statistics: mean and std of each channel, for `normalize`.
      steps_per_epoch: steps after which augmentation begins anew.
      rollbacks: see `random_keys`.
    """
    augment_in_epoch = make_augment(config, statistics, rollbacks)
    *_, dropout_key = random_keys(config.seed, rollbacks)

    def step(state, batch):
        images = augment_in_epoch(batch["image"], batch["index"], state.step // steps_per_epoch)
        return train_step(
            state,
            {"image": normalize(images, *statistics), "label": batch["label"]},
            model=model,
            optimizer=optimizer,
            label_smoothing=config.label_smoothing,
            accumulation_steps=config.accumulation_steps,
            dropout_key=dropout_key,
        )

    return step


def make_eval_step(model: nn.Module, *, statistics: Statistics) -> EvalStep:
    """(state, batch) -> sums over a batch of "image", uint8, "label" and "mask"."""

    def step(state, batch):
        batch = batch | {"image": normalize(batch["image"], *statistics)}
        return eval_step(state.variables, batch, model=model)

    return step


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether every number of a state is one: bool []."""
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state)]))


# Images lie on the device as rows of pixels. In four dimensions a TPU would have the examples
# side by side in memory, and bring the whole data set into another order for every batch.


def make_pick(mesh: Mesh, batch_size: int, image_shape: tuple[int, ...]) -> Callable[..., Batch]:
    """(data, order, position) -> that batch of an epoch, of examples on the device.

    Of the data "image" is uint8 [N, H * W * C].
    """

    def pick(data, order, position):
        index = jax.lax.dynamic_slice_in_dim(order, position * batch_size, batch_size)
        index = jax.lax.with_sharding_constraint(index, by_example(mesh))
        return _examples(data, index, image_shape) | {"index": index}

    return pick


def make_pick_eval(
    mesh: Mesh, batch_size: int, image_shape: tuple[int, ...]
) -> Callable[..., Batch]:
    """(data, start) -> the examples from `start` on, with a mask that is False beyond the end."""

    def pick(data, start):
        count = len(data["label"])
        index = jax.lax.with_sharding_constraint(start + jnp.arange(batch_size), by_example(mesh))
        mask = index < count
        index = jnp.minimum(index, count - 1)
        return _examples(data, index, image_shape) | {"mask": mask}

    return pick


def _examples(data: Batch, index: jax.Array, image_shape: tuple[int, ...]) -> Batch:
    images = data["image"][index].reshape(-1, *image_shape)
    return {"image": images, "label": data["label"][index]}


def make_train_steps(
    step: Step, pick: Callable[..., Batch], *, steps_per_epoch: int, steps: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """(state, data, order) -> (state, metrics of each step): that many steps of an epoch.

    One program, from choosing the examples on; nothing comes back before its end.
    """

    def program(state, data, order):
        def body(state, _):
            return step(state, pick(data, order, state.step % steps_per_epoch))

        return jax.lax.scan(body, state, length=steps)

    return program
