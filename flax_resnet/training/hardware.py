"""What a run works on."""

import os
import platform
from pathlib import Path

import jax


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
    """Bytes of this host's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    """As Linux names it, where this is Linux and it does."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
