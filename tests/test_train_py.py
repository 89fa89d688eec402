"""The command line: what it takes, and what it says of input that it cannot use."""

import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import pytest

from flax_resnet import memory
from flax_resnet.training.compilation import keep_compiled_programs

ROOT = Path(__file__).parents[1]
DIGITS = ("--config", "configs/digits_resnet8.py")


def run_train(*arguments, data_dir, **environment):
    inherited = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    environment = inherited | {"TFDS_DATA_DIR": str(data_dir)} | environment
    command = [sys.executable, str(ROOT / "train.py"), *arguments]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a recipe, e.g. --config configs/digits_resnet8.py"),
        (("--config",), "name a recipe, e.g. --config configs/digits_resnet8.py"),
        (("--config", "--config.seed=3"), "name a recipe, e.g."),
        (("configs/digits_resnet8.py",), "did you mean --config configs/digits_resnet8.py?"),
        (
            ("--config", "configs/nope.py"),
            "there is no recipe configs/nope.py; the recipes are: configs/cifar_resnet18.py, ",
        ),
        (("--config", "configs"), "there is no recipe configs; the recipes are: "),
        (("--flagfile=/nope",), "No such file or directory: '/nope'"),
        (("--flagfile", "/dev/zero"), "--flagfile=/dev/zero is not a file"),
        ((f"{DIGITS[0]}={DIGITS[1]}:x",), "TypeError: get_config() takes 0 positional arguments"),
        ((*DIGITS, "--confg.seed=1"), "Unknown command line flag 'confg.seed'"),
        ((*DIGITS, "seed=1"), "what is 'seed=1'? Options begin with --"),
        (
            (*DIGITS, "--config.learnng_rate=1"),
            "unknown config key 'learnng_rate': did you mean 'learning_rate'?",
        ),
        ((*DIGITS, "--config.seed=abc"), "train.py: seed must be a whole number, not 'abc'\n"),
        ((*DIGITS, "--config.learning_rate=x"), "learning_rate must be a number, not 'x'\n"),
        ((*DIGITS, "--config.nesterov=x"), "nesterov must be True or False, not 'x'\n"),
        ((*DIGITS, "--learning_rate=1"), "--learning_rate: did you mean --config.learning_rate?"),
        (
            (*DIGITS, "--config.model_fields.dtype=bfloat16"),
            "model_fields cannot set dtype: other keys decide it",
        ),
        (
            (*DIGITS, "--config.model_fields.width=3"),
            "unknown config key 'model_fields.width': did you mean 'widths'?",
        ),
        ((*DIGITS, "--config.batch-size=3"), "key 'batch-size': did you mean 'batch_size'?"),
        ((*DIGITS, "--config.lr=1"), "unknown config key 'lr': did you mean 'learning_rate'?"),
        ((*DIGITS, "--config.lr"), "unknown config key 'lr': did you mean 'learning_rate'?"),
        ((*DIGITS, "--config.epochs=3"), "key 'epochs': did you mean 'num_epochs'?"),
        ((*DIGITS, "--config.seed.x=3"), "unknown config key 'seed.x'"),
        ((*DIGITS, "--config.model_fields.depth=1"), "config key 'model_fields.depth'"),
        ((*DIGITS, "--config.batch_size=None"), "batch_size must be a whole number, not 'None'"),
        (
            (*DIGITS, "--config.num_steps=None", "--config.num_steps=5x"),
            "must be a whole number, not '5x'",
        ),
        ((*DIGITS, "--config.model_fields.layers=(100000,1,1)"), "layers must be at most 400"),
        ((*DIGITS, "--config.batch_size=many"), "batch_size must be a whole number, not 'many'"),
        ((*DIGITS, "--config.batch_size=0"), "batch_size must be at least 1, not 0"),
        ((*DIGITS, "--config.model=resnet19"), "unknown model 'resnet19': did you mean resnet18"),
        ((*DIGITS, "--config.dataset=digts"), "unknown data set 'digts': use cifar10, digits"),
        ((*DIGITS, "--config.eval_split=tset"), "digits has no split 'tset'; it has: train, test"),
        ((*DIGITS, "--num_processes=2"), "process_id go together: give all three"),
        ((*DIGITS, "--num_processes=two"), "flag --num_processes=two"),
        ((*DIGITS, "--coordinator=x:0", "--num_processes=1", "--process_id=0"), "is HOST:PORT"),
        ((*DIGITS, "--workdir=~no.such/run"), "there is no home folder for ~no.such/run"),
        ((*DIGITS, "--workdir=gs://bucket/run"), "gs://bucket/run is no path of this machine"),
        ((*DIGITS, "--workdir=train.py"), "cannot write workdir train.py: train.py is a file"),
        ((*DIGITS, "--workdir=/dev/null/run"), "cannot write workdir /dev/null/run"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, command_line):
    code, printed, said = command_line(*arguments)
    assert (code, printed, said.count("\n")) == (2, "", 1), said
    assert message in said


