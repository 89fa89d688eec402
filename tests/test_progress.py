"""The bar of a terminal, and the plain lines elsewhere."""

import contextlib
import io
import logging
import sys

import pytest
from absl import logging as absl_logging

from flax_resnet import progress
from flax_resnet.progress import bar, quietly, say, warn


class Terminal(io.StringIO):
    def isatty(self):
        return True


def run(images=10):
    with contextlib.closing(progress.Progress(3, 300, 100)) as shown:
        for _ in range(images):
            shown.step(2, 10, 0.5, 0.25)
        say("a line")
        return shown.time_left()


def test_level_of_jax_that_is_set_stays(monkeypatch):
    logger = logging.getLogger("jax")
    for level, expected in ((logging.NOTSET, logging.WARNING), (logging.DEBUG, logging.DEBUG)):
        monkeypatch.setattr(logger, "level", level)
        progress.hush_libraries(absl_logging.ERROR)
        assert logger.level == expected


def test_plain_lines_come_once_a_minute(monkeypatch, capsys):
    seconds = iter(range(0, 10_000, 4))  # four seconds pass at every look at the clock
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(seconds))
    run(images=20)
    *lines, last = capsys.readouterr().err.splitlines()
    assert last == "a line"
    assert len(lines) == 1
    assert lines[0].startswith("epoch 2/3, loss 0.5000, accuracy 25.00%, ")
    assert "images/s" in lines[0]
    assert "left" in lines[0]


def test_time_left_goes_by_the_speed_of_this_start(monkeypatch):
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with contextlib.closing(progress.Progress(3, 300, 100)) as shown:
        assert shown.time_left() == "?"
        now = 50.0
        shown.step(2, 10, 0.5, 0.25)  # with what is done once
        assert shown.time_left() == "?"
        now = 70.0
        shown.step(2, 40, 0.5, 0.25)
        assert shown.time_left() == "01:15"
        shown.evaluating(2)
        now = 100.0
        shown.evaluated()  # with what is done once, too
        assert shown.time_left() == "01:15"
        shown.evaluating(2)
        now = 120.0
        shown.evaluated()
        assert shown.time_left() == "02:30"


def test_time_has_a_unit():
    seconds = (0.4, 59.6, 3599, 3600, 5e6)
    assert list(map(progress.duration, seconds)) == [
        *("0 s", "1 min 0 s", "59 min 59 s", "1 h 0 min", "1,388 h 53 min")
    ]


@pytest.mark.parametrize(("columns", "has_bar"), [(60, False), (89, False), (90, True)])
def test_narrow_terminal_has_loss_and_accuracy(monkeypatch, columns, has_bar):
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("tqdm.std._screen_shape_wrapper", lambda: lambda file: (columns, 24))
    run()
    last = stderr.getvalue().rpartition("accuracy")[0].rpartition("\r")[2]
    shown = [line for line in stderr.getvalue().split("\r") if "left" in line]
    assert last == "epoch 2/3, loss 0.5000, "
    assert all("loss 0.5000, accuracy 25.00%" in line for line in shown)
    assert all(("|" in line) == has_bar for line in shown)
    assert all(len(line.rstrip()) <= columns for line in shown)


@pytest.mark.parametrize("terminal", [True, False])
def test_only_a_terminal_gets_a_bar(monkeypatch, terminal):
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    run()
    written = stderr.getvalue()
    assert ("\r" in written) == terminal
    if terminal:
        for part in ("epoch 2/3", "loss 0.5000, accuracy 25.00%", "images/s"):
            assert part in written
    assert "a line\n" in written


class Broken(io.StringIO):
    def write(self, text):
        raise OSError("no space left on device")


@pytest.mark.parametrize("kind", ["closed", "closed by Python", "full"])
def test_work_goes_on_without_standard_error(monkeypatch, capsys, kind):
    stderr = Broken() if kind == "full" else io.StringIO()
    stderr.close() if kind == "closed by Python" else None
    monkeypatch.setattr(sys, "stderr", None if kind == "closed" else stderr)
    run()
    assert list(bar("abc", 3, "reading")) == ["a", "b", "c"]
    warn("a warning")
    assert capsys.readouterr().out == ""  # where tqdm would write instead


@pytest.mark.parametrize("terminal", [True, False])
def test_quiet_keeps_warnings(monkeypatch, terminal):
    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with quietly():
        run()
        assert list(bar("abc", 3, "reading")) == ["a", "b", "c"]
        assert stderr.getvalue() == ""
        warn("a warning")
    say("another line")
    assert stderr.getvalue() == "a warning\nanother line\n"
