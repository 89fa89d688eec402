"""What writing checkpoints adds to an epoch of cifar_resnet20 (CIFAR-10, batch 128).

    python benchmarks/checkpoint.py

A checkpoint stops the steps for as long as its arrays are copied, and is then written in the
background, beside the steps. The table has both: the share of an epoch's time for which
training stands still, and the share if it stood still until all is on disk. An epoch has one
checkpoint of its own, and one every ten minutes. Medians.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

import flax_resnet as fr
from flax_resnet.training.checkpoint import Checkpoints, History
from flax_resnet.training.config import Config
from flax_resnet.training.optimizer import make_optimizer
from flax_resnet.training.programs import is_finite
from flax_resnet.training.steps import create_state, train_step

STEPS_PER_EPOCH = 50_000 // 128


def main() -> None:
    parser = argparse.ArgumentParser(description="The cost of checkpoints.")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()

    config = Config()
    model, optimizer = fr.cifar_resnet20(), make_optimizer(config, lambda step: 0.1)
    state = jax.jit(partial(create_state, model, optimizer, image_shape=(32, 32, 3)))(
        jax.random.key(0)
    )
    batch = {"image": jnp.ones((128, 32, 32, 3)), "label": jnp.zeros(128, jnp.int32)}
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer), donate_argnums=0)
    history = History(losses=[0.1] * STEPS_PER_EPOCH, accuracies=[0.1] * STEPS_PER_EPOCH)
    times = {"step": [], "copied": [], "written": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.closing(Checkpoints(Path(folder), config)) as checkpoints,
    ):
        for i in range(arguments.rounds + 1):
            started = time.perf_counter()
            state, _ = jax.block_until_ready(step(state, batch))
            stepped = time.perf_counter()
            assert is_finite(state)
            checkpoints.save(state, history)
            copied = time.perf_counter()
            checkpoints.finish()
            written = time.perf_counter()
            if i:  # the first round compiled
                times["step"].append(stepped - started)
                times["copied"].append(copied - stepped)
                times["written"].append(written - stepped)
    medians = {name: statistics.median(values) for name, values in times.items()}
    epoch = STEPS_PER_EPOCH * medians["step"]
    checkpoints_an_epoch = 1 + epoch / (60 * config.checkpoint_minutes)
    print("| step, ms | epoch, s | checkpoints an epoch | seconds each | share of the epoch |")
    print("|---|---|---|---|---|")
    for name in ("copied", "written"):
        share = checkpoints_an_epoch * medians[name] / epoch
        print(
            f"| {1000 * medians['step']:.0f} | {epoch:.0f} | {checkpoints_an_epoch:.2f} "
            f"| {medians[name]:.3f}, until {name} | {share:.2%} |"
        )


if __name__ == "__main__":
    main()
