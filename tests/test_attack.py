"""A few of the hostile inputs of `benchmarks/faults.py --attack`."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_hostile_inputs_end_in_a_line():
    command = [sys.executable, "benchmarks/faults.py", "--attack", "30", "--seed", "7"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = [line.split(" | ") for line in result.stdout.splitlines()[2:]]
    assert sum(int(row[1]) for row in rows) == 30
