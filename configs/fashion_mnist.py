"""ResNet-20 on Fashion-MNIST (Xiao et al., arXiv:1708.07747) in 10 epochs, for a CPU.

    python train.py --config configs/fashion_mnist.py

The four files come from the web at the first start. Without a network take them from Debian's
package dataset-fashion-mnist: docs/how-to/offline-data.md has the commands.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "fashion_mnist"
    config.model = "cifar_resnet20"
    config.batch_size = 64
    config.num_epochs = 10

    config.schedule = "onecycle"
    config.learning_rate = 0.1
    config.warmup_epochs = 2.0
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4

    # Clothes may be mirrored; they stand in the middle, so that a small crop is enough.
    config.crop_padding = 2
    config.horizontal_flip = True
    return config
