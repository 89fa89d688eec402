"""A small run on the digits, for the tests of whole runs."""

import pytest

import flax_resnet as fr


@pytest.fixture(scope="package")
def config(digits_dir):
    config = fr.default_config()
    config.dataset = "digits"
    config.data_dir = str(digits_dir)
    config.train_split = "train[:264]"
    config.eval_split = "test[:101]"
    config.model = "cifar_resnet8"
    config.batch_size = 32
    config.eval_batch_size = 40
    config.num_epochs = 4
    config.warmup_epochs = 1.0
    config.crop_padding = 2
    config.horizontal_flip = False
    return config


@pytest.fixture(scope="package")
def finished(config, tmp_path_factory):
    """(workdir, state) of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("run")
    return folder, fr.train(config, folder)
