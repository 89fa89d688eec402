"""Seconds from `python train.py` to its first step, cold and warm, and times to compile.

    python benchmarks/start.py

The run is digits_resnet8, its data prepared. Cold: nothing compiled yet, neither programs
nor convolution.cc. Warm: the same again. Then, each in a process of its own, the time to lower
and compile the training step (batch 128) of deep nets, with their blocks unrolled and
scanned.
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
    """Runs train.py for one step; the evaluation after it is not waited for."""
    environment = os.environ | {"XDG_CACHE_HOME": cache, "TFDS_DATA_DIR": data}
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "train.py", "--config=configs/digits_resnet8.py"]
        command += [f"--workdir={workdir}", "--config.num_steps=1", "--config.warmup_epochs=0.01"]
        started = time.perf_counter()
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        )
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("compiled in"):  # the step itself takes a hundredth of that
                seconds = time.perf_counter() - started
                process.wait()
                return seconds
    raise RuntimeError("train.py ended before its first step")


def compile_step(net: str, scan_blocks: bool) -> None:
    """Prints the seconds that lowering and compiling take."""
    import jax
    import jax.numpy as jnp

    import flax_resnet as fr
    from flax_resnet.training.config import Config
    from flax_resnet.training.optimizer import sgd
    from flax_resnet.training.steps import create_state, train_step

    model = fr.create_model(net, scan_blocks=scan_blocks)
    optimizer = sgd(Config(), lambda step: 0.1)
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
    print(
        f"| {net} | {'scanned' if scan_blocks else 'unrolled'} | {after - started:.1f} "
        f"| {time.perf_counter() - after:.1f} |"
    )


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
    print("|---|---|---|---|", flush=True)
    for net, scan_blocks in NETS:
        subprocess.run(
            [sys.executable, __file__, "--compile", net, str(scan_blocks)], check=True, cwd=ROOT
        )


if __name__ == "__main__":
    main()
