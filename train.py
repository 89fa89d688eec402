"""Trains a model, or goes on with the run that the workdir holds.

    python train.py --config configs/cifar_resnet18.py [--workdir DIR]
        [--config.KEY=VALUE ...]

Every key of the config can be set, e.g. --config.batch_size=256, and
--config.KEY=None takes back one that may be None. A tuple is quoted:
--config.decay_at="(0.5, 0.75)". A field of the model is
--config.model_fields.FIELD=VALUE. --help lists all keys with their meaning. Of
num_epochs and num_steps the last on the command line is the length. Ctrl-C
stops a run after the step at hand, and the same command with its --workdir
goes on. Exits with 2 and one line on standard error where the input cannot be
used, with 1 where loss or gradient is not finite, and with 130 or 143 after a
signal.

On several hosts start it on each, with the same arguments: as it is on a TPU
pod or by Slurm's srun, elsewhere with --coordinator, --num_processes and
--process_id too.
"""

import ast
import atexit
import contextlib
import gc
import importlib.util
import itertools
import os
import re
import runpy
import signal
import stat
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn


def end_by_signal(number: int, *_: object) -> NoReturn:
    """Ends the program without waiting for what still runs in other threads."""
    os._exit(128 + number)


if __name__ == "__main__":  # before the imports that take a while
    gc.disable()  # all that they make stays
    signal.signal(signal.SIGINT, end_by_signal)
    signal.signal(signal.SIGTERM, end_by_signal)

from absl import app, flags, logging  # noqa: E402
from ml_collections import ConfigDict, config_flags  # noqa: E402

# Where config_flags looks for --config.KEY: the command line, of which `parse_flags` takes out
# what it does not know.
_ARGUMENTS: list[str] = []

