"""A wide ResNet-8 on CIFAR-10, on the way to the shortest training to 90% on a CPU.

    python train.py --config configs/cifar_speedrun.py

24 epochs with one cycle of the learning rate. It does not reach 90%: see docs/results.md.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    # Wide, and soon at 16x16: what is done at 32x32 costs four times as much a channel.
    config.model = "cifar_resnet8"
    config.model_fields.stem_width = 16
    config.model_fields.widths = (48, 96, 192)
    config.model_fields.strides = (2, 2, 2)
    config.model_fields.shortcut = "average"
    config.batch_size = 128
    config.num_epochs = 24

    config.schedule = "onecycle"
    config.learning_rate = 0.4
    config.warmup_epochs = 6.0
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4
    config.decay_bn_and_bias = False
    config.label_smoothing = 0.1

    config.crop_padding = 2
    config.horizontal_flip = True
    return config
