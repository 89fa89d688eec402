"""Trains a model, or goes on with the run that the workdir holds.

    python train.py --config configs/cifar_resnet18.py [--workdir DIR] [--config.KEY=VALUE ...]

Every key of the config can be set, e.g. --config.batch_size=256;
flax_resnet/training/config.py lists them with their meaning. Ctrl-C stops a run after the
step at hand, and the same command with its --workdir goes on. Exits with 2 and one line on
standard error where the input cannot be used.

On several hosts start it on each, with the same arguments: as it is on a TPU pod or by
Slurm's srun, elsewhere with --coordinator, --num_processes and --process_id too.
"""

import argparse
import importlib.util
import os
import re
import runpy
import signal
import sys
import time
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="The recipe, e.g. configs/digits_resnet8.py."
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run; a fresh one in runs/, named after the recipe, if not set."
)
_QUIET = flags.DEFINE_bool("quiet", False, "Say nothing of progress on standard error.")
_COORDINATOR = flags.DEFINE_string(
    "coordinator", None, "HOST:PORT of the first of several processes, for all to meet."
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many they are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which of them this is, from 0.")


def main(arguments: list[str]) -> None:
    # After the flags: --help answers at once.
    from flax_resnet import InputError, train
    from flax_resnet.memory import reuse_memory
    from flax_resnet.progress import hush_libraries, quietly
    from flax_resnet.report import report_after_training
    from flax_resnet.training.hosts import connect

    if len(arguments) > 1:
        fail(f"what is {arguments[1]!r}? Options begin with --")
    hush_libraries(logging.FATAL)  # they tell of an error before they raise it
    reuse_memory()
    recipe = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        processes = connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        if processes > 1 and _WORKDIR.value is None:
            fail("several processes need a --workdir that all of them see")
        with quietly(_QUIET.value):
            train(_CONFIG.value, workdir)
            report_after_training(workdir)
    except InputError as error:
        fail(error)
    except FloatingPointError as error:
        fail(error, code=1)
    except KeyboardInterrupt as interrupt:
        if not interrupt.args:
            raise
        sys.exit(128 + signal.SIGINT)  # the run has stopped in order, on all hosts


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; the config file runs here, so anything can go wrong."""
    try:
        return parse(flags.FLAGS, arguments)
    except Exception as error:
        problem = describe(error)
    # That was the first; every --config.KEY=VALUE by itself shows all of them.
    config_only = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config_only.add_argument("--config", default="")
    known, others = config_only.parse_known_args(arguments[1:])
    problems = []
    for override in [a for a in others if re.match("--?config[.].*=", a)]:
        alone = flags.FlagValues()
        config_flags.DEFINE_config_file("config", flag_values=alone)
        sys.argv = [arguments[0], f"--config={known.config}", override]  # what it reads
        try:
            parse(alone, sys.argv)
        except Exception as error:
            problems.append(describe(error))
    fail("; ".join(dict.fromkeys(problems)) or problem)


def parse(values: flags.FlagValues, arguments: list[str]) -> list[str]:
    rest = values(arguments)
    if values["config"].value is None:
        raise flags.Error("name a recipe, e.g. --config configs/digits_resnet8.py")
    list(values["config"].value)  # raises if the file is not there
    return rest


def describe(error: Exception) -> str:
    """What is wrong with the command line or the recipe."""
    if isinstance(error, AttributeError):  # ml_collections: no such key, and perhaps a near one
        names = [repr(name) for name in re.findall(r'(?<=["\'])\w+(?=\W)', str(error))]
        hint = f": did you mean {names[1]}?" if len(names) > 1 else ""
        return f"unknown config key {names[0]}{hint}" if names else f"AttributeError: {error}"
    return str(error) if isinstance(error, flags.Error) else f"{type(error).__name__}: {error}"


def fail(error: object, code: int = 2) -> NoReturn:
    """Ends the program with one line on standard error."""
    from flax_resnet.errors import one_line

    print("train.py:", one_line(error), file=sys.stderr)
    sys.exit(code)


def end_by_signal(code: int) -> NoReturn:
    """Ends the program without waiting for what still runs in other threads."""
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, frame: end_by_signal(128 + number))
    try:
        # By its file: its package imports JAX, for nothing where the program starts again.
        package = importlib.util.find_spec("flax_resnet")
        if package and package.origin:
            memory = runpy.run_path(str(Path(package.origin).with_name("memory.py")))
            memory["restart_with_memory_kept"]()
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        end_by_signal(128 + signal.SIGINT)
