"""The compiled programs of a run: training step, evaluation and the order of an epoch.

Each takes the whole data set on the devices and picks its batch there. Parameters and
data are replicated over the mesh and every batch is split among its devices, so the
compiler adds the sums over devices: of gradients, and of BatchNorm's statistics, which
are those of the global batch.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnet.data import Dataset, augment, normalize
from flax_resnet.errors import InputError
from flax_resnet.models import ResNet, create_model
from flax_resnet.training.config import Config
from flax_resnet.training.steps import Batch, Metrics, TrainState, eval_step, train_step


def make_mesh(batch_size: int, devices: Sequence[Any] | None = None) -> Mesh:
    """One axis, "data", over `devices`; all there are by default.

    Raises:
      InputError: if they do not divide the batch.
    """
    mesh = Mesh(np.array(devices or jax.devices()), ("data",))
    if batch_size % mesh.size:
        raise InputError(
            f"batch_size={batch_size} cannot be divided among {mesh.size} devices: "
            f"take a multiple of {mesh.size}"
        )
    return mesh


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put_dataset(dataset: Dataset, mesh: Mesh) -> Batch:
    """A data set on every device: "image", uint8 [N, H, W, C], and "label", int32 [N]."""
    return jax.device_put({"image": dataset.images, "label": dataset.labels}, replicated(mesh))


def build_model(config: Config, num_classes: int, platform: str) -> ResNet:
    """The model of a config; dtype "auto" is bfloat16 on "gpu" and "tpu"."""
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32" if platform == "cpu" else "bfloat16"
    return create_model(
        config.model, num_classes=num_classes, dtype=jnp.dtype(dtype), **config.model_fields
    )


def random_keys(seed: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Independent keys of the initial weights, the order and the augmentation."""
    init, order, augmentation = jax.random.split(jax.random.key(seed, impl="threefry2x32"), 3)
    return init, order, augmentation


def epoch_order(key: jax.Array, epoch: int, num_examples: int) -> jax.Array:
    """The examples of an epoch in the order of their use, int32 [num_examples]."""
    return jax.random.permutation(jax.random.fold_in(key, epoch), num_examples)


def make_train_program(
    config: Config,
    model: ResNet,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    statistics: tuple[Sequence[float], Sequence[float]],
    steps_per_epoch: int,
) -> jax.stages.Wrapped:
    """Compiled (state, data, order) -> (state, metrics): the step that `state.step` names.

    Args:
      config: see `Config`.
      model, optimizer: see `train_step`.
      mesh: see `make_mesh`.
      statistics: mean and std of each channel, for `normalize`.
      steps_per_epoch: steps before the order changes.
    """
    everywhere = replicated(mesh)
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    _, _, augment_key = random_keys(config.seed)

    def program(state, data, order):
        epoch, position = jnp.divmod(state.step, steps_per_epoch)
        start = position * config.batch_size
        index = jax.lax.dynamic_slice_in_dim(order, start, config.batch_size)
        index = jax.lax.with_sharding_constraint(index, by_example)
        images = augment(
            data["image"][index],
            index,
            jax.random.fold_in(augment_key, epoch),
            crop_padding=config.crop_padding,
            flip=config.horizontal_flip,
        )
        batch = {"image": normalize(images, *statistics), "label": data["label"][index]}
        return train_step(
            state,
            batch,
            model=model,
            optimizer=optimizer,
            label_smoothing=config.label_smoothing,
        )

    return jax.jit(program, donate_argnums=0, in_shardings=everywhere, out_shardings=everywhere)


def make_eval_program(
    model: ResNet,
    mesh: Mesh,
    *,
    batch_size: int,
    statistics: tuple[Sequence[float], Sequence[float]],
) -> jax.stages.Wrapped:
    """Compiled (state, data, start) -> sums over data[start : start + batch_size].

    Beyond the end of the data a batch is filled up with examples that do not count.
    """
    everywhere = replicated(mesh)
    by_example = NamedSharding(mesh, PartitionSpec("data"))

    def program(state, data, start):
        count = len(data["label"])
        index = jax.lax.with_sharding_constraint(start + jnp.arange(batch_size), by_example)
        mask = index < count
        index = jnp.minimum(index, count - 1)
        batch = {
            "image": normalize(data["image"][index], *statistics),
            "label": data["label"][index],
            "mask": mask,
        }
        return eval_step(state, batch, model=model)

    return jax.jit(program, in_shardings=everywhere, out_shardings=everywhere)


def evaluate(
    program: Callable[..., Metrics], state: TrainState, data: Batch, *, batch_size: int
) -> dict[str, float]:
    """Mean "loss" and "accuracy" over every example of `data`, each counted once.

    Args:
      program: see `make_eval_program`.
      state: of the model to evaluate.
      data: see `put_dataset`.
      batch_size: that of the program.
    """
    starts = range(0, len(data["label"]), batch_size)
    sums = jax.device_get([program(state, data, jnp.int32(start)) for start in starts])
    count = sum(int(s["count"]) for s in sums)
    return {
        "loss": sum(float(s["loss"]) for s in sums) / count,
        "accuracy": sum(int(s["correct"]) for s in sums) / count,
    }
