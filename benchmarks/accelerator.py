"""Everything worth knowing of a GPU or TPU, in the time that there is.

    python benchmarks/accelerator.py --minutes 25 --output DIR [--data_dir DATA]
    python benchmarks/accelerator.py --minutes 8 --output DIR --stages step loop
    python benchmarks/accelerator.py --smoke --output DIR    # in small, and on a CPU too

Stages, the most worth knowing first, each a command in a process of its own and with a time of
its own: is it right (parity.py, faults.py), how fast is it beside PyTorch and beside the best that
its memory and its matrix units allow (train_step.py, training_loop.py, compiled.py, a profile),
what do the recipes reach. What a stage prints is in DIR/NAME.txt at once, what it says meanwhile
in DIR/NAME.log, runs are in DIR/runs; DIR/stages.jsonl has a line for each that is over. One that
takes longer than its time gets SIGTERM, and what it has left counts.

It needs the repository, its `cuda` or `tpu` extra, PyTorch for that device, and a folder with
CIFAR-10 as TFDS prepares it, or with `downloads/manual/cifar-10-binary.tar.gz`: --data_dir, else
$TFDS_DATA_DIR. --smoke makes up images in place of it.
"""

import argparse
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parents[1]
SECONDS_TO_STOP = 20


# Of PyTorch's variants the one that should be the fastest on a GPU; others would take minutes.
FASTEST = "compile channels_last"
STEP = ("benchmarks/train_step.py", "--variants", FASTEST, "--seconds=1")


class Stage(NamedTuple):
    """A command, the script and its arguments, and the most minutes that it gets."""

    name: str
    minutes: float
    command: Sequence[str]


def run_of(config: str, name: str, output: Path, *options: str) -> Sequence[str]:
    """train.py with a recipe."""
    return (
        "train.py",
        f"--config=configs/{config}.py",
        f"--workdir={output / 'runs' / name}",
        *options,
    )


def stages(output: Path, card: str | None) -> list[Stage]:
    """All of them.

    Args:
      output: for runs.
      card: the device's name in compiled.py, where it has one.
    """
    batches = ("128", "512", "1024")
    programs = [f"cifar_resnet18:{batch}" for batch in batches] + ["resnet50:256:224"]
    found = [
        Stage("parity", 3, ("benchmarks/parity.py",)),
        Stage("kill", 3, ("benchmarks/faults.py", "--kills=4")),
        Stage("stream", 3, ("benchmarks/faults.py", "--kills=2", "--feed=stream")),
        Stage("signal", 2, ("benchmarks/faults.py", "--kills=2", "--signal=TERM")),
        Stage(
            "step",
            5,
            (*STEP, "--nets", "cifar_resnet18", "--batch_sizes", *batches, "--rounds=3"),
        ),
        Stage("loop", 6, ("benchmarks/training_loop.py", "--rounds=3")),
        Stage(
            "step50",
            4,
            (*STEP, "--nets=resnet50", "--batch_sizes=256", "--image_size=224", "--rounds=3"),
        ),
        Stage(
            "profile",
            2,
            run_of(
                "cifar_resnet18",
                "profile",
                output,
                "--config.batch_size=512",
                "--config.num_steps=96",
                "--config.profile_steps=(64, 80)",
            ),
        ),
        Stage("speedrun_gpu", 2, run_of("cifar_speedrun_gpu", "speedrun_gpu", output)),
        Stage("lab10", 5, run_of("lab10_resnet50", "lab10", output)),
        Stage(
            "speedrun",
            8,
            (
                *("benchmarks/speedrun.py", "--rounds=1", "--variant", FASTEST),
                f"--workdir={output / 'runs' / 'speedrun'}",
            ),
        ),
        *(
            Stage(
                f"resnet20-{seed}",
                5,
                run_of("cifar_resnet20", f"resnet20-{seed}", output, f"--config.seed={seed}"),
            )
            for seed in range(3)
        ),
        Stage("resnet18", 60, run_of("cifar_resnet18", "resnet18", output)),
    ]
    if card:
        roofline = ("benchmarks/compiled.py", "--cards", card, "--programs", *programs)
        found.insert(-1, Stage("roofline", 2, roofline))  # which leaves the device idle
    return found


def smoke_stages(output: Path) -> list[Stage]:
    """One of each kind, with as little as it can do."""
    return [
        Stage("parity", 10, ("benchmarks/parity.py", "--nets=cifar_resnet8", "--batch_size=4")),
        Stage("signal", 10, ("benchmarks/faults.py", "--kills=1", "--signal=TERM")),
        Stage(
            "step",
            10,
            (
                "benchmarks/train_step.py",
                "--nets=cifar_resnet8",
                "--batch_sizes=8",
                "--rounds=1",
                "--seconds=0.1",
                "--variants=eager",
            ),
        ),
        Stage(
            "loop",
            10,
            (
                "benchmarks/training_loop.py",
                "--net=cifar_resnet8",
                "--batch_sizes=16",
                "--images=64",
                "--rounds=1",
                "--variant=eager",
            ),
        ),
        Stage(
            "profile",
            10,
            run_of(
                "digits_resnet8",
                "profile",
                output,
                "--config.num_steps=4",
                "--config.warmup_epochs=0.1",
                "--config.profile_steps=(1, 3)",
            ),
        ),
    ]


