"""What crop, flip and normalisation cost of a cifar_resnet20 step, batch 128.

    python benchmarks/augment.py

Both are compiled programs on data that stays on the device, and take turns; the figures
are medians over the rounds.
"""

import argparse
import statistics
import time

import jax
import numpy as np
import train_step

from flax_resnet.data import augment, normalize


def prepare_augmentation(batch_size: int):
    """A function that does that many batches and waits for the last."""
    images = np.random.default_rng(0).integers(0, 256, (batch_size, 32, 32, 3), dtype=np.uint8)
    images, index = jax.device_put((images, np.arange(batch_size, dtype=np.int32)))

    @jax.jit
    def batch(images, index, key):
        images = augment(images, index, key, crop_padding=4, flip=True)
        return normalize(images, (0.5, 0.5, 0.5), (0.2, 0.2, 0.2))

    def run(batches: int) -> None:
        result = images
        for _ in range(batches):
            result = batch(images, index, jax.random.key(0))
        jax.block_until_ready(result)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description="Augmentation against a training step.")
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()

    sides = {
        "step": (train_step.prepare_ours("cifar_resnet20", 128), 5),
        "augmentation": (prepare_augmentation(128), 50),
    }
    seconds = {name: [] for name in sides}
    for run, _ in sides.values():
        run(3)
    for _ in range(arguments.rounds):
        for name, (run, steps) in sides.items():
            started = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - started) / steps)
    step, augmentation = (1e3 * statistics.median(seconds[name]) for name in sides)
    print("| step, ms | crop, flip and normalisation, ms | share |")
    print("|---|---|---|")
    print(f"| {step:.1f} | {augmentation:.2f} | {augmentation / step:.2%} |")


if __name__ == "__main__":
    main()
