"""ResNets, ResNet-9 and VGG, their weights from and to PyTorch; nothing else of flax_resnet."""

from flax_resnet.models import variants
from flax_resnet.models.activation_maps import class_activation_maps
from flax_resnet.models.registry import create_model, list_models
from flax_resnet.models.resnet import (
    BasicBlock,
    Bottleneck,
    PreActBasicBlock,
    PreActBottleneck,
    ResNet,
)
from flax_resnet.models.resnet9 import ResNet9
from flax_resnet.models.stacking import stack_blocks, unstack_blocks
from flax_resnet.models.summary import summary
from flax_resnet.models.torch_weights import from_torch, to_torch
from flax_resnet.models.variants import *  # noqa: F403
from flax_resnet.models.vgg import VGG
from flax_resnet.models.weights import save_weights

__all__ = [
    "VGG",
    "BasicBlock",
    "Bottleneck",
    "PreActBasicBlock",
    "PreActBottleneck",
    "ResNet",
    "ResNet9",
    "class_activation_maps",
    "create_model",
    "from_torch",
    "list_models",
    "save_weights",
    "stack_blocks",
    "summary",
    "to_torch",
    "unstack_blocks",
]
__all__ += variants.__all__
