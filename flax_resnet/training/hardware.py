"""What a run works on."""

import contextlib
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import jax

_OWN_CGROUPS = Path("/proc/self/cgroup")
_CGROUPS = Path("/sys/fs/cgroup")
# By the controllers of a hierarchy: of version 2, and of version 1.
_LIMITS = {"": "memory.max", "memory": "memory.limit_in_bytes"}


def describe_hardware() -> dict[str, str]:
    """Devices, CPU, memory, system and Python of this host, in words."""
    devices = jax.devices()
    described = {"devices": f"{len(devices)} x {devices[0].device_kind} ({devices[0].platform})"}
    if jax.process_count() > 1:
        described["devices"] += f" on {jax.process_count()} hosts"
    return described | {
        "cpu": f"{os.cpu_count()} x {_cpu_model()}",
        "memory": f"{host_memory() / 2**30:.0f} GiB",
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def host_memory() -> int:
    """Bytes of memory that this process may take: this host's, or its container's or job's."""
    return min([os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_cgroup_limits()])


def _cgroup_limits() -> Iterator[int]:
    """Bytes that the control groups of this process and those around them may take, on Linux."""
    try:
        lines = _OWN_CGROUPS.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers in _LIMITS:
            innermost = _CGROUPS / controllers / group.lstrip("/")
            # In a container the group may be named as on its host, and only the root be there.
            for folder in (innermost, *innermost.parents):
                with contextlib.suppress(OSError, ValueError):  # no such file; "max"
                    yield int((folder / _LIMITS[controllers]).read_text())


def _cpu_model() -> str:
    """As Linux names it, where this is Linux and it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
