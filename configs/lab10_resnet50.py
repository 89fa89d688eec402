"""The run of the lesson "Lab10-6: ResNet": its own small ResNet-50 on CIFAR-10.

    python train.py --config configs/lab10_resnet50.py

Batch 256, random crops and no flips, normalised by the mean and deviation of the
training images, 20 epochs. The lesson reports 80% test accuracy; ours: see
docs/results.md. Its text leaves out the number of blocks, `zero_init_residual` and the
optimizer: (3, 4, 6, 3), True, and SGD with a learning rate of 0.1, momentum 0.9, weight decay 5e-4
and half the rate after 10 of the 20 epochs stand in.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    config.model = "lab10_resnet50"
    config.model_fields.zero_init_residual = True
    config.batch_size = 256
    config.num_epochs = 20

    config.schedule = "step"
    config.learning_rate = 0.1
    config.decay_at = (0.5,)
    config.decay_factor = 0.5
    config.momentum = 0.9
    config.nesterov = False
    config.weight_decay = 5e-4

    config.crop_padding = 4
    config.horizontal_flip = False
    return config
