"""Several processes as one run, by `jax.distributed`."""

import contextlib
import functools
import os
import re
import secrets
import signal
import socket
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from flax_resnet.errors import InputError, short_reason

_SECONDS_TO_MEET = 120
_SECONDS_TO_PART = 30  # of one whose run has failed, and the others wait for it in a step
_SECONDS_TO_SEE = 60  # what another host has written to a disk of the network
_MILLISECONDS_TO_WAIT = 24 * 3600 * 1000  # for a data set to be downloaded and prepared

T = TypeVar("T")
Number = TypeVar("Number", bool, int)


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> int:
    """Joins the other processes of a run, before JAX is used for anything else.

    Args:
      coordinator: HOST:PORT of process 0. Without it JAX looks for a TPU pod, Slurm,
        Open MPI or Kubernetes around it, and where there is none, or one of a single process,
        this process is alone.
      num_processes: how many they are.
      process_id: which of them this is, from 0.

    Returns:
      How many processes there are.

    Raises:
      InputError: if only some of the three are given, they make no sense together, or the
        others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    detection = None
    if any(value is not None for value in given):
        detection = "deactivate"
        host, port = _parse_coordinator(*given)
        if process_id:
            _wait_for(host, port)
        else:
            _check_free(port)
    # Under these JAX would take the first of the GPUs alone.
    elif os.environ.get("OMPI_COMM_WORLD_SIZE", os.environ.get("SLURM_NTASKS")) == "1":
        return 1
    devices, visible = None, os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if detection is None and visible and "," not in visible:
        devices = [0]  # Slurm shows this task one GPU; JAX would look for it among many
    try:
        _meet(*given, devices, cluster_detection_method=detection)
    except InputError:
        raise
    except Exception as error:  # of JAX, and of what tells it of the cluster around it
        if coordinator is None and isinstance(error, ValueError):
            # JAX found nothing around it that would tell it the three.
            if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
                raise InputError(
                    "this JAX does not find the other processes of Open MPI: give "
                    "--coordinator=HOST:PORT --num_processes=$OMPI_COMM_WORLD_SIZE "
                    "--process_id=$OMPI_COMM_WORLD_RANK"
                ) from error
            return 1
        alone = (
            "--coordinator=127.0.0.1:1234 --num_processes=1 --process_id=0 starts one process alone"
        )
        raise InputError(
            f"the processes of this run did not meet: {short_reason(error)}; {alone}"
        ) from error
    if jax.process_count() == 1:  # JAX has taken SIGTERM, which nobody would ask it for
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return jax.process_count()


def _parse_coordinator(
    coordinator: str | None, num_processes: int | None, process_id: int | None
) -> tuple[str, int]:
    """Host and port of the coordinator."""
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError("coordinator, num_processes and process_id go together: give all three")
    host, _, port = coordinator.rpartition(":")
    if not host or not re.fullmatch("[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise InputError(f"coordinator is HOST:PORT, not {short_reason(repr(coordinator))}")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"process_id must be from 0 to num_processes - 1 = {num_processes - 1}, "
            f"not {process_id}"
        )
    host = host.removeprefix("[").removesuffix("]")  # of IPv6
    try:
        socket.getaddrinfo(host, port)
    except (OSError, UnicodeError) as error:
        raise InputError(f"coordinator {host} is no host: {short_reason(error)}") from error
    return host, int(port)


def _check_free(port: int) -> None:
    """Raises an InputError of one line, where JAX has two, if process 0 cannot listen there."""
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        raise InputError(
            f"process 0 cannot listen on port {port}: {os.strerror(error.errno or 0)}; "
            "name another by --coordinator, in all processes"
        ) from error


def _meet(*given: Any, **options: Any) -> None:
    """jax.distributed.initialize, in which signals are heard.

    JAX waits in C++, and aborts the program when its time is over.

    Raises:
      InputError: if the others do not come.
    """
    raised: list[Exception] = []

    def initialize() -> None:
        try:
            jax.distributed.initialize(
                *given,
                initialization_timeout=int(10 * _SECONDS_TO_MEET),
                shutdown_timeout_seconds=_SECONDS_TO_PART,
                **options,
            )
        except Exception as error:
            raised.append(error)

    thread = threading.Thread(target=initialize, daemon=True)
    thread.start()
    deadline = time.monotonic() + _SECONDS_TO_MEET
    while thread.is_alive():
        thread.join(0.2)
        if thread.is_alive() and time.monotonic() > deadline:
            raise InputError(
                f"the processes of this run did not meet in {_SECONDS_TO_MEET} s: are all "
                "started, with the same coordinator and num_processes, and is it process 0 that "
                "listens there?"
            )
    if raised:
        raise raised[0]


def _wait_for(host: str, port: int) -> None:
    """Returns once somebody listens there; JAX itself would abort the program if nobody does."""
    deadline = time.monotonic() + _SECONDS_TO_MEET
    while True:
        try:
            socket.create_connection((host, port), timeout=5).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(f"no process 0 at {host}:{port}: {error}") from error
            time.sleep(0.2)


def first_host_first(name: str, function: Callable[..., T], *arguments: Any) -> T:
    """What `function(*arguments)` returns, called on the first host before the others.

    It may write files that the others then find. The name is not used twice in a run.
    """
    if jax.process_index() > 0:
        wait_for_all(name)
        return function(*arguments)
    try:
        return function(*arguments)
    finally:
        wait_for_all(name)


def wait_for_all(name: str) -> None:
    """Returns when every process is here, by a name that is not used twice in a run.

    Only processes wait here, not their devices: those give up after seconds.
    """
    ocp.multihost.get_barrier_sync_fn()(key=name, timeout_ms=_MILLISECONDS_TO_WAIT)


def check_shared(folder: Path) -> None:
    """Refuses a folder that is not the same on all hosts.

    Orbax would wait without end where one does not find what another has written.

    Raises:
      InputError: on all hosts.
    """
    if jax.process_count() == 1:
        return
    mark = folder / f".shared-{from_first_host(secrets.randbits(31))}"
    if jax.process_index() == 0:
        mark.touch()
    deadline = time.monotonic() + _SECONDS_TO_SEE
    while not (seen := _is_in(mark.name, folder)) and time.monotonic() < deadline:
        time.sleep(0.2)
    wait_for_all(mark.name)
    if jax.process_index() == 0:
        mark.unlink()
    if not _of_all(seen).all():
        raise InputError(
            f"not all hosts see the same workdir {folder}: give one on a disk that they share"
        )


def _is_in(name: str, folder: Path) -> bool:
    # A network's disk looks again when it lists a folder, and not when it is asked for a file.
    with contextlib.suppress(OSError):
        return name in os.listdir(folder)
    return False


def on_first_host(function: Callable[..., None], *arguments: Any, **options: Any) -> None:
    """Calls `function` with these on the first host; the others wait, and fail where it fails.

    Raises:
      InputError, OSError: as `function` does.
    """
    error = None
    if jax.process_index() == 0:
        try:
            function(*arguments, **options)
        except (InputError, OSError) as raised:
            error = raised
    if from_first_host(error is not None):
        raise error or InputError("the first host cannot go on, and says why")


@functools.cache  # all processes ask for it together, once
def count_here() -> int:
    """How many processes of the run share this machine, or this container, and its memory."""
    name = np.int32(zlib.crc32(socket.gethostname().encode()) >> 1)
    return int((_of_all(name) == name).sum())


def minimum(values: Sequence[int]) -> list[int]:
    """The minimum of each over all processes, rounded down to MiB: they are exchanged as int32."""
    return [int(value) << 20 for value in _of_all(np.array(values) >> 20).min(0)]


def _of_all(value: Any) -> np.ndarray:
    if jax.process_count() == 1:
        return np.asarray(value)[np.newaxis]
    return np.asarray(multihost_utils.process_allgather(np.int32(value)))


def from_first_host(value: Number) -> Number:
    """The first host's value, on every host: of at most 31 bits."""
    if jax.process_count() == 1:
        return value
    return type(value)(multihost_utils.broadcast_one_to_all(np.int32(value)))
