"""A small ResNet-9 on CIFAR-10 in 12 epochs, after airbench94, for the shortest time on a GPU.

    python train.py --config configs/cifar_speedrun_gpu.py

From airbench94 (K. Jordan, arXiv:2404.00498, and its later version with Muon) come Muon, flips
that alternate from epoch to epoch, and label smoothing. On 2 CPU cores: 89.1% in 21 minutes.
No GPU was measured.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "cifar10"
    config.model = "cifar_resnet9"
    config.model_fields.widths = (32, 64, 128, 256)
    config.batch_size = 512
    config.num_epochs = 12

    config.schedule = "onecycle"
    config.optimizer = "muon"
    config.learning_rate = 0.2
    config.warmup_epochs = 3.0
    config.momentum = 0.6
    config.nesterov = True
    config.weight_decay = 0.1
    config.decay_bn_and_bias = False
    config.label_smoothing = 0.1

    config.crop_padding = 4
    config.horizontal_flip = True
    config.alternating_flip = True
    return config
