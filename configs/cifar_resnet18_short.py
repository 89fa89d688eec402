"""ResNet-18 for 32x32 images on CIFAR-10 in 30 epochs: a night on 2 CPU cores.

    python train.py --config configs/cifar_resnet18_short.py

The net of cifar_resnet18.py, with Muon on one cycle, flips that alternate from epoch to epoch, and
cutout. Not run in full so far: 12 epochs reach 90.0% in two hours, see docs/results.md.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    config.model = "cifar_resnet18"
    config.batch_size = 512
    config.num_epochs = 30

    config.schedule = "onecycle"
    config.optimizer = "muon"
    config.learning_rate = 0.1
    config.warmup_epochs = 5.0
    config.momentum = 0.6
    config.nesterov = True
    config.weight_decay = 0.1
    config.decay_bn_and_bias = False
    config.label_smoothing = 0.1

    config.crop_padding = 4
    config.horizontal_flip = True
    config.alternating_flip = True
    config.cutout = 8
    return config
