"""What the programs that look at a run have in common: command line, quiet mode, exit codes."""

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import logging

from flax_resnet.errors import InputError, memory_errors, one_line
from flax_resnet.progress import hush_libraries, quietly
from flax_resnet.training.compilation import keep_compiled_programs


class Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with the command line, and exits with code 2."""

    def __init__(self, module: str, description: str):
        super().__init__(
            prog=f"python -m flax_resnet.{module}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        self.add_argument(
            "--quiet", action="store_true", help="say nothing of progress on standard error"
        )

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {one_line(message)}; --help tells more\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        with contextlib.suppress(OSError):  # the exit code tells it too
            super()._print_message(message, file)


def run_program(
    parser: Parser,
    main: Callable[[argparse.Namespace], int],
    arguments: Sequence[str] | None = None,
) -> NoReturn:
    """Parses the command line, and exits with what `main` returns, or 2 after an InputError."""
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    options = parser.parse_args(arguments)
    hush_libraries(logging.ERROR)
    # By default JAX takes most of a GPU's memory, and a run may be at work on it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    keep_compiled_programs()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        with quietly(options.quiet), memory_errors("perhaps another program uses the device"):
            code = main(options)
        sys.stdout.flush()
    except InputError as error:
        parser.exit(2, f"{parser.prog}: {one_line(error)}\n")
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BrokenPipeError:  # as of `... | head`
        _let_go_of_output()
        code = 128 + signal.SIGPIPE
    except OSError as error:  # of a full disk
        _let_go_of_output()
        parser.exit(2, f"{parser.prog}: {one_line(error)}\n")
    sys.exit(code)


def _let_go_of_output() -> None:
    """Turns standard output to /dev/null, or Python would try to write again at its exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
