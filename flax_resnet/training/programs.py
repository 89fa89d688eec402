"""The pure functions of a run that are compiled: its steps and its evaluation, from pixels on.

Parameters are replicated over the mesh and every batch is divided among its devices, so
the compiler adds the sums over devices: of gradients, and of BatchNorm's statistics, which
are those of the global batch unless the config says otherwise.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jax.typing import ArrayLike

from flax_resnet.data import augment, erase, mix, normalize
from flax_resnet.data.augment import alternating_flip, keys_of_each, normalize_values
from flax_resnet.training.mesh import by_example, platform, replicated
from flax_resnet.training.plan import Plan
from flax_resnet.training.steps import (
    Batch,
    Metrics,
    TrainState,
    eval_step,
    train_step,
    update_ema,
)

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


class Keys(NamedTuple):
    """Independent random keys of a run."""

    init: jax.Array
    augmentation: jax.Array
    dropout: jax.Array
    mixing: jax.Array
    erasing: jax.Array


def random_keys(seed: int, rollbacks: int = 0) -> Keys:
    """The keys of a run.

    Args:
      seed: of the run.
      rollbacks: how often it has gone back; each changes all but the first.
    """
    init, augmentation = jax.random.split(jax.random.key(seed, impl="threefry2x32"))
    others = [augmentation, *(jax.random.fold_in(init, i) for i in (1, 2, 3))]
    if rollbacks:
        others = [jax.random.fold_in(key, rollbacks) for key in others]
    return Keys(init, *others)


def make_augment(
    plan: Plan, rollbacks: int = 0
) -> Callable[[ArrayLike, ArrayLike, ArrayLike], jax.Array]:
    """(images, index, epoch) -> images, as they are augmented in that epoch of a run.

    Args:
      plan: of the run. What cutout hides gets the mean of the data.
      rollbacks: see `random_keys`.
    """
    config = plan.config
    key = random_keys(config.seed, rollbacks).augmentation

    def in_epoch(images, index, epoch):
        epoch_key = jax.random.fold_in(key, epoch)
        if plan.augment is not None:
            return plan.augment(jnp.asarray(images), keys_of_each(epoch_key, index))
        images = augment(
            images,
            index,
            epoch_key,
            crop_padding=config.crop_padding if config.crop == "padded" else 0,
            flip=config.horizontal_flip and not config.alternating_flip,
            cutout=config.cutout,
            fill=plan.data.mean,
        )
        return alternating_flip(images, index, key, epoch) if config.alternating_flip else images

    return in_epoch


def make_train_step(plan: Plan, rollbacks: int = 0) -> Step:
    """(state, batch) -> (state, metrics), from pixels on: augmentation and `train_step`.

    A batch is "image", uint8 [N, H, W, C], "label", int32 [N], and "index", int32 [N],
    the examples' places in the data set.

    Args:
      plan: of the run.
      rollbacks: see `random_keys`.
    """
    config = plan.config
    augment_in_epoch = make_augment(plan, rollbacks)
    keys = random_keys(config.seed, rollbacks)

    def step(state, batch):
        epoch, index = state.step // plan.steps_per_epoch, batch["index"]
        images = augment_in_epoch(batch["image"], index, epoch)
        images = normalize_values(images, plan.data.mean, plan.data.std)
        batch = {"image": images, "label": batch["label"]}
        if config.random_erasing:
            of_each = keys_of_each(jax.random.fold_in(keys.erasing, epoch), index)
            batch["image"] = erase(batch["image"], of_each, config.random_erasing)
        if config.mixup or config.cutmix:
            image, other_label, share = mix(
                batch["image"],
                batch["label"],
                keys_of_each(jax.random.fold_in(keys.mixing, epoch), index),
                mixup=config.mixup,
                cutmix=config.cutmix,
            )
            batch |= {"image": image, "other_label": other_label, "share": share}
        state, metrics = train_step(
            state,
            batch,
            model=plan.model,
            optimizer=plan.optimizer,
            loss=plan.loss,
            accumulation_steps=config.accumulation_steps,
            dropout_key=keys.dropout,
            frozen=config.freeze,
        )
        return update_ema(state, config.ema_decay) if config.ema_decay else state, metrics

    return step


def make_eval_step(plan: Plan) -> Callable[[TrainState, Batch], Metrics]:
    """(state, batch) -> sums over a batch of "image", uint8, "label" and "mask"."""

    def step(state, batch):
        batch = batch | {"image": normalize(batch["image"], plan.data.mean, plan.data.std)}
        return eval_step(state.eval_variables, batch, model=plan.model, loss=plan.test_loss)

    return step


@jax.jit
def is_finite(state: TrainState) -> jax.Array:
    """Whether every number of a state is one: bool []."""
    floats = [leaf for leaf in jax.tree.leaves(state) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in floats]))


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


def state_formats(state: TrainState, mesh: Mesh) -> Any:
    """How a state lies on the devices, all of it on each; on a GPU as the compiler chooses.

    In JAX's own order a GPU would transpose the weights on their way into a program and out of it.
    A TPU's program is the same either way.
    """
    everywhere = replicated(mesh)
    weights = Format(Layout.AUTO, everywhere) if platform(mesh) == "gpu" else everywhere
    return jax.tree.map(lambda leaf: weights if leaf.ndim > 1 else everywhere, state)


def place(state: TrainState, formats: Any) -> TrainState:
    """A replicated state as it has to lie; what was given is used up."""
    if not any(isinstance(format, Format) for format in jax.tree.leaves(formats)):
        return state  # as it is
    # Not jax.device_put, which cannot do it on several hosts.
    return jax.jit(lambda state: state, donate_argnums=0, out_shardings=formats)(state)


def lower_training(
    program: Callable[..., tuple[TrainState, Metrics]],
    state: TrainState,
    formats: Any,
    mesh: Mesh,
    *inputs: Any,
) -> jax.stages.Lowered:
    """One of the programs above, (state, *inputs) -> (state, metrics), which uses the state up.

    Args:
      program: what is lowered.
      state: its shapes and dtypes, without shardings, which `formats` says.
      formats: of the state, before and after; what `state_formats` gives, or a program chose.
      mesh: of the metrics, which lie on every device.
      inputs: arrays, or their shapes with shardings.
    """
    jitted = jax.jit(
        program,
        donate_argnums=0,
        in_shardings=(formats, *(None for _ in inputs)),
        out_shardings=(formats, replicated(mesh)),
    )
    return jitted.lower(state, *inputs)
