"""The optimizer of a config and its learning rate, with the meaning that PyTorch gives them."""

from collections.abc import Sequence
from functools import partial

import jax
import optax
import optax.contrib
from flax.traverse_util import path_aware_map

from flax_resnet.errors import InputError
from flax_resnet.models.freezing import is_frozen
from flax_resnet.models.stacking import is_stacked
from flax_resnet.training.config import Config

# The learning rate of what muon does not take, as a share of its own.
_ADAMW_OF_MUON = 0.05


def learning_rate_schedule(
    config: Config, *, steps_per_epoch: int, total_steps: int
) -> optax.Schedule:
    """The learning rate of every step, counted from 0.

    Args:
      config: see `Config`: schedule, learning_rate, warmup_epochs, decay_at,
        decay_factor.
      steps_per_epoch: unit of warmup_epochs.
      total_steps: length of the run.

    Raises:
      InputError: if the warm-up is not shorter than the run, or there is no such schedule.
    """
    peak = config.learning_rate
    warmup = round(config.warmup_epochs * steps_per_epoch)
    rest = total_steps - warmup
    if rest <= 0:
        raise InputError(
            f"warmup_epochs={config.warmup_epochs} is {warmup} steps, but the run has only "
            f"{total_steps}: set a smaller one"
        )
    match config.schedule:
        # Smith and Topin, arXiv:1708.07120; the rates of PyTorch's OneCycleLR, which come a step
        # earlier there. The momentum stays.
        case "onecycle":
            # Optax rounds down, and warmup / total_steps * total_steps may be just below warmup.
            rise = (warmup + 0.5) / total_steps
            return optax.cosine_onecycle_schedule(total_steps, peak, pct_start=rise)
        case "constant":
            schedule = optax.constant_schedule(peak)
        case "cosine":
            schedule = optax.cosine_decay_schedule(peak, rest)
        case "step":
            drops: dict[int, float] = {}
            for at in config.decay_at:  # of which two may be the same step
                step = round(at * total_steps) - warmup
                drops[step] = drops.get(step, 1.0) * config.decay_factor
            schedule = optax.piecewise_constant_schedule(peak, drops)
        case _:
            raise InputError(f"unknown schedule {config.schedule!r}")
    if not warmup:
        return schedule
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, schedule], [warmup])


def make_optimizer(config: Config, learning_rate: optax.Schedule) -> optax.GradientTransformation:
    """`config.optimizer`: Optax's, with the meaning of torch.optim where that has it.

    It does not touch what `config.freeze` names, and keeps no state of it.

    sgd: torch.optim.SGD with dampening 0: weight decay joins the gradient before momentum.
    adamw: torch.optim.AdamW: weight decay, times the learning rate, is taken off apart.
    lars, lamb: the rate of each array by its norm; lars takes BatchNorm's arrays and biases as
    sgd does.
    muon: the kernels of convolutions, [H, W, CI, CO], as matrices [H * W * CI, CO], get the
    nearest orthogonal matrix to their momentum; weight decay as in adamw, which takes all others.
    """
    decay, decayed = config.weight_decay, None if config.decay_bn_and_bias else _kernels
    momentum, nesterov = config.momentum or None, config.nesterov
    match config.optimizer:
        case "sgd":
            optimizer = optax.chain(
                optax.add_decayed_weights(decay, mask=decayed),
                optax.sgd(learning_rate, momentum=momentum, nesterov=nesterov),
            )
        case "adamw":
            optimizer = optax.adamw(learning_rate, weight_decay=decay, mask=decayed)
        case "lars":
            optimizer = optax.lars(
                learning_rate,
                decay,
                weight_decay_mask=decayed or True,
                trust_ratio_mask=_kernels,
                momentum=config.momentum,
                nesterov=nesterov,
            )
        case "lamb":
            optimizer = optax.lamb(learning_rate, weight_decay=decay, mask=decayed)
        case "muon":
            muon = optax.contrib.muon(
                learning_rate,
                beta=config.momentum,
                nesterov=nesterov,
                weight_decay=decay,
                muon_weight_dimension_numbers=_as_matrices,
            )
            adamw = optax.adamw(
                lambda step: _ADAMW_OF_MUON * learning_rate(step), weight_decay=decay, mask=decayed
            )
            optimizer = optax.multi_transform(
                {"muon": muon, "adamw": adamw},
                partial(jax.tree.map_with_path, _muon_or_adamw),
            )
    if config.clip_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(config.clip_norm), optimizer)
    return without_frozen(optimizer, config.freeze)


def without_frozen(
    optimizer: optax.GradientTransformation, freeze: Sequence[str]
) -> optax.GradientTransformation:
    """The optimizer, which neither changes nor keeps a state of what `Config.freeze` names."""
    if not freeze:
        return optimizer

    def labels(params):
        def label(path, _):
            return "frozen" if is_frozen(("params", *path), freeze) else "trained"

        return path_aware_map(label, params)

    return optax.multi_transform({"trained": optimizer, "frozen": optax.set_to_zero()}, labels)


def _muon_or_adamw(path, leaf):
    names = [key.key for key in path]
    is_convolution = names[-1] == "kernel" and leaf.ndim - is_stacked(names) > 3
    return "muon" if is_convolution else "adamw"


def _as_matrices(kernels):
    """Which axes are those of the inputs, and which that of the outputs, of each kernel."""

    def axes(kernel):
        *_, height, width, inputs, outputs = range(kernel.ndim)
        return optax.contrib.MuonDimensionNumbers((height, width, inputs), (outputs,))

    return jax.tree.map(axes, kernels)


def _kernels(params):
    return path_aware_map(lambda path, _: path[-1] == "kernel", params)
