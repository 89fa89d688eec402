"""The devices of a run, and how arrays lie on them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flax_resnet.errors import InputError, short_reason


def find_devices(*, local: bool = False) -> list[Any]:
    """The devices of all hosts, or of this one.

    Raises:
      InputError: if they cannot be used, as a TPU that another program has.
    """
    try:
        return jax.local_devices() if local else jax.devices()
    except (RuntimeError, AssertionError) as error:
        # The latter, which says nothing, where there is no plugin for it.
        reason = short_reason(error) if str(error) else "no plugin is there for $JAX_PLATFORMS"
        raise InputError(f"JAX cannot start: {reason}; JAX_PLATFORMS=cpu takes the CPU") from error


def make_mesh(
    batch_size: int, accumulation_steps: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """One axis, "data", over `devices`; all there are, on all hosts, by default.

    Raises:
      InputError: if they do not divide the batch, or its parts, or cannot be used; if hosts have
        different numbers of them.
    """
    devices = devices or find_devices()
    counts = Counter(device.process_index for device in devices)
    if len(set(counts.values())) > 1:
        raise InputError(
            f"the hosts have {', '.join(map(str, counts.values()))} devices: JAX wants as many on "
            "each; CUDA_VISIBLE_DEVICES=0,1 hides all but two"
        )
    mesh = Mesh(np.array(devices), ("data",))
    multiple = mesh.size * accumulation_steps
    if batch_size % multiple:
        among = f"{mesh.size} device{'s' * (mesh.size > 1)}"
        if accumulation_steps > 1:
            among += f" with accumulation_steps={accumulation_steps}"
        raise InputError(
            f"batch_size={batch_size} cannot be divided among {among}: "
            f"take a multiple of {multiple}"
        )
    return mesh


def platform(mesh: Mesh) -> str:
    """ "cpu", "gpu" or "tpu"."""
    return mesh.devices.flat[0].platform


def describe_mesh(mesh: Mesh) -> str:
    """Such as "8 x cpu" or "16 x TPU v5 lite on 2 hosts"."""
    described = f"{mesh.size} x {mesh.devices.flat[0].device_kind}"
    return described + (f" on {jax.process_count()} hosts" if jax.process_count() > 1 else "")


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, PartitionSpec())


def by_example(mesh: Mesh) -> NamedSharding:
    """The first axis divided among the devices."""
    return NamedSharding(mesh, PartitionSpec("data"))


# Arrays over the devices of all hosts, from what this host has.


def put_everywhere(array: np.ndarray, mesh: Mesh) -> jax.Array:
    """The array, which every host has whole, on every device."""
    return jax.make_array_from_process_local_data(replicated(mesh), array, array.shape)


def share_of_host(mesh: Mesh, batch_size: int) -> slice:
    """The examples of a batch that this host's devices take."""
    indices = by_example(mesh).addressable_devices_indices_map((batch_size,)).values()
    ranges = [index[0].indices(batch_size) for index in indices if index is not None]
    return slice(min(start for start, _, _ in ranges), max(stop for _, stop, _ in ranges))


def put_share(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch of which this host has `share_of_host`."""
    return jax.make_array_from_process_local_data(by_example(mesh), batch)
