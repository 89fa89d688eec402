"""What the lesson says of blocks, gradients and receptive fields, as numbers."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, path_aware_map

from flax_resnet.models import ResNet, cifar_resnet20, cifar_resnet56, cifar_resnet110, summary
from flax_resnet.models.layers import BatchNorm
from flax_resnet.training import TrainState, train_step
from flax_resnet.training.steps import split_layers

# Larger than 1x1, of which each halves the path to the farthest pixel of a field.
_MOST_KERNELS = 120

DEPTHS = {20: cifar_resnet20, 56: cifar_resnet56, 110: cifar_resnet110}
KINDS = {"plain": "none", "residual": "identity"}  # the field `shortcut` of each


def net(kind: str, depth: int, **fields: Any) -> ResNet:
    """A net of He et al. section 4.2, "plain" or "residual", of 20, 56 or 110 layers."""
    return DEPTHS[depth](shortcut=KINDS[kind], **fields)


def initial_variables(model: ResNet, seed: int, image_shape: Sequence[int]) -> Any:
    """{"params", "batch_stats"} of a model for images (H, W, C)."""
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    # Not jit: a deep net has few kinds of layers, but all of them would be compiled at once.
    return model.lazy_init(jax.random.key(seed), images, train=False)


# Blocks that are the identity.


class BlockChange(NamedTuple):
    """How far the output of a block is from its input.

    Attributes:
      name: of the block: "layer1_0".
      largest: max |output - input|.
      relative: norm(output - input) / norm(input).
    """

    name: str
    largest: float
    relative: float


def stage_maps(model: ResNet, variables: Any, images: jax.Array) -> list[tuple[str, jax.Array]]:
    """Names and values, [N, H, W, C], of what enters the first block and what each block gives.

    BatchNorm uses the statistics of the images, as in training.

    Args:
      model, variables: a net and its variables.
      images: float [N, H, W, C], normalised.
    """
    outputs: Any
    state: Any
    outputs, state = model.apply(
        variables,
        images,
        train=True,
        features=True,
        mutable=["batch_stats", "intermediates"],
        capture_intermediates=lambda module, _: (module.name or "").startswith("layer"),
    )
    blocks = state["intermediates"]
    names = [f"layer{stage}_{i}" for stage, n in enumerate(model.layers, start=1) for i in range(n)]
    return [("stem", outputs["stem"]), *((n, blocks[n]["__call__"][0]) for n in names)]


def block_changes(maps: Sequence[tuple[str, jax.Array]]) -> list[BlockChange]:
    """What each block that keeps the shape does to its input.

    With the scale of its last BatchNorm at zero a block computes relu(x + 0), which is x
    for what another ReLU gave (Goyal et al., arXiv:1706.02677, section 5.1).

    Args:
      maps: see `stage_maps`.
    """
    changes = []
    for (_, before), (name, after) in pairwise(maps):
        if before.shape == after.shape:
            difference = after - before
            relative = jnp.linalg.norm(difference) / jnp.linalg.norm(before)
            changes.append(BlockChange(name, float(jnp.abs(difference).max()), float(relative)))
    return changes


# Gradients by layer.


class StepMeasure(NamedTuple):
    """One step of training, before the weights move.

    Attributes:
      loss: mean cross-entropy of the batch.
      kernels: norm of every kernel, from the first layer to the last.
      gradients: norm of the gradient of the loss by each.
    """

    loss: float
    kernels: list[float]
    gradients: list[float]


def measure_training(
    model: ResNet,
    variables: Mapping[str, Any],
    images: jax.Array,
    labels: np.ndarray,
    *,
    batch_size: int,
    steps: int,
    seed: int,
) -> Iterator[StepMeasure]:
    """Trains a net by the trainer's own step, and gives loss and gradient norms of each.

    SGD as in He et al. section 4.2: learning rate 0.1, momentum 0.9, weight decay 1e-4.
    Their warm-up for 110 layers is left out, as is augmentation, so that all nets get the same.
    The first step is the gradient at initialisation.

    Args:
      model, variables: a net and its initial variables.
      images: float [N, H, W, C], normalised.
      labels: int32 [N].
      batch_size: images a step, chosen anew for each.
      steps: number of steps.
      seed: of the batches.
    """
    height, width, channels = images.shape[1:]
    table = summary(model, (height, width), channels)
    layers = [layer.name for layer in table.layers if layer.multiply_adds]
    optimizer = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9))
    state = TrainState.create(variables, optimizer)
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer))
    rng = np.random.default_rng(seed)
    for _ in range(steps):
        params: dict[str, Any] = flatten_dict(jax.device_get(state.params), sep="/")
        index = rng.choice(len(labels), batch_size, replace=False)
        state, metrics = step(state, {"image": images[index], "label": jnp.asarray(labels[index])})
        norms = split_layers(np.asarray(metrics["layer_gradient_norms"])[np.newaxis], state.params)
        gradients: dict[str, Any] = flatten_dict(norms, sep="/")
        yield StepMeasure(
            float(metrics["loss"]),
            [float(np.linalg.norm(params[f"{name}/kernel"])) for name in layers],
            [float(gradients[f"{name}/kernel"][0]) for name in layers],
        )


# Receptive fields.


class Stage(NamedTuple):
    """What a stage gives, and what one unit of it sees.

    Attributes:
      name: "stem", "layer1", ...
      shape: (H, W, C) of its output.
      stride: pixels of the image from one unit to the next.
      field: height and width of the receptive field of a unit, in pixels.
    """

    name: str
    shape: tuple[int, ...]
    stride: int
    field: int


def stages(model: ResNet, image_shape: Sequence[int]) -> list[Stage]:
    """Output shape and receptive field of every stage of a net.

    The field is where the gradient of a unit by the image is not zero. All kernels are made
    equal and positive for it, so that no two paths cancel and no ReLU closes one; the image is
    a single row, longer than the field.

    Args:
      model: a ResNet with BatchNorm.
      image_shape: (H, W, C) of an image.

    Raises:
      ValueError: for a net with a max-pool, which has a gradient by one pixel of its window
        alone, for one whose blocks start as the identity, for one whose units see the whole
        image, by GroupNorm or an attention, for one whose kernels are standardised, and for one
        of more than 120 convolutions larger than 1x1.
    """
    if not model.cifar_stem or model.zero_init_residual:
        raise ValueError("receptive fields need cifar_stem=True and zero_init_residual=False")
    if model.norm != "batch" or model.squeeze_excite or model.eca:
        raise ValueError("receptive fields need norm='batch', squeeze_excite=False and eca=False")
    if model.weight_standardization:
        raise ValueError("receptive fields need weight_standardization=False")
    names = ["stem", *(f"layer{stage}" for stage in range(1, len(model.layers) + 1))]
    shapes = _feature_shapes(model, image_shape)
    width = 128
    while True:
        fields = _fields(model, (1, width, image_shape[-1]), names)
        if all(start > 0 and stop < width for start, stop, _ in fields):
            break
        width *= 2  # a field may go on beyond an end
    return [
        Stage(name, shapes[name], stride, stop - start)
        for name, (start, stop, stride) in zip(names, fields, strict=True)
    ]


def _fields(
    model: ResNet, row_shape: tuple[int, int, int], names: Sequence[str]
) -> list[tuple[int, int, int]]:
    """Start and stop of the receptive field of the middle unit of each stage, and its stride."""
    variables = initial_variables(model, 0, row_shape)
    kernels = [x for x in jax.tree.leaves(variables["params"]) if x.ndim == 4 and x.shape[0] > 1]
    if len(kernels) > _MOST_KERNELS:
        raise ValueError(
            f"receptive fields of {len(kernels)} convolutions of more than 1x1 are lost in "
            f"float32, which has room for {_MOST_KERNELS}"
        )

    def mean(path, x):
        """Over channels; of larger kernels half of it, lest the sum of all paths overflows."""
        share = 0.5 if x.shape[0] > 1 else 1.0
        return jnp.full_like(x, share / x.shape[-2]) if path[-1] == "kernel" else x

    params = path_aware_map(mean, variables["params"])

    def middle_units(row):
        outputs: Any = model.apply(
            {**variables, "params": params}, row[None], train=False, features=True
        )
        return jnp.stack([outputs[name][0, 0, outputs[name].shape[2] // 2].sum() for name in names])

    gradients = np.asarray(jax.jit(jax.jacrev(middle_units))(jnp.ones(row_shape)))
    shapes = _feature_shapes(model, row_shape)
    fields = []
    for name, gradient in zip(names, gradients, strict=True):
        (seen,) = np.nonzero(gradient.sum((0, 2)))
        fields.append((int(seen[0]), int(seen[-1]) + 1, row_shape[1] // shapes[name][1]))
    return fields


def _feature_shapes(model: ResNet, image_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes, without N, of all that `features=True` gives for an image."""
    image = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    outputs, _ = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, train=False, features=True), image
    )
    return {name: output.shape[1:] for name, output in outputs.items()}


