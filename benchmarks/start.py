"""Seconds from `python train.py` to its first step, cold and warm, and times to compile.

    python benchmarks/start.py

The run is digits_resnet8, its data prepared. Cold: nothing compiled yet, neither programs
nor convolution.cc. Warm: the same again. Then, each in a process of its own and by turns, the time
to lower and compile the training step (batch 128) of deep nets, with their blocks unrolled and
scanned. Medians.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]
NETS = (("cifar_resnet110", False), ("cifar_resnet110", True), ("cifar_resnet1202", True))


def seconds_to_first_step(cache: str, data: str) -> float:
    """Runs train.py, whose run is one step, to its end."""
    environment = _environment() | {"XDG_CACHE_HOME": cache, "TFDS_DATA_DIR": data}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", "--config=configs/digits_resnet8.py"]
        command += [f"--workdir={workdir}", "--config.num_steps=1", "--config.warmup_epochs=0.01"]
        started = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            assert process.stderr is not None
            seconds = None
            for line in process.stderr:
                if line.startswith("compiled in"):  # the step itself takes a hundredth of that
                    seconds = time.perf_counter() - started
    if process.returncode or seconds is None:
        raise RuntimeError("train.py failed")
    return seconds


def _environment() -> dict[str, str]:
    """Without a cache of compiled programs that the user has set."""
    return {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}


def compile_step(net: str, scan_blocks: bool) -> None:
    """Prints the seconds that lowering takes, and those of compiling."""
    import jax
    import jax.numpy as jnp

    import flax_resnet as fr
    from flax_resnet.training.config import Config
    from flax_resnet.training.optimizer import make_optimizer
    from flax_resnet.training.steps import create_state, train_step

    model = fr.create_model(net, scan_blocks=scan_blocks)
    optimizer = make_optimizer(Config(), lambda step: 0.1)
    create = partial(create_state, model, optimizer, image_shape=(32, 32, 3))
    state = jax.eval_shape(create, jax.random.key(0))
    if scan_blocks:
        state = jax.eval_shape(fr.stack_blocks, state)
    batch = {
        "image": jax.ShapeDtypeStruct((128, 32, 32, 3), jnp.float32),
        "label": jax.ShapeDtypeStruct((128,), jnp.int32),
    }
    started = time.perf_counter()
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer), donate_argnums=0)
    lowered = step.lower(state, batch)
    after = time.perf_counter()
    lowered.compile()
    print(after - started, time.perf_counter() - after)


def seconds_to_compile(net: str, scan_blocks: bool) -> tuple[float, float]:
    """What `compile_step` prints in a process of its own."""
    command = [sys.executable, __file__, "--compile", net, str(scan_blocks)]
    printed = subprocess.run(
        command, cwd=ROOT, env=_environment(), check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    lower, compile_ = map(float, printed.split())
    return lower, compile_


def main() -> None:
    parser = argparse.ArgumentParser(description="Time to the first step, and to compile.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--compile", nargs=2, metavar=("NET", "SCAN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compile:
        compile_step(arguments.compile[0], arguments.compile[1] == "True")
        return

    times = {"cold": [], "warm": []}
    with tempfile.TemporaryDirectory() as data:
        for i in range(arguments.rounds + 1):
            with tempfile.TemporaryDirectory() as cache:
                seconds = [seconds_to_first_step(cache, data) for _ in times]
            if i:  # the first round prepared the data
                for kind, value in zip(times, seconds, strict=True):
                    times[kind].append(value)
    print("| digits_resnet8 | seconds to the first step |")
    print("|---|---|")
    for kind, values in times.items():
        print(f"| {kind} | {statistics.median(values):.1f} |")
    print("\n| net | blocks | lower, s | compile, s |")
    print("|---|---|---|---|")
    measured = [[seconds_to_compile(*net) for net in NETS] for _ in range(arguments.rounds)]
    for (net, scan_blocks), rounds in zip(NETS, zip(*measured, strict=True), strict=True):
        lower, compile_ = map(statistics.median, zip(*rounds, strict=True))
        kind = "scanned" if scan_blocks else "unrolled"
        print(f"| {net} | {kind} | {lower:.1f} | {compile_:.1f} |")


if __name__ == "__main__":
    main()
