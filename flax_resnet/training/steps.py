"""The state of a run and the pure functions that train and evaluate it."""

from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int32, Key

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a training step changes.

    Attributes:
      step: int32 [], number of steps done.
      params: float32 parameters of the model.
      batch_stats: float32 running statistics of BatchNorm; {} for a model without it.
      opt_state: state of the optax optimizer.
    """

    step: Int32[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    image_shape: tuple[int, ...],
) -> TrainState:
    """The state before the first step.

    Args:
      model: a ResNet or VGG.
      optimizer: see `sgd`.
      key: of the initial weights.
      image_shape: (H, W, C).
    """
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(variables["params"]),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    label_smoothing: float = 0.0,
    accumulation_steps: int = 1,
    dropout_key: Key[Array, ""] | None = None,
) -> tuple[TrainState, Metrics]:
    """One step of training.

    With accumulation_steps above 1 the batch goes through the model in so many parts, one
    after the other, for which less memory is enough. The gradient is the same mean over
    the batch, but BatchNorm sees one part at a time.

    Args:
      state: before the step.
      batch: "image", float [N, H, W, C], normalised; "label", int32 [N].
      model, optimizer: as given to `create_state`.
      label_smoothing: share of the target spread evenly over all classes, as in
        torch.nn.CrossEntropyLoss.
      accumulation_steps: parts of the batch; divides N.
      dropout_key: of dropout and stochastic depth, the same in every step of a run: what a
        step draws depends on it, the number of the step and the part of the batch.

    Returns:
      The state after the step, and the batch's mean "loss" and "accuracy" and the Euclidean
      "gradient_norm", float32 []; "layer_gradient_norms" has that of every convolution's and
      every linear layer's kernel alone, in the places that the kernels have in `state.params`.
    """
    chex.assert_rank([batch["image"], batch["label"]], [4, 1])

    def loss_fn(params, batch_stats, key, image, label):
        logits, updates = model.apply(
            {"params": params, "batch_stats": batch_stats},
            image,
            train=True,
            mutable=["batch_stats"],
            rngs=None if key is None else {"dropout": key},
        )
        targets = jax.nn.one_hot(label, logits.shape[-1])
        targets = optax.smooth_labels(targets, label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        accuracy = jnp.mean(logits.argmax(-1) == label, dtype=jnp.float32)
        return loss, (updates.get("batch_stats", {}), {"loss": loss, "accuracy": accuracy})

    gradient = jax.grad(loss_fn, has_aux=True)

    def part(carry, batch):
        batch_stats, key = carry
        grads, (batch_stats, metrics) = gradient(
            state.params, batch_stats, key, batch["image"], batch["label"]
        )
        # The next part draws anew.
        key = None if key is None else jax.random.fold_in(key, 1)
        return (batch_stats, key), (grads, metrics)

    key = None if dropout_key is None else jax.random.fold_in(dropout_key, state.step)
    carry = (state.batch_stats, key)
    if accumulation_steps == 1:
        carry, (grads, metrics) = part(carry, batch)
    else:
        carry, (grads, metrics) = _in_parts(part, carry, batch, accumulation_steps)
    batch_stats, _ = carry
    metrics |= _gradient_norms(grads)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, metrics


def _gradient_norms(grads: Any) -> Metrics:
    flat: dict[tuple[str, ...], Any] = flatten_dict(grads)
    # The axis before a kernel's four is of blocks on top of each other: see `stack_blocks`.
    squares = {
        path: jnp.square(g).sum(range(max(0, g.ndim - 4), g.ndim)) for path, g in flat.items()
    }
    kernels = {path: jnp.sqrt(total) for path, total in squares.items() if path[-1] == "kernel"}
    return {
        "gradient_norm": jnp.sqrt(sum(total.sum() for total in squares.values())),
        "layer_gradient_norms": unflatten_dict(kernels),
    }


def _in_parts(part, carry, batch, count):
    """The carry after `part` has run on every part of a batch, and the mean of its results."""
    # Part i has examples i, i + count, ...: where the batch is divided among devices, each
    # of them keeps its own, and a share of every part.
    parts = jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(carry_and_sum, one):
        carry, total = carry_and_sum
        carry, result = part(carry, one)
        return (carry, jax.tree.map(jnp.add, total, result)), None

    _, result = jax.eval_shape(part, carry, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), result)
    (carry, total), _ = jax.lax.scan(add, (carry, zeros), parts)
    return carry, jax.tree.map(lambda x: x / count, total)


def eval_step(state: TrainState, batch: Batch, *, model: nn.Module) -> Metrics:
    """Sums over the examples of a batch that count.

    Args:
      state: its parameters and running statistics are used.
      batch: "image" and "label" as in `train_step`; "mask", bool [N], False for
        examples that only fill the batch.
      model: a ResNet or VGG.

    Returns:
      "loss", float32 [], and "correct" and "count", int32 [].
    """
    chex.assert_rank([batch["image"], batch["label"], batch["mask"]], [4, 1, 1])
    logits = jnp.asarray(model.apply(state.variables, batch["image"], train=False))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    correct = logits.argmax(-1) == batch["label"]
    mask = batch["mask"]
    return {
        "loss": jnp.sum(loss, where=mask),
        "correct": jnp.sum(correct, where=mask, dtype=jnp.int32),
        "count": jnp.sum(mask, dtype=jnp.int32),
    }