def test_what_is_very_long_is_not_echoed_whole(command_line):
    for value in ("9" * 10_000, "a b " * 10_000, "(" * 3000):
        code, _, said = command_line(*DIGITS, f"--config.batch_size={value}")
        assert (code, said.count("\n")) == (2, 1)
        assert len(said) < 5000


def test_the_length_that_the_command_line_gives_last_counts(command_line, tmp_path):
    """The warm-up, which is longer, tells how many steps the run would have."""
    recipe = (*DIGITS, "--config.batch_size=1000", "--config.warmup_epochs=99")
    for lengths, steps, told in (
        (("num_steps=7",), 7, ""),
        (("num_steps=7", "num_epochs=2"), 2, "num_epochs=2 takes the place of num_steps=7\n"),
        (("num_epochs=2", "num_steps=7"), 7, ""),
        (("num_steps=7", "num_steps=None"), 15, ""),
        (("num_steps=None", "num_steps=7"), 7, ""),
        (("num_steps=7", "num_epochs=3", "num_steps=None"), 3, ""),
    ):
        overrides = (f"--config.{length}" for length in lengths)
        code, _, said = command_line(*recipe, *overrides, f"--workdir={tmp_path}/run")
        assert code == 2
        assert said.endswith(f"is 99 steps, but the run has only {steps}: set a smaller one\n")
        assert said.startswith(f"{told}train.py: ")


def test_none_takes_back_what_the_recipe_says(command_line):
    """Of `init_from`, which would else be a file that is not there."""
    recipe = ("--config", "configs/finetune.py", "--config.init_from=nope.pth")
    code, _, said = command_line(*recipe, "--config.dataset=nope")
    assert "there is no file nope.pth" in said
    code, _, said = command_line(
        *recipe, "--config.init_from", "None", "--config.data_dir=None", "--config.dataset=nope"
    )
    assert (code, said.count("\n")) == (2, 1)
    assert "unknown data set 'nope'" in said


@pytest.mark.slow
def test_so_it_is_of_a_program_of_its_own(digits_dir):
    for argument in ("--config.batch_size=0", "--config.dataset=digts"):
        result = run_train(*DIGITS, argument, data_dir=digits_dir)
        assert (result.returncode, result.stdout, result.stderr.count("\n")) == (2, "", 1)


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
def test_bad_recipe(tmp_path, content, message, command_line):
    (tmp_path / "recipe.py").write_text(content)
    code, printed, said = command_line("--config", str(tmp_path / "recipe.py"))
    assert (code, printed, said.count("\n")) == (2, "", 1), said
    assert message in said


@pytest.mark.parametrize("returned", ["dict(model='cifar_resnet8')", "ConfigDict({'seed': 3})"])
@pytest.mark.parametrize("override", ["--config.batch_size=8", "--config.model_fields.groups=None"])
def test_keys_of_a_recipe_without_defaults(tmp_path, returned, override, command_line):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(
        f"from ml_collections import ConfigDict\ndef get_config():\n    return {returned}\n"
    )
    code, _, said = command_line("--config", str(recipe), override)
    assert code == 2
    assert said.endswith(f"get_config() of {recipe} has to return default_config(), changed\n")


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


