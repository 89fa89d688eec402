"""ResNet-20 on CIFAR-10 as He et al. (arXiv:1512.03385, section 4.2) trained it.

    python train.py --config configs/cifar_resnet20.py

64k steps of batch 128, the learning rate divided by 10 after 32k and 48k. They report
8.75% test error; ours is in docs/results.md. One thing differs: they subtract the mean of each
pixel, we normalise by the mean and standard deviation of each channel.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    config.model = "cifar_resnet20"
    config.batch_size = 128
    config.num_steps = 64_000

    config.schedule = "step"
    config.learning_rate = 0.1
    config.decay_at = (0.5, 0.75)
    config.decay_factor = 0.1
    config.momentum = 0.9
    config.nesterov = False
    config.weight_decay = 1e-4

    config.crop_padding = 4
    config.horizontal_flip = True
    return config
