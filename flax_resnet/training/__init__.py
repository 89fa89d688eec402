"""Training and evaluation of a model on a data set."""

from flax_resnet.training.config import Config, check_config, default_config
from flax_resnet.training.launch import train
from flax_resnet.training.optimizer import learning_rate_schedule, make_optimizer
from flax_resnet.training.steps import (
    TrainState,
    create_state,
    cross_entropy,
    eval_step,
    train_step,
    update_ema,
)

__all__ = [
    "Config",
    "TrainState",
    "check_config",
    "create_state",
    "cross_entropy",
    "default_config",
    "eval_step",
    "learning_rate_schedule",
    "make_optimizer",
    "train",
    "train_step",
    "update_ema",
]
