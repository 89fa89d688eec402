"""What a run may take of its host."""

import os

import pytest

from flax_resnet.training import hardware

PHYSICAL = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
UNLIMITED = 2**63 - 4096  # as version 1 says it


@pytest.mark.parametrize(
    ("groups", "limits", "expected"),
    [
        ("0::/\n", {"memory.max": "max"}, PHYSICAL),
        ("0::/\n", {"memory.max": 3000}, 3000),  # a container
        ("0::/jobs/7\n", {"jobs/7/memory.max": "max", "jobs/memory.max": 2000}, 2000),
        ("4:memory:/a\n0::/\n", {"memory/a/memory.limit_in_bytes": 1000}, 1000),
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": 1000}, 1000),  # a's name on the host
        ("4:memory:/a\n", {"memory/memory.limit_in_bytes": UNLIMITED}, PHYSICAL),
        ("3:cpuset:/\n", {"cpuset/memory.max": 1000}, PHYSICAL),
        (None, {}, PHYSICAL),
    ],
)
def test_memory_is_that_of_the_container(groups, limits, expected, tmp_path, monkeypatch):
    monkeypatch.setattr(hardware, "_OWN_CGROUPS", tmp_path / "own")
    monkeypatch.setattr(hardware, "_CGROUPS", tmp_path / "cgroup")
    if groups is not None:
        (tmp_path / "own").write_text(groups)
    for name, limit in limits.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{limit}\n")
    assert hardware.host_memory() == expected
