"""Several processes as one run, by `jax.distributed`."""

from collections.abc import Callable
from typing import TypeVar

import jax
import orbax.checkpoint as ocp

from flax_resnet.errors import InputError

_SECONDS_TO_MEET = 120
_MILLISECONDS_TO_WAIT = 24 * 3600 * 1000  # for a data set to be downloaded and prepared

T = TypeVar("T")


def connect(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> int:
    """Joins the other processes of a run, before JAX is used for anything else.

    Args:
      coordinator: HOST:PORT of process 0. Without it JAX looks for a TPU pod, Slurm,
        Open MPI or Kubernetes around it, and where there is none this process is alone.
      num_processes: how many they are.
      process_id: which of them this is, from 0.

    Returns:
      How many processes there are.

    Raises:
      InputError: if only some of the three are given, they make no sense together, or the
        others cannot be reached.
    """
    given = (coordinator, num_processes, process_id)
    if given == (None, None, None):
        try:
            jax.distributed.initialize()
        except ValueError:  # JAX found nothing around it that would tell it the three
            return 1
        return jax.process_count()
    if coordinator is None or num_processes is None or process_id is None:
        raise InputError("coordinator, num_processes and process_id go together: give all three")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise InputError(f"coordinator is HOST:PORT, not {coordinator!r}")
    if not 0 <= process_id < num_processes:
        raise InputError(
            f"process_id must be from 0 to num_processes - 1 = {num_processes - 1}, "
            f"not {process_id}"
        )
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, initialization_timeout=_SECONDS_TO_MEET
        )
    except RuntimeError as error:
        raise InputError(f"the processes did not meet at {coordinator}: {error}") from error
    return jax.process_count()


def first_host_first(name: str, function: Callable[[], T]) -> T:
    """What `function` returns, called on the first host before the others.

    It may write files that the others then find. The name is not used twice in a run.
    """
    # Only processes wait here, not their devices: those give up after seconds.
    wait = ocp.multihost.get_barrier_sync_fn()
    if jax.process_index() > 0:
        wait(key=name, timeout_ms=_MILLISECONDS_TO_WAIT)
        return function()
    try:
        return function()
    finally:
        wait(key=name, timeout_ms=_MILLISECONDS_TO_WAIT)
