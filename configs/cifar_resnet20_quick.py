"""ResNet-20 on CIFAR-10 in 5 epochs: a first result on the CPU of a laptop.

    python train.py --config configs/cifar_resnet20_quick.py

One cycle of the learning rate (Smith and Topin, arXiv:1708.07120); 80% test accuracy
or more. Ours: see docs/results.md.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    config.model = "cifar_resnet20"
    # Five epochs are too few to overfit: small batches and little augmentation pay.
    config.batch_size = 32
    config.num_epochs = 5

    config.schedule = "onecycle"
    config.learning_rate = 0.1
    config.warmup_epochs = 1.0
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4

    config.crop_padding = 1
    config.horizontal_flip = True
    return config
