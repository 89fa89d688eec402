"""ResNet-18 for 32x32 images on CIFAR-10: the main recipe.

    python train.py --config configs/cifar_resnet18.py

200 epochs of SGD with Nesterov momentum, weight decay 5e-4 and a cosine from 0.1 to 0.
DeVries and Taylor (2017) reach 95.28% test accuracy with steps in place of the cosine, and
96.01% with --config.cutout=16. Ours: not run.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    config.model = "cifar_resnet18"
    config.batch_size = 128
    config.num_epochs = 200

    config.schedule = "cosine"
    config.learning_rate = 0.1
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4

    config.crop_padding = 4
    config.horizontal_flip = True
    return config
