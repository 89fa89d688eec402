"""ResNet-8 on the handwritten digits that scikit-learn ships: no network, no download.

    python train.py --config configs/digits_resnet8.py

About 99% test accuracy in under a minute on 2 CPU cores.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "digits"
    config.model = "cifar_resnet8"
    config.batch_size = 64
    config.num_epochs = 15

    config.schedule = "onecycle"
    config.learning_rate = 0.2
    config.warmup_epochs = 3.0
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4

    # A digit mirrored is another sign.
    config.crop_padding = 2
    config.horizontal_flip = False
    return config
