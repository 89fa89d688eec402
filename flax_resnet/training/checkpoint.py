"""Orbax checkpoints of the newest and of the best state."""

from pathlib import Path
from typing import cast

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers as policies

from flax_resnet.errors import InputError
from flax_resnet.training.steps import TrainState


def open_checkpoints(workdir: Path) -> ocp.CheckpointManager:
    """The checkpoints of a run, in `workdir`/checkpoints/STEP.

    Of those, the newest and the one with the best test accuracy are kept;
    `best_step()` tells which that is.
    """

    def accuracy(metrics: dict[str, float]) -> float:
        return metrics["test_accuracy"]

    return ocp.CheckpointManager(
        workdir.absolute() / "checkpoints",
        options=ocp.CheckpointManagerOptions(
            # Without best_fn the metrics of an earlier start would not be read.
            best_fn=accuracy,
            preservation_policy=policies.AnyPreservationPolicy(
                [policies.LatestN(1), policies.BestN(get_metric_fn=accuracy, n=1)]
            ),
        ),
    )


def save(manager: ocp.CheckpointManager, state: TrainState, test_accuracy: float) -> None:
    """Writes `state` in the background, and lets go of what need not be kept."""
    manager.save(
        int(state.step),
        args=ocp.args.StandardSave(state),
        metrics={"test_accuracy": test_accuracy},
    )


def restore_newest(manager: ocp.CheckpointManager, like: TrainState) -> TrainState:
    """The newest state, on the devices and with the sharding of `like`.

    Returns:
      `like` itself if there is no checkpoint.

    Raises:
      InputError: if the newest one cannot be read, or is of another model.
    """
    step = manager.latest_step()
    if step is None:
        return like
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    try:
        return cast(TrainState, manager.restore(step, args=ocp.args.StandardRestore(abstract)))
    except Exception as error:  # Orbax and TensorStore have many, and no base for them
        reason = " ".join(str(error).split())[:300]
        raise InputError(
            f"checkpoint {manager.directory / str(step)} cannot be read: {reason}"
        ) from error
