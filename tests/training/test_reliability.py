"""What happens to a run that is stopped, killed, damaged or led astray."""

import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet.data import epoch_order
from flax_resnet.progress import Progress
from flax_resnet.training import (
    check_config,
    checkpoint,
    checkpoint_files,
    feeds,
    files,
    launch,
    loop,
    programs,
    writers,
)
from flax_resnet.training.history import History
from flax_resnet.training.loop import Loop
from tests.training.plans import planned
from tests.training.test_train import (
    changed,
    read_metrics,
    steps_kept,
    train_until,
    without_timing,
)

ROOT = Path(__file__).parents[2]
RECORD = (
    *("epoch", "step", "train_loss", "train_accuracy", "images_per_second", "seconds"),
    *("test_loss", "test_accuracy", "learning_rate"),
)


def assert_same_run(state, folder, finished):
    chex.assert_trees_all_equal(jax.device_get(state), jax.device_get(finished[1]))
    assert without_timing(read_metrics(folder)) == without_timing(read_metrics(finished[0]))


def as_json(config):
    return json.dumps(dataclasses.asdict(check_config(config)))


# Signals.


@pytest.mark.parametrize(
    ("number", "step", "data_feed"),
    [
        (signal.SIGINT, 3, "resident"),
        (signal.SIGTERM, 12, "resident"),
        (signal.SIGINT, 16, "resident"),
        (signal.SIGTERM, 32, "stream"),
    ],
    ids=["first epoch", "epoch", "evaluation", "last evaluation"],
)
def test_signal_loses_nothing(
    finished, config, tmp_path, monkeypatch, capsys, number, step, data_feed
):
    config = changed(config, data_feed=data_feed, stream_workers=0)
    stops = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    steps = 0

    def raise_signal(self, *arguments):
        nonlocal steps
        steps += 1
        if steps == step:
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(Progress, "step", raise_signal)
        with pytest.raises(stops) as stopped:
            fr.train(config, tmp_path)
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    if number == signal.SIGTERM:
        assert stopped.value.args == (143,)
    assert f"{signal.Signals(number).name}: stopped after step" in capsys.readouterr().err
    # One step more may have been on its way.
    assert steps_kept(tmp_path)[-1] in (step, step + 1)
    assert_same_run(fr.train(config, tmp_path), tmp_path, finished)


def test_stopped_run_knows_how_long_it_took(config, tmp_path, monkeypatch):
    """Though its steps are so slow that none is on its way while another ends."""
    monkeypatch.setattr(loop, "_SECONDS_OF_A_SLOW_CALL", 0.0)
    times = []

    def stop(*_):
        times.append(time.perf_counter())
        if len(times) == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "step", stop)
    with pytest.raises(SystemExit):
        fr.train(config, tmp_path)
    history = checkpoint_files.read_history(checkpoint_files.choose_checkpoint(tmp_path, "newest"))
    assert history["seconds"] >= times[2] - times[0]


SMALL = ("--config.train_split=train[:128]", "--config.eval_split=test[:32]")


@pytest.fixture
def program(digits_dir, tmp_path):
    """Starts train.py on the digits."""

    def start(*arguments):
        command = [sys.executable, "train.py", "--config=configs/digits_resnet8.py"]
        command += [f"--config.data_dir={digits_dir}", f"--workdir={tmp_path}/run", *arguments]
        return subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    return start


