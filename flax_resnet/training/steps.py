"""The state of a run and the pure functions that train and evaluate it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import chex
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Int32, Key

from flax_resnet.models.freezing import is_frozen
from flax_resnet.models.stacking import is_stacked

Batch = dict[str, jax.Array]
Metrics = dict[str, Any]
# Logits, float [N, K], and labels, int32 [N], to the loss of each example, float [N].
Loss = Callable[[jax.Array, jax.Array], jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """Everything that a training step changes.

    Attributes:
      step: int32 [], number of steps done.
      params: float32 parameters of the model.
      batch_stats: float32 running statistics of BatchNorm; {} for a model without it.
      opt_state: state of the optax optimizer.
      ema: {"params", "batch_stats"}, their moving average; {} for none.
    """

    step: Int32[Array, ""]
    params: Any
    batch_stats: Any
    opt_state: optax.OptState
    ema: Any

    @classmethod
    def create(
        cls,
        variables: Mapping[str, Any],
        optimizer: optax.GradientTransformation,
        *,
        ema: bool = False,
    ) -> "TrainState":
        """The state before the first step, with these variables of a model."""
        params, batch_stats = variables["params"], variables.get("batch_stats", {})
        average = {"params": params, "batch_stats": batch_stats}
        return cls(
            step=jnp.int32(0),
            params=params,
            batch_stats=batch_stats,
            # Copies: no array of a state may be given to the next step twice.
            opt_state=jax.tree.map(jnp.copy, optimizer.init(params)),
            ema=jax.tree.map(jnp.copy, average) if ema else {},
        )

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes in training."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def eval_variables(self) -> dict[str, Any]:
        """What `model.apply` takes in evaluation: the moving average if there is one."""
        return self.ema or self.variables


def create_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    key: Key[Array, ""],
    image_shape: tuple[int, ...],
    *,
    ema: bool = False,
) -> TrainState:
    """The state before the first step, with random weights.

    Args:
      model: takes images and `train`.
      optimizer: such as `make_optimizer` gives.
      key: of the initial weights.
      image_shape: (H, W, C).
      ema: keep a moving average of them, see `update_ema`.
    """
    variables = model.init(key, jnp.zeros((1, *image_shape)), train=False)
    return TrainState.create(variables, optimizer, ema=ema)


def cross_entropy(
    logits: jax.Array, labels: jax.Array, *, label_smoothing: float = 0.0
) -> jax.Array:
    """The cross-entropy of each example, as torch.nn.CrossEntropyLoss(reduction="none").

    Args:
      logits: float [N, K].
      labels: int32 [N].
      label_smoothing: share of the target spread evenly over all classes.

    Returns:
      float [N], in nats.
    """
    targets = jax.nn.one_hot(labels, logits.shape[-1])
    return optax.softmax_cross_entropy(logits, optax.smooth_labels(targets, label_smoothing))


def apply_in_training(
    model: nn.Module, variables: Mapping[str, Any], images: jax.Array, key: Key[Array, ""] | None
) -> tuple[Any, Any]:
    """What a model gives in a step of training, and its batch_stats after that.

    Args:
      model: takes images and `train`.
      variables: what `model.apply` takes.
      images: float [N, H, W, C].
      key: of dropout and stochastic depth, if there are any.
    """
    rngs = None if key is None else {"dropout": key}
    output, updates = model.apply(variables, images, train=True, mutable=["batch_stats"], rngs=rngs)
    return output, updates.get("batch_stats", {})


def train_step(
    state: TrainState,
    batch: Batch,
    *,
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    loss: Loss = cross_entropy,
    accumulation_steps: int = 1,
    dropout_key: Key[Array, ""] | None = None,
    frozen: Sequence[str] = (),
) -> tuple[TrainState, Metrics]:
    """One step of training.

    With accumulation_steps above 1 the batch goes through the model in so many parts, one
    after the other, for which less memory is enough. The gradient is the same mean over
    the batch, but BatchNorm sees one part at a time.

    Args:
      state: before the step.
      batch: "image", float [N, H, W, C], normalised; "label", int32 [N]; where images are
        mixed also "other_label", int32 [N], and "share", float32 [N], see `mix`.
      model, optimizer: as given to `create_state`.
      loss: of each example.
      accumulation_steps: parts of the batch; divides N.
      dropout_key: of dropout and stochastic depth, the same in every step of a run: what a
        step draws depends on it, the number of the step and the part of the batch.
      frozen: what the optimizer leaves as it is, named as in `Config.freeze`.

    Returns:
      The state after the step, with `ema` as it was, and metrics: the batch's mean "loss" and
      "accuracy", float32 []; "gradient_norm", float32 [], the Euclidean norm of the gradient of
      all parameters that are not frozen; and "layer_gradient_norms", float32 [L], that of each
      kernel among them, sorted by their paths.
    """
    chex.assert_rank([batch["image"], batch["label"]], [4, 1])

    def loss_fn(params, batch_stats, key, batch):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, batch_stats = apply_in_training(model, variables, batch["image"], key)
        logits = jnp.float32(logits)
        losses = loss(logits, batch["label"])
        correct = jnp.float32(logits.argmax(-1) == batch["label"])
        if "other_label" in batch:
            share, other = batch["share"], batch["other_label"]
            losses = share * losses + (1 - share) * loss(logits, other)
            correct = share * correct + (1 - share) * (logits.argmax(-1) == other)
        metrics = {"loss": losses.mean(), "accuracy": correct.mean()}
        return metrics["loss"], (batch_stats, metrics)

    gradient = jax.grad(loss_fn, has_aux=True)

    def part(carry, batch):
        batch_stats, key = carry
        grads, (batch_stats, metrics) = gradient(state.params, batch_stats, key, batch)
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
    metrics |= _gradient_norms(grads, frozen)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    state = state.replace(
        step=state.step + 1,
        params=optax.apply_updates(state.params, updates),
        batch_stats=batch_stats,
        opt_state=opt_state,
    )
    return state, metrics


def update_ema(state: TrainState, decay: float) -> TrainState:
    """The state after a step with its moving average brought up to date.

    After t steps it is decay * average + (1 - decay) * new, where decay is (1 + t) / (10 + t)
    as long as that is less: as in tf.train.ExponentialMovingAverage with num_updates. What is no
    float, a counter say, is that of the last step.
    """
    steps = jnp.float32(state.step)
    step_size = 1 - jnp.minimum(decay, (1 + steps) / (10 + steps))
    mean = optax.incremental_update(state.variables, state.ema, step_size)

    def of_its_type(mean, new):
        return mean.astype(jnp.result_type(new)) if jnp.issubdtype(new.dtype, jnp.inexact) else new

    return state.replace(ema=jax.tree.map(of_its_type, mean, state.variables))


def _gradient_norms(grads: Any, frozen: Sequence[str]) -> Metrics:
    flat: dict[tuple[str, ...], Any] = flatten_dict(grads)
    # Without what is frozen: the compiler leaves out the gradients that nobody asks for.
    trained = {path: g for path, g in flat.items() if not is_frozen(("params", *path), frozen)}
    kernels = [_squares_by_column(*item) for item in _kernels(grads, frozen).items()]
    others = [jnp.square(g).ravel() for path, g in trained.items() if path[-1] != "kernel"]
    # All at once: a GPU would take longer to start a sum for each than to do it.
    width = max((squares.shape[1] for squares in kernels), default=0)
    padded = [jnp.pad(squares, ((0, 0), (0, width - squares.shape[1]))) for squares in kernels]
    norms = jnp.sqrt(jnp.concatenate([jnp.zeros((0, width)), *padded]).sum(1))
    total = jnp.square(norms).sum() + jnp.concatenate([jnp.zeros(0), *others]).sum()
    return {"gradient_norm": jnp.sqrt(total), "layer_gradient_norms": norms}


def _squares_by_column(path: tuple[str, ...], kernel: jax.Array) -> jax.Array:
    """Sums of the squares of each output channel, [kernels on top of each other, channels]."""
    squares = jnp.atleast_1d(jnp.square(kernel))
    squares = squares.sum(range(is_stacked(path), squares.ndim - 1))
    return squares.reshape(-1, squares.shape[-1])


def split_layers(norms: np.ndarray, params: Any, frozen: Sequence[str] = ()) -> dict[str, Any]:
    """What of "layer_gradient_norms" belongs to which kernel.

    Args:
      norms: [steps, L].
      params: as in the state of these steps, for their shapes.
      frozen: see `train_step`.

    Returns:
      A tree like `params` of the kernels that are not frozen, [steps] each; where kernels of
      many blocks are on top of each other (`stack_blocks`) [blocks, steps].
    """
    kernels = _kernels(params, frozen)
    if not kernels:
        return {}
    counts = [len(kernel) if is_stacked(path) else 1 for path, kernel in kernels.items()]
    parts = np.split(norms.T, np.cumsum(counts)[:-1])
    return unflatten_dict(
        {
            path: part if is_stacked(path) else part[0]
            for path, part in zip(kernels, parts, strict=True)
        }
    )


def _kernels(tree: Any, frozen: Sequence[str]) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = flatten_dict(tree)
    return {
        path: flat[path]
        for path in sorted(flat)
        if path[-1] == "kernel" and not is_frozen(("params", *path), frozen)
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


def eval_step(
    variables: Mapping[str, Any], batch: Batch, *, model: nn.Module, loss: Loss = cross_entropy
) -> Metrics:
    """Sums over the examples of a batch that count.

    Args:
      variables: what `model.apply` takes, such as those of a `TrainState`.
      batch: "image" and "label" as in `train_step`; "mask", bool [N], False for
        examples that only fill the batch.
      model: takes images and `train`.
      loss: of each example.

    Returns:
      "loss", float32 [], and "correct" and "count", int32 [].
    """
    chex.assert_rank([batch["image"], batch["label"], batch["mask"]], [4, 1, 1])
    logits = jnp.float32(model.apply(variables, batch["image"], train=False))
    losses = loss(logits, batch["label"])
    correct = logits.argmax(-1) == batch["label"]
    mask = batch["mask"]
    return {
        "loss": jnp.sum(losses, where=mask),
        "correct": jnp.sum(correct, where=mask, dtype=jnp.int32),
        "count": jnp.sum(mask, dtype=jnp.int32),
    }