def run(stage: Stage, output: Path, seconds: float) -> dict[str, Any]:
    """Its line of stages.jsonl."""
    started = time.monotonic()
    with (
        (output / f"{stage.name}.txt").open("w") as out,
        (output / f"{stage.name}.log").open("w") as log,
    ):
        process = subprocess.Popen(
            [sys.executable, *stage.command],
            cwd=ROOT,
            stdout=out,
            stderr=log,
            process_group=0,
        )
        end = "done"
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                process.wait(seconds)
                break
            except subprocess.TimeoutExpired:
                end, seconds = "out of time", SECONDS_TO_STOP
                os.killpg(process.pid, number)
            except BaseException:  # Ctrl-C, SIGTERM
                os.killpg(process.pid, signal.SIGTERM)
                raise
        code = process.wait()
    if end == "done" and code:
        end = "failed"
    return {
        "stage": stage.name,
        "end": end,
        "code": code,
        "seconds": round(time.monotonic() - started, 1),
        "command": " ".join(stage.command),
    }


def shares(output: Path) -> str:
    """Images a second of our steps as a share of what the roofline allows, by net and batch."""
    rates: dict[str, dict[tuple[str, str], float]] = {}
    for name, net, batch, rate in (("roofline", 2, 3, 11), ("step", 1, 2, 4), ("step50", 1, 2, 4)):
        path, found = output / f"{name}.txt", rates.setdefault(name, {})
        for line in path.read_text().splitlines() if path.exists() else []:
            cells = [cell.strip() for cell in line.split("|")]
            if len(cells) > rate and re.fullmatch(r"[\d,.]+", cells[rate]):
                found[cells[net], cells[batch]] = float(cells[rate].replace(",", ""))
    lines = ["| net | batch | images/s | at best | share |", "|---|---:|---:|---:|---:|"]
    steps = rates["step"] | rates["step50"]
    for (net, batch), best in rates["roofline"].items():
        if measured := steps.get((net, batch)):
            lines.append(
                f"| {net} | {batch} | {measured:,.0f} | {best:,.0f} | {measured / best:.0%} |"
            )
    return "\n".join(lines) + "\n"


def make_up_cifar10(folder: Path) -> None:
    """Writes a few random images as CIFAR-10's publisher has them."""
    rng = np.random.default_rng(0)
    counts = {f"data_batch_{i}.bin": 16 for i in range(1, 6)} | {"test_batch.bin": 512}
    files = {
        name: rng.integers(0, 10, (count, 3073), np.uint8).tobytes()
        for name, count in counts.items()
    }
    files["batches.meta.txt"] = b"\n".join(b"class %d" % i for i in range(10)) + b"\n\n"
    folder.mkdir(parents=True, exist_ok=True)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))


def describe_device() -> str:
    """Its kind, asked in a process that then lets go of it."""
    asked = "import jax; print(jax.devices()[0].device_kind)"
    command = [sys.executable, "-c", asked]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser(description="Everything worth knowing of a GPU or TPU.")
    parser.add_argument("--minutes", type=float, default=25, help="in which all has to be done")
    parser.add_argument("--output", type=Path, required=True, help="a folder not there yet")
    parser.add_argument("--data_dir", type=Path, help="with CIFAR-10; else $TFDS_DATA_DIR")
    parser.add_argument("--smoke", action="store_true", help="each kind of stage in small")
    parser.add_argument("--stages", nargs="+", metavar="NAME", help="these alone")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    ends = time.monotonic() + 60 * arguments.minutes
    output = arguments.output.absolute()
    device = describe_device()
    if device == "cpu" and not arguments.smoke:
        parser.error(
            "JAX sees no GPU or TPU here: see docs/how-to/gpu-tpu.md; --smoke goes without"
        )
    cards = {"H100": "h100", "A100": "a100", "v5 lite": "v5e", "v6 lite": "v6e"}
    card = next((card for name, card in cards.items() if name in device), None)
    chosen = smoke_stages(output) if arguments.smoke else stages(output, card)
    if arguments.stages:
        if unknown := set(arguments.stages) - {stage.name for stage in chosen}:
            known = ", ".join(stage.name for stage in chosen)
            parser.error(f"--stages: {', '.join(sorted(unknown))} is none of {known}")
        chosen = [stage for stage in chosen if stage.name in arguments.stages]
    try:
        output.mkdir(parents=True)
    except FileExistsError:
        parser.error(f"--output: {output} is there already")
    if arguments.smoke:
        make_up_cifar10(output / "data" / "downloads" / "manual")
        arguments.data_dir = output / "data"
    if arguments.data_dir:
        os.environ["TFDS_DATA_DIR"] = str(arguments.data_dir.absolute())

    print(f"on {device}", flush=True)
    failed = False
    for stage in chosen:
        left = ends - time.monotonic() - SECONDS_TO_STOP
        if left < SECONDS_TO_STOP:
            line = {"stage": stage.name, "end": "no time left"}
        else:
            line = run(stage, output, min(60 * stage.minutes, left))
        with (output / "stages.jsonl").open("a") as file:
            file.write(json.dumps({"device": device} | line) + "\n")
        (output / "shares.txt").write_text(shares(output))
        print(f"{line['stage']}: {line['end']}, {line.get('seconds', 0)} s", flush=True)
        failed |= line["end"] == "failed"
    sys.exit(failed)


if __name__ == "__main__":
    main()
