"""ResNet-50 on ImageNet as Goyal et al. (arXiv:1706.02677) trained it.

    python train.py --config configs/imagenet_resnet50.py --config.data_dir=DIR

DIR holds imagenet2012 as TFDS prepares it, with file_format='array_record'. A folder does as well:
--config.dataset=folder:PATH. A number after the recipe is the batch size, and the learning rate
follows from it: 0.1 for 256, as in section 2.1 of the paper.

    python train.py --config configs/imagenet_resnet50.py:2048 --config.data_dir=DIR

90 epochs, a tenth of the rate after 30, 60 and 80 of them, five epochs of warm-up (section 2.2);
Nesterov momentum, blocks begin as the identity, and neither BatchNorm nor biases decay (section
5.1). They report 23.6% error. Label smoothing is not in the paper (C. Szegedy et al.,
arXiv:1512.00567). Ours: not run.
"""

from flax_resnet.training import default_config


def get_config(batch_size="256"):
    config = default_config()
    config.dataset = "imagenet2012"
    config.eval_split = "validation"
    config.image_size = 224
    config.crop = "resized"
    config.horizontal_flip = True
    config.normalize = "imagenet"
    config.stream_workers = 16

    config.model = "resnet50"
    config.model_fields.zero_init_residual = True
    config.batch_size = int(batch_size)
    config.eval_batch_size = 256
    config.num_epochs = 90

    config.schedule = "step"
    config.learning_rate = 0.1 * config.batch_size / 256
    config.warmup_epochs = 5.0
    config.decay_at = (30 / 90, 60 / 90, 80 / 90)
    config.decay_factor = 0.1
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 1e-4
    config.decay_bn_and_bias = False
    config.label_smoothing = 0.1
    return config
