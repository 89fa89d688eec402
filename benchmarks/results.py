"""The tables and figures of docs/results.md, from the runs in docs/results/.

    python benchmarks/results.py                       # rebuilds them
    python benchmarks/results.py --add runs/mine quick-0 --data 'CIFAR-10 (JPEG)' \
        --command 'python train.py --config configs/cifar_resnet20_quick.py' --commit 1a2b3c4

A run is two files: NAME.jsonl, its metrics.jsonl, and NAME.json, what else a row tells.
Runs of one command, the seed left out, on one data set and of one commit are one row: mean
and standard deviation (n - 1). The last epoch counts, on the whole test split, without
test-time augmentation.
"""

import argparse
import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import flax_resnet as fr
from flax_resnet.lesson.figures import CURVES, draw_curves
from flax_resnet.training.writers import plot_curves

_DOCS = Path(__file__).parents[1] / "docs"
_FOLDER = _DOCS / "results"
_SEED = re.compile(r" --config\.seed=\d+")


def main() -> None:
    parser = argparse.ArgumentParser(description="The tables of docs/results.md.")
    parser.add_argument("--add", nargs=2, metavar=("RUN", "NAME"), help="a run's folder first")
    parser.add_argument("--data", help="what a row is to say of the data")
    parser.add_argument("--command", help="that has started the run")
    parser.add_argument("--commit", help="that the run was made with")
    parser.add_argument("--note", default="", help="what else is to be known of it")
    options = parser.parse_args()
    if options.add:
        if not (options.data and options.command and options.commit):
            parser.error("--add needs --data, --command and --commit")
        add(options)
    runs = read_runs()
    page = _DOCS / "results.md"
    page.write_text(with_tables(page.read_text(), runs))
    if all(name in runs for name in CURVES):
        draw_curves({n: runs[n]["records"] for n in CURVES}, _DOCS / "lesson" / "curves.png")
    plot_curves(runs["lab10_resnet50"]["records"], _FOLDER / "lab10_resnet50.png")


def add(options: argparse.Namespace) -> None:
    """Copies the metrics of a run, and writes what else a row tells, or is to be known."""
    folder, name = options.add
    run = fr.load_run(folder, "newest")
    shutil.copy(Path(folder) / "metrics.jsonl", _FOLDER / f"{name}.jsonl")
    description = {
        "command": options.command,
        "commit": options.commit,
        "data": options.data,
        "note": options.note,
        "hardware": {key: run.hardware[key] for key in ("devices", "cpu", "memory")},
        "versions": run.versions,
    }
    (_FOLDER / f"{name}.json").write_text(json.dumps(description, indent=2) + "\n")


def read_runs() -> dict[str, dict[str, Any]]:
    """By its name, what NAME.json holds of each run, and as "records" what NAME.jsonl does."""
    runs = {}
    for path in sorted(_FOLDER.glob("*.json")):
        lines = path.with_suffix(".jsonl").read_text().splitlines()
        runs[path.stem] = json.loads(path.read_text()) | {"records": [json.loads(x) for x in lines]}
    return runs


def with_tables(page: str, runs: dict[str, dict[str, Any]]) -> str:
    """The page, each of whose tables has the runs that the comment before it names."""

    def table(match: re.Match[str]) -> str:
        names = [name for name in runs if re.fullmatch(match[1], name)]
        return f"<!-- runs: {match[1]} -->\n\n{rows({n: runs[n] for n in names})}\n<!-- end -->"

    return re.sub(r"<!-- runs: (\S+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)


def rows(runs: dict[str, dict[str, Any]]) -> str:
    """A table in Markdown, with a row for every command."""
    lines = [
        "| command | data | epochs | minutes | test accuracy | seeds | commit | metrics |",
        "|---|---|---|---|---|---|---|---|",
    ]
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, run in runs.items():
        key = (_SEED.sub("", run["command"]), run["data"], run["commit"])
        groups.setdefault(key, []).append(name)
    for (command, data, commit), names in groups.items():
        last = [runs[name]["records"][-1] for name in names]
        minutes = [sum(r["seconds"] for r in runs[name]["records"]) / 60 for name in names]
        accuracy = [100 * record["test_accuracy"] for record in last]
        deviation = f" ± {statistics.stdev(accuracy):.2f}" if len(names) > 1 else ""
        files = " ".join(f"[{name.split('-')[-1]}](results/{name}.jsonl)" for name in names)
        words = command.removeprefix("python train.py --config configs/").split()
        lines.append(
            f"| {' '.join(f'`{word}`' for word in words)} "
            f"| {data} | {last[0]['epoch']} | {statistics.mean(minutes):.1f} "
            f"| {statistics.mean(accuracy):.2f}{deviation}% | {len(names)} | {commit} | {files} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