@pytest.mark.parametrize(
    ("signals", "codes"),
    [
        ([signal.SIGTERM], (143,)),
        pytest.param([signal.SIGINT], (130,), marks=pytest.mark.slow),
        ([signal.SIGINT, signal.SIGINT], (130, -signal.SIGINT)),  # the same in a shell
    ],
    ids=["SIGTERM", "SIGINT", "SIGINT twice"],
)
@pytest.mark.parametrize(
    "begun",
    [True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["training", "compiling"],
)
def test_signal_ends_the_program(program, begun, signals, codes):
    with program("--config.num_epochs=1000") as process:
        for line in process.stderr:
            if line.startswith("epoch 1/" if begun else "cifar_resnet8 on"):
                break
        sent = time.monotonic()
        for number in signals:
            process.send_signal(number)
        rest = process.stderr.read()
    assert time.monotonic() - sent < 60  # of a busy machine
    assert process.returncode in codes
    assert "Traceback" not in rest


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_to_the_group_leaves_the_readers(program, number):
    with program(*SMALL, "--config.data_feed=stream", "--config.stream_workers=1") as process:
        for line in process.stderr:
            if line.startswith("epoch 1/"):
                break
        os.killpg(process.pid, number)
        rest = process.stderr.read()
    assert process.returncode == (143 if number == signal.SIGTERM else 130)
    assert f"{number.name}: stopped after step" in rest
    assert "Traceback" not in rest


def test_signal_in_a_step_that_is_not_finite(config, tmp_path, monkeypatch, capsys):
    check_finite = Loop._check_finite

    def signalled(self, metrics, first):
        if first == 10:
            os.kill(os.getpid(), signal.SIGTERM)
            metrics = metrics | {"loss": np.full_like(metrics["loss"], np.nan)}
        check_finite(self, metrics, first)

    monkeypatch.setattr(Loop, "_check_finite", signalled)
    with pytest.raises(SystemExit, match="143"):
        fr.train(changed(config, on_nan="rollback"), tmp_path)
    assert "checkpoints/8; SIGTERM: stopped" in capsys.readouterr().err
    assert steps_kept(tmp_path) == [8]


def test_signal_while_the_last_checkpoint_is_written(config, tmp_path, monkeypatch, finished):
    finish = checkpoint.Checkpoints.finish

    def signalled(self):
        os.kill(os.getpid(), signal.SIGTERM)
        finish(self)

    monkeypatch.setattr(checkpoint.Checkpoints, "finish", signalled)
    with pytest.raises(SystemExit, match="143"):
        fr.train(config, tmp_path)
    monkeypatch.undo()
    assert_same_run(fr.train(config, tmp_path), tmp_path, finished)


@pytest.fixture
def stopped_in_evaluation(config, tmp_path, monkeypatch):
    """A run stopped in its second evaluation."""
    evaluations, evaluate = 0, feeds._mean

    def signalled(sums, stop):
        nonlocal evaluations
        evaluations += 1
        if evaluations == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(sums, stop)

    with monkeypatch.context() as patch:
        patch.setattr(feeds, "_mean", signalled)
        with pytest.raises(SystemExit):
            fr.train(config, tmp_path)
    assert steps_kept(tmp_path) == [8, 16]
    return tmp_path


def test_checkpoint_stays_until_its_replacement_is_written(
    stopped_in_evaluation, config, finished, monkeypatch
):
    folder = stopped_in_evaluation

    def fail(_):
        assert (folder / "replaced" / "16").is_dir()
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Checkpoints, "_write_manifest", fail)
        with pytest.raises(fr.InputError, match=r"no space left .* the last one is .*/16"):
            fr.train(config, folder)
    assert checkpoint_files.damage_of(folder / "checkpoints" / "16") is None
    assert_same_run(fr.train(config, folder), folder, finished)
    assert not (folder / "replaced").exists()


@pytest.mark.parametrize("what_is_there", ["nothing", "damaged", "whole"])
def test_replaced_checkpoint_comes_back_where_it_is_needed(stopped, stopped_once, what_is_there):
    place, aside = stopped / "checkpoints" / "11", stopped / "replaced" / "11"
    shutil.copytree(place, aside)
    if what_is_there == "nothing":
        shutil.rmtree(place)
    elif what_is_there == "damaged":
        truncate(largest(place))
    checkpoint_files.put_back_replaced(stopped)
    assert checkpoint_files.damage_of(place) is None
    assert not aside.parent.exists()
    assert (stopped / "damaged").exists() == (what_is_there == "damaged")


# SIGKILL, in the middle of a checkpoint. benchmarks/faults.py kills at any moment.


