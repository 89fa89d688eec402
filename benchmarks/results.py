"""The tables and figures of docs/results.md, from the runs in docs/results/.

    python benchmarks/results.py                       # rebuilds them
    python benchmarks/results.py --add runs/mine quick-0 --data 'CIFAR-10 (JPEG)' \
        --command 'python train.py --config configs/cifar_resnet20_quick.py' --commit 1a2b3c4

A run is two files: NAME.jsonl, its metrics.jsonl, and NAME.json, what else a row tells. The
folder of benchmarks/agreement.py becomes one file, agreement/NAME.json.
Runs of one command, the seed left out, on one data set and of one commit are one row: mean
and standard deviation (n - 1). The last epoch counts, on the whole test split, without
test-time augmentation.
"""

import argparse
import importlib.metadata
import json
import re
import shutil
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import scipy.stats

import flax_resnet as fr
from flax_resnet.lesson.figures import CURVES, draw_curves
from flax_resnet.training.writers import plot_curves

_DOCS = Path(__file__).parents[1] / "docs"
_FOLDER = _DOCS / "results"
_AGREEMENT = _FOLDER / "agreement"
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
    for name in ("lab10_resnet50_muon", "lab10_resnet50_cosine"):
        plot_curves(runs[name]["records"], _FOLDER / f"{name}.png")


def add(options: argparse.Namespace) -> None:
    """Keeps the metrics of a run, or the pairs of an agreement, and what else a row tells."""
    folder, name = Path(options.add[0]), options.add[1]
    pairs = read_pairs(folder)
    newest = folder / f"ours-{min(pairs)}" if pairs else folder
    run = fr.load_run(newest, "newest")
    description = {
        "command": options.command,
        "commit": options.commit,
        "data": options.data,
        "note": options.note,
        "hardware": {key: run.hardware[key] for key in ("devices", "cpu", "memory")},
        "versions": dict(run.versions),
    }
    if pairs:
        description["versions"] |= {"torch": importlib.metadata.version("torch")}
        description |= {"epochs": run.records[-1]["epoch"], "pairs": pairs}
        _AGREEMENT.mkdir(exist_ok=True)
        path = _AGREEMENT / f"{name}.json"
    else:
        shutil.copy(folder / "metrics.jsonl", _FOLDER / f"{name}.jsonl")
        path = _FOLDER / f"{name}.json"
    path.write_text(json.dumps(description, indent=2) + "\n")


def read_pairs(folder: Path) -> dict[str, list[float]]:
    """By seed, the last test accuracies of ours and PyTorch's in agreement.py's folder."""
    pairs = {}
    for path in sorted(folder.glob("torch-*/accuracy.json")):
        seed = path.parent.name.removeprefix("torch-")
        pairs[seed] = [last_accuracy(folder / f"ours-{seed}"), json.loads(path.read_text())]
    return pairs


def last_accuracy(run: Path) -> float:
    """Test accuracy of the last epoch in a run's folder."""
    return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["test_accuracy"]


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

    page = re.sub(r"<!-- runs: (\S+) -->.*?<!-- end -->", table, page, flags=re.DOTALL)
    agreement = f"<!-- agreement -->\n\n{agreement_rows()}\n<!-- end -->"
    return re.sub(r"<!-- agreement -->.*?<!-- end -->", agreement, page, flags=re.DOTALL)


def agreement_rows() -> str:
    """A table in Markdown, with a row for every file of agreement/."""
    lines = [
        "| recipe | data | epochs | ours | PyTorch | ours - PyTorch | seeds | commit | pairs |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for path in sorted(_AGREEMENT.glob("*.json")):
        run = json.loads(path.read_text())
        command = run["command"].removeprefix("python benchmarks/agreement.py --config configs/")
        means = [
            f"{100 * statistics.mean(side):.2f}%"
            for side in zip(*run["pairs"].values(), strict=True)
        ]
        lines.append(
            f"| {code_spans(command)} | {run['data']} "
            f"| {run['epochs']} | {' | '.join(means)} | {interval(run['pairs'].values())} "
            f"| {len(run['pairs'])} | {run['commit']} "
            f"| [{path.stem}](results/agreement/{path.name}) |"
        )
    return "\n".join(lines) + "\n"


def interval(pairs: Iterable[Sequence[float]]) -> str:
    """Mean difference of pairs of accuracies, in points, and its 95% interval (Student's t)."""
    differences = [100 * (one - other) for one, other in pairs]
    mean = statistics.mean(differences)
    if len(differences) == 1:
        return f"{mean:+.2f}"
    error = statistics.stdev(differences) / len(differences) ** 0.5
    return f"{mean:+.2f} ± {scipy.stats.t.ppf(0.975, len(differences) - 1) * error:.2f}"


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
        command = command.removeprefix("python train.py --config configs/")
        lines.append(
            f"| {code_spans(command)} "
            f"| {data} | {last[0]['epoch']} | {statistics.mean(minutes):.1f} "
            f"| {statistics.mean(accuracy):.2f}{deviation}% | {len(names)} | {commit} | {files} |"
        )
    return "\n".join(lines) + "\n"


def code_spans(command: str) -> str:
    """Each word in its own, between which a narrow table may break the line."""
    return " ".join(f"`{word}`" for word in command.split())


if __name__ == "__main__":
    main()