_CONFIG = config_flags.DEFINE_config_file(
    "config", help_string="The recipe, e.g. configs/digits_resnet8.py.", sys_argv=_ARGUMENTS
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

    gc.freeze()  # not to be looked through while the run makes its programs
    gc.enable()
    hush_libraries(logging.FATAL)  # they tell of an error before they raise it
    reuse_memory()
    recipe = Path(config_flags.get_config_filename(flags.FLAGS["config"])).stem
    workdir = _WORKDIR.value or f"runs/{recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    try:
        processes = connect(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
    except InputError as error:
        say_why(error)
        os._exit(2)  # else JAX would tell at length of what it takes back
    try:
        if processes > 1 and not _WORKDIR.value:
            fail("several processes need a --workdir that all of them see")
        signal.signal(signal.SIGINT, signal.default_int_handler)  # to take back what is half done
        with quietly(_QUIET.value):
            settle_length(_CONFIG.value)
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


def settle_length(config: ConfigDict) -> None:
    """Lets num_epochs, where the command line gives it last, be the length, and says so."""
    from flax_resnet.progress import say

    keys = [key for _, key, _ in overrides_in(_ARGUMENTS) if key in ("num_epochs", "num_steps")]
    if keys[-1:] == ["num_epochs"] and config.get("num_steps") is not None:
        say(f"num_epochs={config.num_epochs} takes the place of num_steps={config.num_steps}")
        config.num_steps = None


# The command line.


def parse_flags(arguments: list[str]) -> list[str]:
    """Parses the command line; the config file runs here, so anything can go wrong."""
    if {"-h", "--help", "--helpshort", "--helpfull"} & set(arguments):
        print(help_text())
        sys.exit(0)
    try:
        _ARGUMENTS[:] = arguments
        check_flagfiles(arguments)
        _ARGUMENTS[:] = flags.FLAGS.read_flags_from_files(arguments, force_gnu=False)
        check_recipe(_ARGUMENTS)
        unset = take_unset(_ARGUMENTS)
        rest = flags.FLAGS(_ARGUMENTS)
        list(_CONFIG.value)  # raises if it could not be read
        for key in unset:
            *folder, name = key.split(".")
            place = _CONFIG.value[folder[0]] if folder else _CONFIG.value
            with place.unlocked():
                place[name] = None
    except Exception as error:
        # That is the first problem alone; each --config.KEY=VALUE parsed by itself shows all.
        fail("; ".join(problems_of_overrides(_ARGUMENTS)) or describe(error))
    if len(rest) > 1:
        fail(f"what is {rest[1]!r}? Options begin with --")
    return rest


def check_flagfiles(arguments: list[str]) -> None:
    """Raises a flags.Error for a device, of which absl would read without end."""
    for name in map(os.path.expanduser, filter(None, values_of("flagfile", arguments))):
        if os.path.exists(name) and stat.S_ISCHR(os.stat(name).st_mode):
            raise flags.Error(f"--flagfile={name} is not a file")


def check_recipe(arguments: list[str]) -> None:
    """Raises a flags.Error where the command line names no recipe that is there."""
    name = recipe_in(arguments)
    if name is None:
        first = arguments[1] if arguments[1:] else "-"
        if first.endswith(".py"):
            raise flags.Error(f"did you mean --config {first}?")
        if not first.startswith("-"):
            raise flags.Error(f"what is {first!r}? Options begin with --")
        raise flags.Error("name a recipe, e.g. --config configs/digits_resnet8.py")
    path = name.split(":")[0]
    if not os.path.isfile(path):
        known = ", ".join(map(str, recipes()))
        raise flags.Error(f"there is no recipe {path or repr(path)}; the recipes are: {known}")


def recipe_in(arguments: list[str]) -> str | None:
    """What stands for --config; the last of several counts."""
    return [None, *values_of("config", arguments)][-1]


def values_of(flag: str, arguments: list[str]) -> Iterator[str | None]:
    """What stands for a flag, each time that it is given."""
    for one, following in itertools.pairwise([*arguments, "-"]):
        if match := re.fullmatch(f"--?{flag}(=(.*))?", one, re.DOTALL):
            yield match[2] if match[1] else None if following.startswith("-") else following


def recipes() -> list[Path]:
    """Those that come with this program, as one may name them from here."""
    folder = Path(__file__).with_name("configs")
    return sorted(Path(os.path.relpath(path)) for path in folder.glob("*.py"))


def overrides_in(arguments: list[str]) -> list[tuple[int, str, list[str]]]:
    """Of every --config.KEY=VALUE, --config.KEY VALUE and --noconfig.KEY: place, KEY, words."""
    found = []
    for place, (one, following) in enumerate(itertools.pairwise([*arguments, "-"])):
        if match := re.match("--?(no)?config[.]([^=]*)(=?)", one):
            alone = match[1] or match[3] or following.startswith("-")
            found.append((place, match[2], [one] if alone else [one, following]))
    return found


def take_unset(arguments: list[str]) -> list[str]:
    """Takes every KEY=None out of the command line, of keys that may be None.

    Returns:
      The keys of which that is the last word.
    """
    from flax_resnet.training import default_config

    defaults = default_config()
    optional = {key for key, value in defaults.items() if value is None}
    optional |= {f"model_fields.{name}" for name in defaults.model_fields}
    is_unset = {}
    for place, key, words in reversed(overrides_in(arguments)):
        value = words[0].partition("=")[2] if len(words) == 1 else words[1]
        is_none = key in optional and value == "None"
        is_unset.setdefault(key, is_none)
        if is_none:
            del arguments[place : place + len(words)]
    return [key for key, unset in is_unset.items() if unset]


def problems_of_overrides(arguments: list[str]) -> list[str]:
    """What is wrong with each --config.KEY=VALUE; nothing where the recipe itself is no good."""
    from flax_resnet.training import default_config

    recipe = f"--config={recipe_in(arguments)}"
    try:
        config = read_recipe([arguments[0], recipe])
    except Exception:
        return []
    if not isinstance(config, ConfigDict) or set(default_config()) - set(config):
        return [f"get_config() of {recipe_in(arguments)} has to return default_config(), changed"]
    problems = []
    for _, key, words in overrides_in(arguments):
        try:
            check_key(config, key)
            read_recipe([arguments[0], recipe, *words])
        except Exception as error:
            problems.append(describe(error))
    return list(dict.fromkeys(problems))


def read_recipe(arguments: list[str]) -> Any:
    """The config of a command line."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=arguments)
    values(arguments)
    config: Any = values["config"].value
    list(config)  # raises if it could not be read
    return config


def check_key(config: Any, key: str) -> None:
    """Raises a flags.Error where a config has no such key, with the one that may be meant."""
    from flax_resnet.training.config import near_key, refused_fields

    for name in key.split("."):
        if not isinstance(config, ConfigDict):
            raise flags.Error(f"unknown config key {key!r}")
        if name not in config:
            if key.startswith("model_fields.") and (refused := refused_fields([name])):
                raise flags.Error(refused)
            raise flags.Error(f"unknown config key {key!r}{near_key(name, list(config))}")
        config = config[name]


# How absl begins to say that a value is no such thing.
_KINDS = {
    "invalid literal for int": "a whole number",
    "could not convert string to float": "a number",
    "Non-boolean argument": "True or False",
}


def describe(error: Exception) -> str:
    """What is wrong with the command line or the recipe."""
    if isinstance(error, AttributeError):  # ml_collections: no such key, and perhaps a near one
        names = [repr(name) for name in re.findall(r'(?<=["\'])\w+(?=\W)', str(error))]
        hint = f": did you mean {names[1]}?" if len(names) > 1 else ""
        return f"unknown config key {names[0]}{hint}" if names else f"AttributeError: {error}"
    if match := re.fullmatch(r"flag --config\.(.+?)=(.*?): (.*)", str(error), re.DOTALL):
        kind = next((kind for sign, kind in _KINDS.items() if sign in match[3]), None)
        if kind:
            return f"{match[1]} must be {kind}, not {match[2]!r}"
    if isinstance(error, flags.UnrecognizedFlagError):
        from flax_resnet.training import default_config

        if error.flagname in default_config():
            return f"unknown option --{error.flagname}: did you mean --config.{error.flagname}?"
    if "Traceback (most recent call last)" in str(error):  # of the recipe, by ml_collections
        return str(error).rstrip().rpartition("\n")[2]
    return str(error) if isinstance(error, flags.Error) else f"{type(error).__name__}: {error}"


def help_text() -> str:
    """All that the command line takes, without a look into what takes seconds to import."""
    listed = [(path, ast.get_docstring(ast.parse(path.read_text())) or "") for path in recipes()]
    package = importlib.util.find_spec("flax_resnet")
    assert package
    assert package.origin
    source = Path(package.origin).with_name("training").joinpath("config.py").read_text()
    (config,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "Config"
    )
    keys = source.splitlines()[config.body[0].end_lineno : config.end_lineno]
    return "\n".join(
        [
            f"{__doc__}",
            flags.FLAGS.main_module_help(),
            "",
            "Recipes:",
            *(
                textwrap.fill(
                    f"{path}: {text.partition(chr(10))[0]}",
                    width=79,
                    initial_indent="  ",
                    subsequent_indent="      ",
                    break_on_hyphens=False,
                )
                for path, text in listed
            ),
            "",
            "Keys of the config, with their types and defaults, each as --config.KEY=VALUE:",
            *keys,
        ]
    )


def say_why(error: object) -> None:
    """Writes one line on standard error."""
    from flax_resnet.errors import one_line

    with contextlib.suppress(OSError):  # the exit code tells it too
        print("train.py:", one_line(error), file=sys.stderr)


def fail(error: object, code: int = 2) -> NoReturn:
    """Ends the program with one line on standard error."""
    say_why(error)
    sys.exit(code)


# Standard error.


def open_closed_streams() -> None:
    """Opens closed standard streams on /dev/null.

    Otherwise the next file would get their number, and what C++ writes to standard error would
    be written into it.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def let_go_of_standard_error() -> None:
    """What could not be written is no reason for another exit code."""
    try:
        sys.stderr.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)


if __name__ == "__main__":
    open_closed_streams()
    atexit.register(let_go_of_standard_error)
    try:
        # By its file: its package imports JAX, for nothing where the program starts again.
        package = importlib.util.find_spec("flax_resnet")
        if package and package.origin:
            memory = runpy.run_path(str(Path(package.origin).with_name("memory.py")))
            memory["restart_with_memory_kept"]()
        app.run(main, flags_parser=parse_flags)
    except KeyboardInterrupt:
        end_by_signal(signal.SIGINT)