@pytest.mark.parametrize("checkpoints", [pytest.param(1, marks=pytest.mark.slow), 3])
def test_kill_while_a_checkpoint_is_written(finished, config, tmp_path, checkpoints):
    script = textwrap.dedent("""
        import json, os, signal, sys
        import jax
        import flax_resnet as fr
        from flax_resnet.training import mesh
        from flax_resnet.training.checkpoint import Checkpoints

        # As conftest.py: one device of eight, whose threads it shares.
        jax.config.update("jax_num_cpu_devices", 8)
        mesh.find_devices = lambda **_: jax.devices()[:1]
        written, write = 0, Checkpoints._write_manifest
        def kill_in_the_middle(self):
            global written
            written += 1
            if written == int(sys.argv[3]):
                os.kill(os.getpid(), signal.SIGKILL)
            write(self)
        Checkpoints._write_manifest = kill_in_the_middle
        fr.train(json.loads(sys.argv[1]), sys.argv[2])
    """)
    arguments = [json.dumps(config.to_dict()), str(tmp_path), str(checkpoints)]
    killed = subprocess.run([sys.executable, "-c", script, *arguments], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert any((tmp_path / "checkpoints").glob("*tmp*"))
    assert_same_run(fr.train(config, tmp_path), tmp_path, finished)
    assert not any((tmp_path / "checkpoints").glob("*tmp*"))


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def parent_of(stat):
    try:
        return stat.read_text().rpartition(")")[2].split()[1]
    except OSError:  # it has ended meanwhile
        return None


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="processes are looked up in /proc")
def test_killed_run_leaves_no_process_behind(program):
    with program(*SMALL, "--config.data_feed=stream", "--config.stream_workers=1") as process:
        for line in process.stderr:
            if line.startswith("epoch 1/"):
                break
        parents = {path.parent.name: parent_of(path) for path in Path("/proc").glob("[0-9]*/stat")}
        children = [pid for pid, parent in parents.items() if parent == str(process.pid)]
        assert len(children) >= 2  # one that reads for training, and one for evaluation
        process.kill()
        process.stderr.read()
    deadline = time.monotonic() + 60
    while any(is_running(pid) for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)


# Damage.


