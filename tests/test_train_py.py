"""The command line: what it takes, and what it says of input that it cannot use."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DIGITS = ("--config", "configs/digits_resnet8.py")


def run_train(*arguments, data_dir, **environment):
    environment = os.environ | {"TFDS_DATA_DIR": str(data_dir)} | environment
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a recipe, e.g. --config configs/digits_resnet8.py"),
        (("--config", "configs/nope.py"), "No such file or directory: 'configs/nope.py'"),
        ((*DIGITS, "--confg.seed=1"), "Unknown command line flag 'confg.seed'"),
        ((*DIGITS, "seed=1"), "what is 'seed=1'? Options begin with --"),
        (
            (*DIGITS, "--config.learnng_rate=1"),
            "unknown config key 'learnng_rate': did you mean 'learning_rate'?",
        ),
        ((*DIGITS, "--config.model_fields.depth=1"), "unknown config key 'depth'"),
        ((*DIGITS, "--config.batch_size=many"), "--config.batch_size=many: invalid literal"),
        ((*DIGITS, "--config.batch_size=0"), "batch_size must be at least 1, not 0"),
        ((*DIGITS, "--config.model=resnet19"), "unknown model 'resnet19': did you mean resnet18"),
        ((*DIGITS, "--config.dataset=digts"), "unknown data set 'digts': use cifar10, digits"),
        ((*DIGITS, "--config.eval_split=tset"), "digits has no split 'tset'; it has: train, test"),
        ((*DIGITS, "--workdir=train.py"), "cannot write workdir train.py: train.py is a file"),
        ((*DIGITS, "--workdir=/dev/null/run"), "cannot write workdir /dev/null/run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, digits_dir):
    result = run_train(*arguments, data_dir=digits_dir)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named"),
        ("def get_config(:", "SyntaxError: invalid syntax"),
        (
            "from flax_resnet import default_config\n"
            "def get_config():\n"
            "    config = default_config()\n"
            "    config.batch_size = '128'\n"
            "    return config\n",
            "TypeError: ",
        ),
        (
            "from flax_resnet import default_config\n"
            "def get_config():\n"
            "    config = default_config()\n"
            "    config.learnng_rate = 0.1\n"
            "    return config\n",
            "unknown config key 'learnng_rate': did you mean 'learning_rate'?",
        ),
    ],
)
def test_bad_recipe(tmp_path, content, message, digits_dir):
    (tmp_path / "recipe.py").write_text(content)
    result = run_train("--config", str(tmp_path / "recipe.py"), data_dir=digits_dir)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr


def test_devices_that_do_not_divide_the_batch(digits_dir, tmp_path):
    result = run_train(
        *DIGITS,
        "--config.batch_size=20",
        "--workdir",
        str(tmp_path / "run"),
        data_dir=digits_dir,
        JAX_NUM_CPU_DEVICES="8",
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "batch_size=20 cannot be divided among 8 devices" in result.stderr
    assert not (tmp_path / "run").exists()


def test_no_data_and_no_network(tmp_path):
    # A proxy that refuses stands for a machine without a network.
    result = run_train(
        "--config", "configs/cifar_resnet18.py", data_dir=tmp_path, https_proxy="http://127.0.0.1:9"
    )
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "no data and no network" in result.stderr


def test_a_run_and_its_refusals(digits_dir, tmp_path):
    workdir = tmp_path / "run"
    short = ("--config.num_steps=2", "--config.warmup_epochs=0.05", f"--workdir={workdir}")
    result = run_train(*DIGITS, *short, data_dir=digits_dir)
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    assert "cifar_resnet8 on 1 x cpu" in lines[0]
    assert lines[-1].startswith("epoch 1/1  train loss ")
    assert len(lines) == 3  # and the time that compiling took
    metrics = (workdir / "metrics.jsonl").read_text()
    assert json.loads(metrics)["step"] == 2

    result = run_train(*DIGITS, *short, "--config.seed=5", data_dir=digits_dir)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1)
    assert "holds a run of another config: seed (0 there)" in result.stderr
    assert (workdir / "metrics.jsonl").read_text() == metrics


def test_help_names_the_options():
    result = run_train("--help", data_dir="nowhere")
    for option in ("--config", "--workdir"):
        assert option in result.stdout


def test_import_is_light():
    script = (
        "import sys, flax_resnet\n"
        "heavy = {'tensorflow', 'torch', 'sklearn', 'matplotlib.pyplot'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
