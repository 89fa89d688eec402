"""docs/results.md tells what the files in docs/results/ hold."""

import json
import re
import runpy
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[1]


def test_page_has_the_tables_of_its_files():
    script = runpy.run_path(str(ROOT / "benchmarks" / "results.py"))
    page = (ROOT / "docs" / "results.md").read_text()
    assert script["with_tables"](page, script["read_runs"]()) == page


def test_every_number_has_its_files():
    folder = ROOT / "docs" / "results"
    page = (ROOT / "docs" / "results.md").read_text()
    rows = [line for line in page.splitlines() if ".jsonl)" in line]
    linked = []
    for row in rows:
        files = re.findall(r"\(results/(.*?\.jsonl)\)", row)
        last = [json.loads((folder / file).read_text().splitlines()[-1]) for file in files]
        (accuracy,) = re.findall(r"\| ([\d.]+)(?: ± [\d.]+)?% \|", row)
        mean = np.mean([100 * record["test_accuracy"] for record in last])
        assert abs(float(accuracy) - mean) < 0.0051
        linked += files
    assert sorted(linked) == sorted(path.name for path in folder.glob("*.jsonl"))
