"""Fine-tuning: weights that learnt on one data set, on another.

    python train.py --config configs/finetune.py --config.init_from=runs/digits90

As it stands it needs no network: ResNet-8 on 144 handwritten digits, a tenth of them, from
the folder of a run that saw the others:

    python train.py --config configs/digits_resnet8.py --workdir runs/digits90 \
        --config.train_split='train[10%:]'

A few seconds of training on 2 CPU cores. What it reaches, and what a start from random weights
does: see docs/results.md.

From CIFAR-10 to CIFAR-100, all layers:

    python train.py --config configs/finetune.py --config.init_from=runs/cifar10 \
        --config.model=cifar_resnet18 --config.dataset=cifar100 --config.train_split=train \
        --config.horizontal_flip=True --config.crop_padding=4 --config.freeze='()' \
        --config.batch_size=128

`init_from` also takes a file of weights as they are published, and the id of a Hugging
Face Hub repository.
"""

from flax_resnet.training import default_config


def get_config():
    config = default_config()
    # To be given on the command line, with the model and model_fields of the weights.
    config.init_from = ""
    config.model = "cifar_resnet8"
    # The first layers see edges wherever they are; their BatchNorm keeps its statistics.
    config.freeze = ("conv1", "bn1", "layer1")

    config.dataset = "digits"
    config.train_split = "train[:10%]"
    config.batch_size = 32
    config.num_epochs = 20

    # A tenth of what a start from random weights would take.
    config.schedule = "cosine"
    config.learning_rate = 0.01
    config.warmup_epochs = 1.0
    config.momentum = 0.9
    config.nesterov = True
    config.weight_decay = 5e-4

    # A digit mirrored is another sign.
    config.crop_padding = 2
    config.horizontal_flip = False
    return config
