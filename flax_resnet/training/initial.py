"""The weights that a run starts from, where these are not random ones."""

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

from flax_resnet.errors import InputError, short_reason
from flax_resnet.models.torch_weights import to_arrays
from flax_resnet.models.weight_files import read_state_dict
from flax_resnet.models.weights import fit_weights
from flax_resnet.progress import say
from flax_resnet.training.checkpoint_files import choose_checkpoint, read_variables, steps_in
from flax_resnet.training.config import Config
from flax_resnet.training.jsonfiles import user_path
from flax_resnet.training.steps import TrainState

# Of a model, by their paths.
Weights = dict[tuple[str, ...], jax.Array]


def read_initial(config: Config, workdir: Path) -> Mapping[str, Any] | None:
    """The state_dict of `config.init_from`; None where a run starts from random weights.

    And where it has begun, since then a checkpoint holds everything.

    Raises:
      InputError: if there is none, or it cannot be read.
    """
    source = config.init_from
    if source is None or steps_in(workdir):
        return None
    if not source:
        raise InputError(
            "name the weights to start from: --config.init_from=SOURCE, the folder of a run, "
            "a file of weights, or the id of a Hugging Face Hub repository"
        )
    source = user_path(source)
    if os.path.isdir(source):
        best = choose_checkpoint(source, "best")
        return to_arrays(read_variables(best))
    try:
        return read_state_dict(source)
    except (ValueError, ImportError) as error:
        raise InputError(f"init_from: {error}") from error


def fit_initial(
    config: Config,
    model: nn.Module,
    state_dict: Mapping[str, Any],
    image_shape: tuple[int, ...],
) -> Weights:
    """What `read_initial` has read, as the model's, and says so.

    A classifier of another number of classes is not among it.

    Raises:
      InputError: if it is of another model.
    """
    try:
        weights, classes = fit_weights(model, state_dict, image_shape[-1])
    except ValueError as error:
        raise InputError(
            f"init_from={config.init_from} for {config.model}: {short_reason(error)}; model and "
            "model_fields are to be those of the weights"
        ) from error
    wanted = model.num_classes
    anew = f", but its {classes} classes are not our {wanted}: the classifier starts anew"
    say(f"starts from the weights of {config.init_from}{'' if classes == wanted else anew}")
    return weights


def start_from(
    weights: Weights, state: TrainState, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step with these weights, and its own where there are none."""
    if not weights:
        return state
    variables: dict[tuple[str, ...], Any] = flatten_dict(state.variables)
    for path, new in weights.items():
        # A copy: the state is donated to the first step, and a rollback may come here again.
        # Not jax.device_put, which would gather and compare those of all hosts.
        sharding = variables[path].sharding
        variables[path] = jax.make_array_from_process_local_data(sharding, np.array(new), new.shape)
    # The optimizer may keep what it begins with.
    create = partial(TrainState.create, optimizer=optimizer, ema=bool(state.ema))
    return jax.jit(create, out_shardings=state.step.sharding)(unflatten_dict(variables))