@pytest.mark.slow
@pytest.mark.parametrize("lost", ["closed", "read by nobody", "full"])
def test_a_run_goes_on_without_standard_error(lost, digits_dir, tmp_path):
    run = [sys.executable, "train.py", *DIGITS, f"--workdir={tmp_path}/run", "--config.num_steps=2"]
    run += ["--config.train_split=train[:64]", "--config.eval_split=test[:32]"]
    run += ["--config.warmup_epochs=0.5", f"--config.data_dir={digits_dir}"]
    shell = {"closed": '"$@" 2>&-', "full": '"$@" 2>/dev/full', "read by nobody": '"$@" 2>&1 | :'}
    script = f"set -o pipefail; {shell[lost]}"
    environment = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    command = ["bash", "-c", script, "bash", *run]
    result = subprocess.run(command, cwd=ROOT, env=environment, check=False)
    assert result.returncode == 0
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(metrics[-1])["step"] == 2
    assert (tmp_path / "run" / "report.html").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_program_starts(number, digits_dir, tmp_path):
    run = ["train.py", *DIGITS, f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-X", "importtime", *run]
    # With tunables that are set it does not start itself again.
    environment = os.environ | {"GLIBC_TUNABLES": "", "TFDS_DATA_DIR": str(digits_dir)}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
    ) as process:
        for line in process.stderr or ():
            if line.endswith(" absl.flags\n"):
                process.send_signal(number)
                break
        rest = process.communicate()[1]
    assert process.returncode == 128 + number
    assert "Traceback" not in rest


def test_a_run_that_must_not_be_compiled(digits_dir):
    result = run_train(*DIGITS, data_dir=digits_dir, JAX_DISABLE_JIT="1")
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "a run is compiled ahead, which JAX_DISABLE_JIT forbids" in result.stderr


@pytest.mark.parametrize(("platform", "plugin"), [("cuda", "jax_plugins"), ("tpu", "libtpu")])
def test_an_accelerator_that_is_not_there(platform, plugin, digits_dir):
    if importlib.util.find_spec(plugin):
        pytest.skip(f"{plugin} is there, so the accelerator may be")
    result = run_train(*DIGITS, data_dir=digits_dir, JAX_PLATFORMS=platform)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "JAX_PLATFORMS=cpu takes the CPU" in result.stderr
    assert "Error" not in result.stderr


def test_no_data_and_no_network(tmp_path):
    # A proxy that refuses stands for a machine without a network.
    result = run_train(
        "--config", "configs/cifar_resnet18.py", data_dir=tmp_path, https_proxy="http://127.0.0.1:9"
    )
    assert result.returncode == 2
    progress, message = result.stderr.splitlines()
    assert progress == f"preparing cifar10 in {tmp_path} ..."
    assert "no data and no network" in message