@pytest.fixture(scope="module")
def stopped_once(config, tmp_path_factory):
    """A run with checkpoints after steps 8 and 11."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        train_until(11, config, folder, patch)
    assert steps_kept(folder) == [8, 11]
    return folder


@pytest.fixture
def stopped(stopped_once, tmp_path):
    """A copy of that run."""
    return shutil.copytree(stopped_once, tmp_path / "stopped")


def truncate(path):
    os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def largest(folder):
    return max(folder.rglob("*"), key=lambda path: path.is_file() * path.stat().st_size)


DAMAGE = {
    "truncated array": lambda folder: truncate(largest(folder)),
    "flipped bit": lambda folder: flip_a_bit(largest(folder)),
    "deleted array": lambda folder: largest(folder).unlink(),
    "deleted folder": lambda folder: shutil.rmtree(folder / "state"),
    "deleted history": lambda folder: (folder / "run" / "metadata").unlink(),
    "empty metrics": lambda folder: (folder / "metrics" / "metrics").write_text(""),
    "deleted manifest": lambda folder: (folder / "manifest.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_damaged_checkpoint_gives_way_to_the_one_before(stopped, damage):
    steps = steps_kept(stopped)
    damage(stopped / "checkpoints" / str(steps[-1]))
    said = checkpoint_files.set_damaged_aside(stopped)
    assert len(said) == 1
    assert f"checkpoint {steps[-1]} is damaged" in said[0]
    assert f"the newest sound one is {steps[-2]}" in said[0]
    assert steps_kept(stopped) == steps[:-1]
    assert (stopped / "damaged" / str(steps[-1])).is_dir()


def test_checkpoint_with_more_files_is_not_damaged(stopped, config, finished):
    for folder in ("", "state", "run"):
        (stopped / "checkpoints" / "11" / folder / ".DS_Store").write_bytes(b"Bud1")
    (stopped / "checkpoints" / ".DS_Store").write_bytes(b"Bud1")
    assert fr.load_run(stopped, "newest").step == 11
    assert_same_run(fr.train(config, stopped), stopped, finished)
    assert not (stopped / "damaged").exists()


def test_checkpoint_that_cannot_be_read_is_not_taken_for_damaged(stopped, monkeypatch):
    def fail(_):
        raise PermissionError("permission denied")

    monkeypatch.setattr(checkpoint_files, "_digests", fail)
    with pytest.raises(fr.InputError, match="cannot be read: permission denied"):
        checkpoint_files.set_damaged_aside(stopped)
    assert steps_kept(stopped) == [8, 11]


def test_damaged_checkpoints_of_one_step_lie_side_by_side(stopped, stopped_once):
    for _ in range(2):
        truncate(largest(stopped / "checkpoints" / "11"))
        checkpoint_files.set_damaged_aside(stopped)
        shutil.copytree(stopped_once / "checkpoints" / "11", stopped / "checkpoints" / "11")
    assert {path.name for path in (stopped / "damaged").iterdir()} == {"11", "11-2"}


def test_run_goes_on_from_the_checkpoint_before_a_damaged_one(stopped, config, finished, capfd):
    flip_a_bit(largest(stopped / "checkpoints" / "11"))
    assert_same_run(fr.train(config, stopped), stopped, finished)
    assert "checkpoint 11 is damaged" in capfd.readouterr().err


def test_run_without_a_sound_checkpoint_is_left_as_it_is(stopped, config):
    for step in steps_kept(stopped):
        truncate(largest(stopped / "checkpoints" / str(step)))
    before = sorted(stopped.rglob("*"))
    with pytest.raises(fr.InputError, match=r"no checkpoint in .* can be used: 8 \(state"):
        fr.train(config, stopped)
    assert sorted(stopped.rglob("*")) == before


def test_metrics_without_checkpoints_are_left_as_they_are(finished, config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(fr.InputError, match="lines of 4 epochs, but there is no checkpoint"):
        fr.train(config, copy)
    assert len(read_metrics(copy)) == 4


@pytest.mark.parametrize("content", [None, "", "{}\n" * 9], ids=["deleted", "empty", "other"])
def test_metrics_are_written_again_from_the_checkpoint(finished, config, tmp_path, content):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    expected = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").unlink()
    if content is not None:
        (copy / "metrics.jsonl").write_text(content)
    fr.train(config, copy)
    assert (copy / "metrics.jsonl").read_text() == expected


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model": "cifar_resnet20"},
            r"batch_stats.layer1_1.bn1.mean missing, expected float32\[16\]",
        ),
        (
            {"model_fields": {"widths": (16, 32, 48)}},
            r"batch_stats.layer3_0.bn1.mean float32\[64\], expected float32\[48\]",
        ),
    ],
)
def test_checkpoint_of_another_model_is_refused(finished, config, tmp_path, fields, message):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    other = changed(config, **fields)
    (copy / "config.json").write_text(as_json(other))
    with pytest.raises(fr.InputError, match=f"32 is of another model: {message}.*, and .. more"):
        fr.train(other, copy)
    assert steps_kept(copy) == steps_kept(finished[0])


def test_arrays_are_judged_before_they_are_restored(huge, config):
    with pytest.raises(fr.InputError) as error:
        fr.train(config, huge)
    assert str(error.value) == (
        f"checkpoint {huge / 'checkpoints' / '32'} is of another model: params.fc.kernel "
        "float32[1000000, 1000000], expected float32[64, 10]"
    )


HISTORIES = {
    "records that are none": {"records": [1]},
    "records in no list": {"records": {}},
    "a record of infinite digits": {"records": [dict.fromkeys(RECORD, 10**400)]},
    "a loss that is text": {"losses": ["0.5"]},
    "no seconds": {"seconds": None},
    "too many returns": {"rollbacks": 10**30},
}


@pytest.mark.parametrize("changes", HISTORIES.values(), ids=HISTORIES)
def test_history_that_no_run_writes(changes):
    sound = dataclasses.asdict(History(records=[dict.fromkeys(RECORD, 1)], losses=[0.5]))
    assert History.from_json(sound).losses == [0.5]
    with pytest.raises((ValueError, TypeError, OverflowError)):
        History.from_json(sound | changes)


def test_lines_beyond_any_size(finished, config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    (copy / "steps.jsonl").touch()
    os.truncate(copy / "steps.jsonl", 10**12)
    with pytest.raises(fr.InputError, match=r"steps.jsonl cannot be read: it has 1,000,000,000,00"):
        fr.train(config, copy)


# The folder.


def test_checkpoints_of_who_knows_what_run_are_refused(stopped, config):
    (stopped / "config.json").unlink()
    with pytest.raises(fr.InputError, match=r"checkpoints without the config\.json of their run"):
        fr.train(config, stopped)
    assert steps_kept(stopped) == [8, 11]


def test_curves_that_cannot_be_written_end_no_run(stopped, config, finished, monkeypatch, capsys):
    def fail(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(writers, "plot_curves", fail)
    assert_same_run(fr.train(config, stopped), stopped, finished)
    assert "there is no curves.png: no space left" in capsys.readouterr().err


def test_second_run_in_one_folder_is_refused(finished, config, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(finished[0], copy)
    with (
        files.locked(copy),
        pytest.raises(fr.InputError, match=r"another run is at work in .*copy"),
    ):
        fr.train(config, copy)
    fr.train(config, copy)


@pytest.mark.slow
def test_full_disk(tmp_path, digits_dir):
    if subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("no file system of its own for the test")
    script = """
        mount -t tmpfs -o size=1600k tmpfs "$0"
        "$@"; echo "exit code $?"
        mount -o remount,size=20m tmpfs "$0"
        "$@"; echo "exit code $?"
    """
    folder = tmp_path / "full"
    folder.mkdir()
    program = [sys.executable, "train.py", "--config=configs/digits_resnet8.py"]
    program += [f"--config.data_dir={digits_dir}", f"--workdir={folder}/run"]
    program += ["--config.train_split=train[:128]", "--config.warmup_epochs=1.0"]
    program += ["--config.num_epochs=4", "--config.keep_checkpoints=20"]
    result = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, str(folder), *program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.split("\n")[:2] == ["exit code 2", "exit code 0"], result.stderr
    assert "Traceback" not in result.stderr
    assert "there is no" not in result.stderr  # which would be a second line of the same
    # It is a checkpoint or another file of the run that finds no room.
    assert re.search(r"train.py: .* (be written to|write workdir) .*/full/run", result.stderr)
    # The second start goes on from the last checkpoint of the first.
    assert "0 of them done" not in result.stderr.split("train.py:")[1]


# A loss that is not finite.


def poison(monkeypatch, step, rollbacks_before_health, what="loss"):
    """Makes the loss, say, of a step NaN, as long as the run has gone back too seldom."""
    make_train_step = programs.make_train_step

    def make_poisoned(plan, rollbacks):
        healthy = make_train_step(plan, rollbacks)

        def poisoned(state, batch):
            new_state, metrics = healthy(state, batch)
            bad = (state.step == step - 1) & (rollbacks < rollbacks_before_health)
            return new_state, metrics | {what: jnp.where(bad, jnp.nan, metrics[what])}

        return poisoned

    monkeypatch.setattr(programs, "make_train_step", make_poisoned)


@pytest.fixture
def config_of_two_blocks(config):
    """A poisoned step is compiled for its test alone: of a net smaller than the others'."""
    small = {"layers": (1, 1), "widths": (16, 16), "strides": (1, 2)}
    return changed(config, model_fields=small)


