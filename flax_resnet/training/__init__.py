"""Training and evaluation of a model on a data set."""

from flax_resnet.training.config import Config, check_config, default_config
from flax_resnet.training.loop import train
from flax_resnet.training.optimizer import learning_rate_schedule, sgd
from flax_resnet.training.steps import TrainState, create_state, eval_step, train_step

__all__ = [
    "Config",
    "TrainState",
    "check_config",
    "create_state",
    "default_config",
    "eval_step",
    "learning_rate_schedule",
    "sgd",
    "train",
    "train_step",
]
