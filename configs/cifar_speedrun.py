"""A small ResNet-9 on CIFAR-10, for a short training to 90% on a CPU.

    python train.py --config configs/cifar_speedrun.py

32 epochs with one cycle of the learning rate, and cutout. Measured: see docs/results.md.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    config.model = "cifar_resnet9"
    config.model_fields.widths = (32, 64, 128, 256)
    config.batch_size = 128
    config.num_epochs = 32

    config.schedule = "onecycle"
    config.learning_rate = 0.2
    config.warmup_epochs = 5.0
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4
    config.decay_bn_and_bias = False
    config.label_smoothing = 0.1

    config.crop_padding = 4
    config.horizontal_flip = True
    config.cutout = 8
    return config