def test_a_run_and_its_refusals(digits_dir, tmp_path, user_cache, command_line):
    workdir, cache = tmp_path / "run", user_cache / "flax_resnet" / "xla"
    short = (*DIGITS, "--config.num_steps=2", "--config.warmup_epochs=0.05")
    run = partial(
        run_train,
        *short,
        data_dir=digits_dir,
        JAX_COMPILATION_CACHE_DIR="",
        JAX_DISABLE_MOST_OPTIMIZATIONS="true",  # two steps are not worth it
        # All of them, or it would depend on how busy the machine is which are kept.
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    result = run(f"--workdir={workdir}")
    assert result.returncode == 0
    lines = result.stderr.splitlines()
    assert "cifar_resnet8 on 1 x cpu" in lines[0]
    assert lines[1] == "compiling ..."
    assert re.fullmatch(r"compiled in \d+\.\d s", lines[2])
    assert lines[3].startswith("epoch 1/1  train loss ")
    assert lines[4].startswith("done in ")
    assert lines[5] == f"TensorBoard: tensorboard --logdir {workdir}"
    assert lines[6] == f"writing {workdir}/report.html"
    assert re.fullmatch(r"evaluating \d+ images \.\.\.", lines[7])
    assert len(lines) == 8
    assert "</html>" in (workdir / "report.html").read_text()
    metrics = (workdir / "metrics.jsonl").read_text()
    assert json.loads(metrics)["step"] == 2

    code, _, said = command_line(*short, f"--workdir={workdir}", "--config.seed=5")
    assert (code, said.count("\n")) == (2, 1)
    assert "holds a run of another config: seed (0 there)" in said
    assert (workdir / "metrics.jsonl").read_text() == metrics

    compiled = sorted(cache.glob("*-cache"))
    assert compiled
    result = run(f"--workdir={tmp_path}/again", "--quiet")
    assert (result.returncode, result.stderr) == (0, "")
    assert sorted(cache.glob("*-cache")) == compiled


def test_several_processes_need_a_workdir(digits_dir):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"--coordinator=127.0.0.1:{free.getsockname()[1]}"
    with ThreadPoolExecutor() as threads:
        start = partial(run_train, *DIGITS, meet, "--num_processes=2", data_dir=digits_dir)
        results = list(threads.map(start, ("--process_id=0", "--process_id=1")))
    for result in results:
        assert result.returncode == 2
        assert "several processes need a --workdir that all of them see" in result.stderr


@pytest.mark.slow
def test_memory_is_kept_unless_set_otherwise(tmp_path, digits_dir):
    recipe = tmp_path / "recipe.py"
    recipe.write_text("import os\nraise ValueError(os.environ['GLIBC_TUNABLES'])\n")
    run = partial(run_train, f"--config={recipe}", data_dir=digits_dir)
    assert "ValueError: glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:" in run().stderr
    assert (
        "ValueError: glibc.malloc.perturb=0" in run(GLIBC_TUNABLES="glibc.malloc.perturb=0").stderr
    )
    page = (ROOT / "docs" / "performance.md").read_text()
    assert f"GLIBC_TUNABLES={memory.KEEP_MEMORY}\n" in page


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_step_takes_over_the_memory_of_the_one_before():
    script = """
import ctypes
from flax_resnet import memory

memory.reuse_memory()
libc = ctypes.CDLL(None)
libc.aligned_alloc.argtypes, libc.aligned_alloc.restype = 2 * [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.malloc(200 << 20)  # a data set
piece = libc.aligned_alloc(64, 1 << 30)
assert piece
for _ in range(100):
    libc.malloc(5_000_000)  # small, and stays
libc.free(piece)
assert libc.aligned_alloc(64, 1 << 30) == piece
"""
    settings = os.environ | {"GLIBC_TUNABLES": memory.KEEP_MEMORY}
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=settings, check=True)


def test_a_cache_that_is_set_stays():
    folder = jax.config.values["jax_compilation_cache_dir"]
    keep_compiled_programs()
    assert jax.config.values["jax_compilation_cache_dir"] == folder


def test_no_home_is_no_error(no_home):
    keep_compiled_programs()


def test_help_names_the_options():
    result = run_train("--help", data_dir="nowhere")
    assert (result.returncode, result.stderr) == (0, "")
    for text in ("configs/digits_resnet8.py: ", "learning_rate: float = 0.1", "# A batch goes"):
        assert text in result.stdout
    for option in ("--config", "--workdir", "--coordinator", "--num_processes", "--process_id"):
        assert option in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo", "evaluate", "lesson", "predict", "report"])
def test_help_of_the_others_is_as_wide_as_a_terminal(name):
    command = [sys.executable, "-m", f"flax_resnet.{name}", "--help"]
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"COLUMNS": "80"}, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_import_is_light():
    script = (
        "import sys, flax_resnet\n"
        "heavy = {'tensorflow', 'torch', 'sklearn', 'matplotlib', 'scipy', 'grain'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
