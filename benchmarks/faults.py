"""Kills a run at random moments, goes on with it, and compares it with one left in peace.

    python benchmarks/faults.py --kills 20 [--feed stream] [--signal TERM]
    python benchmarks/faults.py --attack 1000

The run is digits_resnet8, shortened, with a checkpoint every half second inside its epochs
too. Every other kill (SIGKILL, or what --signal says) comes while a checkpoint is being written,
the others at any moment from the start of the process on. A run that reaches its end before the
kills are used up is compared, and another begun. Exits with 1 if anything differs.

With --attack it gives the programs so many hostile inputs instead, see attack.py beside it, and
counts tracebacks, wrong exit codes, more than one line on standard error and more than 10 s. Each
is told of on standard error. Exits with 1 if there is any.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import attack
import jax

import flax_resnet as fr

ROOT = Path(__file__).parents[1]
OPTIONS = {"num_epochs": 6, "checkpoint_minutes": 0.5 / 60}
TIMING = ("seconds", "images_per_second")
# For JAX here and in the runs; a CPU computes the same each time without it.
os.environ.setdefault("XLA_FLAGS", "--xla_gpu_deterministic_ops=true")


def start(workdir: Path, data: str, feed: str) -> subprocess.Popen:
    command = [sys.executable, "train.py", "--config=configs/digits_resnet8.py"]
    command += [f"--workdir={workdir}", f"--config.data_dir={data}", f"--config.data_feed={feed}"]
    command += [f"--config.{key}={value}" for key, value in OPTIONS.items()]
    with log_of(workdir).open("a") as log:
        return subprocess.Popen(command, cwd=ROOT, stderr=log)


def log_of(workdir: Path) -> Path:
    return workdir.with_name(f"{workdir.name}.log")


def finish(process: subprocess.Popen, workdir: Path) -> None:
    """Waits for a run that nobody kills."""
    if process.wait():
        last = "\n".join(log_of(workdir).read_text().splitlines()[-20:])
        raise RuntimeError(f"a run ended with {process.returncode}:\n{last}")


def kill(
    process: subprocess.Popen, workdir: Path, number: signal.Signals, while_writing: bool
) -> bool:
    """Kills a run at a random moment; False if it ended before."""
    moment = time.monotonic() + random.uniform(0, 12)
    while process.poll() is None:
        writing = any(workdir.glob("checkpoints/*tmp*"))
        if time.monotonic() > moment and (writing or not while_writing):
            time.sleep(random.uniform(0, 0.1))
            os.kill(process.pid, number)
            return process.wait() in (-number, 128 + number)
        time.sleep(0.001)
    finish(process, workdir)
    return False


def result(workdir: Path) -> tuple[list[dict], list[bytes]]:
    """metrics.jsonl without its times, and the arrays of the last state."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if k not in TIMING} for line in lines]
    config = json.loads((workdir / "config.json").read_text())
    state = jax.device_get(fr.train(config, workdir))
    return records, [leaf.tobytes() for leaf in jax.tree.leaves(state)]


def differences(peace: Path, disturbed: list[Path]) -> int:
    """How many arrays, and lists of metrics, of disturbed runs are not those of the other."""
    records, arrays = result(peace)
    count = 0
    for workdir in disturbed:
        other_records, other_arrays = result(workdir)
        count += other_records != records
        count += sum(a != b for a, b in zip(arrays, other_arrays, strict=True))
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description="Kills a run, and goes on with it.")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0, help="of the moments, or of the inputs")
    parser.add_argument("--feed", choices=("resident", "stream"), default="resident")
    parser.add_argument("--signal", choices=("KILL", "TERM"), default="KILL")
    parser.add_argument("--attack", type=int, metavar="N", help="hostile inputs instead of kills")
    arguments = parser.parse_args()
    if arguments.attack is not None:
        attack.main(arguments.attack, arguments.seed)
    number = signal.Signals[f"SIG{arguments.signal}"]
    random.seed(arguments.seed)

    with tempfile.TemporaryDirectory() as folder:
        peace = Path(folder) / "peace"
        finish(start(peace, folder, arguments.feed), peace)
        kills = resumes = 0
        runs: list[Path] = []
        while not runs or kills < arguments.kills:
            workdir = Path(folder) / f"disturbed-{len(runs)}"
            starts = 0
            while True:
                process = start(workdir, folder, arguments.feed)
                starts += 1
                if kills == arguments.kills:
                    finish(process, workdir)
                    break
                if not kill(process, workdir, number, while_writing=bool(kills % 2)):
                    break
                kills += 1
            resumes += starts - 1
            runs.append(workdir)
        found = differences(peace, runs)  # not before: the device is the runs'
    print("| feed | runs | kills | resumes | differences |")
    print("|---|---|---|---|---|")
    print(f"| {arguments.feed} | {len(runs)} | {kills} | {resumes} | {found} |")
    sys.exit(found > 0)


if __name__ == "__main__":
    main()