def test_loss_that_is_not_finite_stops_the_run(config_of_two_blocks, tmp_path, monkeypatch):
    poison(monkeypatch, 19, 1)
    with pytest.raises(
        FloatingPointError,
        match=r"the loss is nan after step 19, in epoch 3, with a learning rate of 0\.0.*; "
        r"the last good checkpoint is .*/checkpoints/16",
    ):
        fr.train(config_of_two_blocks, tmp_path)


def test_rollback_goes_on_with_other_batches(finished, config, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 19, 2)
    state = fr.train(changed(config, on_nan="rollback"), tmp_path)
    assert int(state.step) == 32
    records, undisturbed = (without_timing(read_metrics(f)) for f in (tmp_path, finished[0]))
    assert [record["epoch"] for record in records] == [1, 2, 3, 4]
    assert records[:2] == undisturbed[:2]
    assert records[2]["train_loss"] != undisturbed[2]["train_loss"]
    assert capsys.readouterr().err.count("going back to it, and continuing with other batches") == 2
    run = json.loads((tmp_path / "checkpoints" / "32" / "run" / "metadata").read_text())
    assert run["rollbacks"] == 2


def test_gradient_that_is_not_finite_stops_the_run(config_of_two_blocks, tmp_path, monkeypatch):
    poison(monkeypatch, 3, 1, what="gradient_norm")
    with pytest.raises(FloatingPointError, match="the gradient norm is nan after step 3, in epo"):
        fr.train(config_of_two_blocks, tmp_path)


