"""SIGTERM and SIGINT as a question that a run asks itself between steps."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import NoReturn

import jax
from jax.experimental import multihost_utils


class Signals:
    """While it is open, SIGTERM and the first SIGINT only ask the run to stop.

    A second SIGINT ends the process at once. Opened again, it knows what it was asked before. On
    several hosts all are asked to stop at the same step when one of them gets a signal: JAX
    passes the notice of a preemption on. Outside of the main thread Python has no signals, and
    this does nothing.
    """

    def __init__(self):
        self._received: signal.Signals | None = None
        self._asked, self._answer = 0, False
        self._before = {}

    def __enter__(self) -> "Signals":
        if threading.current_thread() is threading.main_thread():
            several = jax.process_count() > 1  # there SIGTERM is JAX's
            for number in (signal.SIGINT,) if several else (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or signal.Signals(number)
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if jax.process_count() > 1:
                os.kill(os.getpid(), signal.SIGTERM)

    @property
    def name(self) -> str:
        """Of the signal that was received."""
        return (self._received or signal.SIGTERM).name

    def ask(self) -> bool:
        """Whether to stop; every host asks equally often, and all have the same answer."""
        self._asked += 1
        if jax.process_count() == 1:
            return self._received is not None
        # JAX says yes once.
        self._answer = self._answer or multihost_utils.reached_preemption_sync_point(self._asked)
        return self._answer

    def stop(self) -> NoReturn:
        """Ends the program, or what the library's user makes of these exceptions.

        Raises:
          KeyboardInterrupt: after SIGINT; its message tells it from one that came unasked.
          SystemExit: with code 143 after SIGTERM.
        """
        if self._received is signal.SIGINT:
            raise KeyboardInterrupt("stopped")
        sys.exit(128 + signal.SIGTERM)
