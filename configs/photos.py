"""Photographs in folders, a class each: from scratch, or from published weights.

    python train.py --config configs/photos.py --config.dataset=folder:PATH

PATH has PATH/train/CLASS/* and PATH/val/CLASS/*, or test; with the classes directly in PATH add
--config.train_split='train[:90%]' --config.eval_split='train[90%:]'. Made for 200 to 20,000
pictures.

From weights, usually the better way where there are few pictures:

    python train.py --config configs/photos.py --config.dataset=folder:PATH \
        --config.init_from=timm/resnet18.a1_in1k --config.image_size=224 \
        --config.learning_rate=0.01

On 2 CPU cores, with ants and bees (245 pictures for training, 153 for testing, 54% of these bees),
mean of three seeds: 70.2% from scratch, in 9 minutes. With --config.model=cifar_resnet20
--config.image_size=64, on one core: 74.9% from scratch, 76.3% from weights for CIFAR-10, in 2
minutes each. The pictures stay decoded in memory where they fit.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    config.dataset = "folder:"  # to be given on the command line
    config.image_size = 128
    config.crop = "resized"
    # Half of a picture at least: a small part may not show what it is a picture of.
    config.crop_area = (0.5, 1.0)
    config.horizontal_flip = True
    config.stream_workers = 2

    config.model = "resnet18"
    config.batch_size = 32
    config.eval_batch_size = 64
    config.num_epochs = 30

    config.schedule = "onecycle"
    config.learning_rate = 0.02
    config.warmup_epochs = 5.0
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4
    config.label_smoothing = 0.1
    config.ema_decay = 0.99
    return config