def test_test_loss_that_is_not_finite_stops_the_run(config, tmp_path, monkeypatch):
    monkeypatch.setattr(feeds, "_mean", lambda *_: {"loss": float("inf"), "accuracy": 0.1})
    with pytest.raises(FloatingPointError, match="the test loss is inf after step 8, in epoch 1"):
        fr.train(config, tmp_path)
    assert steps_kept(tmp_path) == []


def test_other_batches_after_a_rollback():
    """Another order and other crops for each return."""
    orders = [epoch_order(0, 1, 99, rollbacks).tolist() for rollbacks in range(3)]
    assert len(set(map(tuple, orders))) == 3
    config = check_config({"batch_size": 8})
    images = np.random.default_rng(0).integers(0, 256, (8, 6, 5, 3), dtype=np.uint8)
    crops = [
        np.asarray(programs.make_augment(planned(config), n)(images, np.arange(8), 0))
        for n in range(3)
    ]
    assert len({crop.tobytes() for crop in crops}) == 3


@pytest.mark.slow
def test_rollbacks_come_to_an_end(config_of_two_blocks, tmp_path, monkeypatch, capsys):
    poison(monkeypatch, 3, 99)
    monkeypatch.setattr(launch, "_MAX_ROLLBACKS", 1)
    with pytest.raises(FloatingPointError, match="there is no checkpoint before it"):
        fr.train(changed(config_of_two_blocks, on_nan="rollback"), tmp_path)
    assert capsys.readouterr().err.count("going back") == 1


def test_state_that_is_not_finite_is_not_kept(config_of_two_blocks, tmp_path, monkeypatch):
    make_train_step = programs.make_train_step

    def make_poisoned(*arguments):
        healthy = make_train_step(*arguments)

        def poisoned(state, batch):
            state, metrics = healthy(state, batch)
            # The momentum, which neither this step's loss nor the evaluation looks at.
            opt_state = jax.tree.map(
                lambda x: jnp.where(state.step == 16, jnp.nan, x) if x.ndim else x,
                state.opt_state,
            )
            return state.replace(opt_state=opt_state), metrics

        return poisoned

    monkeypatch.setattr(programs, "make_train_step", make_poisoned)
    with pytest.raises(FloatingPointError, match=r"not finite after step 16, .*/checkpoints/8"):
        fr.train(config_of_two_blocks, tmp_path)
    assert steps_kept(tmp_path) == [8]


def test_checkpoint_holds_all_that_a_run_is(finished, config):
    folder = finished[0] / "checkpoints" / "32"
    run = json.loads((folder / "run" / "metadata").read_text())
    assert (run["epoch"], run["seed"]) == (4, 0)
    assert run["records"] == read_metrics(finished[0])
    assert run["best"] in run["records"]
    assert run["config"] == json.loads(as_json(config))
    assert run["versions"]["jax"] == jax.__version__
