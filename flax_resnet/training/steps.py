"""The state of a run and the pure functions that train and evaluate it."""

from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a training step changes.

    Attributes:
      step: int32 [], number of steps done.
      params: float32 parameters of the model.
      batch_stats: float32 running statistics of BatchNorm.
      opt_state: state of the optax optimizer.
    """

    step: jax.Array
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
    key: jax.Array,
    image_shape: tuple[int, ...],
) -> TrainState:
    """The state before the first step.

    Args:
      model: a ResNet.
      optimizer: see `sgd`.
      key: of the initial weights.
      image_shape: (H, W, C).
    """
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    return TrainState(
        step=jnp.int32(0),
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        opt_state=optimizer.init(variables["params"]),
    )


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    label_smoothing: float = 0.0,
) -> tuple[TrainState, Metrics]:
    """One step of training.

    Args:
      state: before the step.
      batch: "image", float [N, H, W, C], normalised; "label", int32 [N].
      model, optimizer: as given to `create_state`.
      label_smoothing: share of the target spread evenly over all classes, as in
        torch.nn.CrossEntropyLoss.

    Returns:
      The state after the step, and the batch's mean "loss" and "accuracy", float32 [].
    """
    chex.assert_rank([batch["image"], batch["label"]], [4, 1])

    def loss_fn(params):
        logits, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            batch["image"],
            train=True,
            mutable=["batch_stats"],
        )
        targets = jax.nn.one_hot(batch["label"], logits.shape[-1])
        targets = optax.smooth_labels(targets, label_smoothing)
        loss = optax.softmax_cross_entropy(logits, targets).mean()
        return loss, (logits, updates["batch_stats"])

    gradient = jax.value_and_grad(loss_fn, has_aux=True)
    (loss, (logits, batch_stats)), grads = gradient(state.params)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = TrainState(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    accuracy = jnp.mean(logits.argmax(-1) == batch["label"], dtype=jnp.float32)
    return state, {"loss": loss, "accuracy": accuracy}


def eval_step(state: TrainState, batch: Batch, *, model: nn.Module) -> Metrics:
    """Sums over the examples of a batch that count.

    Args:
      state: its parameters and running statistics are used.
      batch: "image" and "label" as in `train_step`; "mask", bool [N], False for
        examples that only fill the batch.
      model: a ResNet.

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