def influence(model: ResNet, variables: Any, images: jax.Array, stage: str) -> np.ndarray:
    """How much each pixel moves the middle unit of a stage: float32 [H, W], of sum 1.

    The unit is the sum over its channels with random signs; its gradient by the image has a
    norm over the image's channels in every pixel, and of these the mean over images is taken:
    the effective receptive field of Luo et al., arXiv:1701.04128.

    Args:
      model, variables: a net and its variables; BatchNorm normalises by the images' statistics,
        taken as constants.
      images: float [N, H, W, C], normalised.
      stage: "layer3", for example.
    """

    def settle(variables):
        _, state = model.apply(variables, images, train=True, mutable=["batch_stats"])
        step = 1 - BatchNorm.momentum
        settled = jax.tree.map(
            lambda old, new: old + (new - old) / step,
            variables["batch_stats"],
            state["batch_stats"],
        )
        return {**variables, "batch_stats": settled}

    def unit(images, variables):
        outputs: Any = model.apply(variables, images, train=False, features=True)
        out = outputs[stage]
        signs = jax.random.rademacher(jax.random.key(0), out.shape[-1:], jnp.float32)
        return jnp.sum(out[:, out.shape[1] // 2, out.shape[2] // 2] * signs[None])

    gradient = jax.jit(jax.grad(unit))(images, jax.jit(settle)(variables))
    norm = np.asarray(jnp.linalg.norm(gradient, axis=-1).mean(0))
    return norm / norm.sum()


def central_square(influence: np.ndarray, share: float) -> int:
    """Side of the smallest square around the middle that holds a share of the influence.

    Args:
      influence: [H, W], see `influence`.
      share: at most 1.
    """
    height, width = influence.shape
    side = 1
    while True:
        top, left = (max(n // 2 - side // 2, 0) for n in influence.shape)
        part = influence[top : height // 2 + side // 2 + 1, left : width // 2 + side // 2 + 1]
        if part.sum() >= share * influence.sum() or part.size == influence.size:
            return side
        side += 2
