"""Several processes as one run, on the loopback address."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet.training import hosts
from flax_resnet.training.mesh import make_mesh

ROOT = Path(__file__).parents[2]
# An epoch is one step, so that the lines of metrics.jsonl are the loss curve. The batch is
# large and the rate small, because training multiplies what float32 rounds: with 64 images
# and 0.02 two correct programs are 1e-7 apart at first and 1e-4 after ten steps.
RUN = (
    "--config=configs/digits_resnet8.py",
    "--config.train_split=train[:256]",
    "--config.batch_size=256",
    "--config.eval_split=test[:37]",
    "--config.eval_batch_size=16",
    "--config.num_epochs=10",
    "--config.warmup_epochs=5",
    "--config.learning_rate=0.005",
)


def start(workdir, digits_dir, *arguments):
    environment = os.environ | {"TFDS_DATA_DIR": str(digits_dir)}
    command = [sys.executable, ROOT / "train.py", *RUN, f"--workdir={workdir}", *arguments]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stderr


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def alone(digits_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    finish(start(folder, digits_dir))
    return read_metrics(folder)


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def start_two(workdir, digits_dir, *arguments):
    meet = (f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2")
    return [start(workdir, digits_dir, *arguments, *meet, f"--process_id={i}") for i in range(2)]


@pytest.mark.slow
def test_two_processes_stop_at_a_signal_to_one_and_train_like_one(alone, digits_dir, tmp_path):
    feed = ("--config.data_feed=stream", "--config.stream_workers=0")
    processes = start_two(tmp_path, digits_dir, *feed)
    assert processes[0].stderr
    for line in processes[0].stderr:
        if line.startswith("epoch 1/"):
            processes[0].send_signal(signal.SIGINT)
            break
    said = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [130, 143], said
    assert "stopped after step" in said[0]

    # They go on with data that lies on the devices.
    said += [finish(process) for process in start_two(tmp_path, digits_dir)]
    assert not any("Traceback" in text for text in said)
    assert "on 2 x cpu on 2 hosts" in said[2]
    assert "epoch" not in said[3]  # one speaks for both
    assert re.search(r"10 epochs, [1-9] of them done", said[2]), said[2]
    assert_same_losses(read_metrics(tmp_path), alone)


def assert_same_losses(together, alone):
    assert [record["step"] for record in together] == list(range(1, 11))
    for name in ("train_loss", "test_loss"):
        ours, expected = ([record[name] for record in run] for run in (together, alone))
        np.testing.assert_allclose(ours, expected, rtol=1e-4)
    for record in together:  # of 37 images, in batches of 16
        correct = record["test_accuracy"] * 37
        assert correct == pytest.approx(round(correct))


def command_with(limit):
    """A run in which that limit of `hosts` is one second."""
    script = f"""
        import runpy, sys
        from flax_resnet.training import hosts

        hosts.{limit} = 1
        sys.argv = sys.argv[1:]
        runpy.run_path("train.py", run_name="__main__")
    """
    return [sys.executable, "-c", textwrap.dedent(script), "train.py", *RUN]


@pytest.mark.slow
def test_a_folder_that_the_hosts_do_not_share(digits_dir, tmp_path):
    meet = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2"]
    processes = [
        subprocess.Popen(
            [
                *(*command_with("_SECONDS_TO_SEE"), *meet),
                *(f"--process_id={i}", f"--workdir={tmp_path / str(i)}"),
            ],
            cwd=ROOT,
            env=os.environ | {"TFDS_DATA_DIR": str(digits_dir)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    said = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [2, 2], said
    assert all("not all hosts see the same workdir" in text for text in said)
    assert not (tmp_path / "1").exists()


def no_host(name, *arguments, **options):
    raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1", 2, None), "go together: give all three"),
        ((None, None, 0), "go together: give all three"),
        (("127.0.0.1", 2, 0), "coordinator is HOST:PORT, not '127.0.0.1'"),
        (("host:port", 2, 0), "coordinator is HOST:PORT, not 'host:port'"),
        (("127.0.0.1:0", 2, 0), "coordinator is HOST:PORT, not '127.0.0.1:0'"),
        (("127.0.0.1:70000", 2, 1), "coordinator is HOST:PORT, not '127.0.0.1:70000'"),
        (("no.such.host.invalid:1", 2, 1), "no.such.host.invalid is no host: "),
        (("127.0.0.1:1", 2, 2), "process_id must be from 0 to num_processes - 1 = 1, not 2"),
        (("127.0.0.1:1", 0, 0), "process_id must be from 0"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, message, monkeypatch):
    monkeypatch.setattr(hosts.socket, "getaddrinfo", no_host)
    with pytest.raises(fr.InputError, match=message):
        hosts.connect(*arguments)


def test_a_coordinator_that_is_not_there(monkeypatch):
    monkeypatch.setattr(hosts, "_SECONDS_TO_MEET", 0.5)
    with pytest.raises(fr.InputError, match=r"no process 0 at 127\.0\.0\.1:1: "):
        hosts.connect("127.0.0.1:1", 2, 1)


def test_a_port_that_is_taken():
    with (
        socket.create_server(("", 0)) as taken,
        pytest.raises(fr.InputError, match=r"cannot listen on port .*: Address already in use; na"),
    ):
        hosts.connect(f"127.0.0.1:{taken.getsockname()[1]}", 2, 0)


def test_a_port_on_which_another_program_listens(monkeypatch):
    monkeypatch.setattr(hosts, "_SECONDS_TO_MEET", 0.5)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: time.sleep(2))
    with (
        socket.create_server(("127.0.0.1", 0)) as other,
        pytest.raises(fr.InputError, match=r"of this run did not meet in 0\.5 s: are all started"),
    ):
        hosts.connect(f"127.0.0.1:{other.getsockname()[1]}", 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_it_waits_for_the_others(digits_dir, tmp_path, number, code):
    port = free_port()
    meet = (f"--coordinator=127.0.0.1:{port}", "--num_processes=2", "--process_id=0")
    process = start(tmp_path, digits_dir, *meet)
    while process.poll() is None:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port)).close()
            break
        time.sleep(0.1)
    time.sleep(1)  # so that it waits, where it has only looked whether the port is free
    process.send_signal(number)
    _, said = process.communicate(timeout=10)
    assert (process.returncode, said) == (code, "")


@pytest.mark.slow
def test_partners_that_do_not_come(digits_dir, tmp_path):
    meet = [f"--coordinator=127.0.0.1:{free_port()}", "--num_processes=2", "--process_id=0"]
    command = [*command_with("_SECONDS_TO_MEET"), *meet]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr.count("\n")) == (2, 1), result.stderr
    assert "the processes of this run did not meet in 1 s" in result.stderr


@pytest.mark.parametrize("cluster", ["SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"])
def test_a_process_that_is_alone_in_its_cluster_takes_all_devices(monkeypatch, cluster):
    def initialize(*_, **__):
        raise AssertionError("JAX would take the first GPU alone")

    monkeypatch.setenv(cluster, "1")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    assert hosts.connect() == 1


def test_open_mpi_that_jax_does_not_find(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(fr.InputError, match=r"other processes of Open MPI: give --coordinator"):
        hosts.connect()


@pytest.mark.parametrize(("visible", "ids"), [("3", [0]), ("2,3", None), (None, None)])
def test_task_that_slurm_shows_one_gpu(monkeypatch, visible, ids):
    given = []
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(jax.distributed, "initialize", lambda *values, **_: given.extend(values))
    hosts.connect()
    assert given == [None, None, None, ids]


def test_hosts_with_different_numbers_of_devices():
    devices = [SimpleNamespace(process_index=i) for i in (0, 1, 1)]
    with pytest.raises(fr.InputError, match="the hosts have 1, 2 devices: JAX wants as many on"):
        make_mesh(6, devices=devices)


def test_what_is_given_is_not_asked_of_the_cluster(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **options: given.update(options))
    hosts.connect("127.0.0.1:1", 1, 0)
    assert given["cluster_detection_method"] == "deactivate"


@pytest.mark.parametrize(("process", "order"), [(0, ["call", "wait"]), (1, ["wait", "call"])])
def test_the_first_host_is_first(monkeypatch, process, order):
    done = []

    def wait(**_):
        done.append("wait")

    monkeypatch.setattr(jax, "process_index", lambda: process)
    monkeypatch.setattr(hosts.ocp.multihost, "get_barrier_sync_fn", lambda: wait)
    hosts.first_host_first("alone", lambda: done.append("call"))
    assert done == order
