"""Peak resident memory of a CIFAR-10 run on a CPU, and what doubling the data adds.

    TFDS_DATA_DIR=... python benchmarks/memory.py

cifar_resnet20, batch 128, 20 steps, on half of the training images and on all of them,
from memory and streamed by one worker process.
"""

import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from train import KEEP_MEMORY  # noqa: E402


def peak(split: str, feed: str) -> float:
    """MB of the run's process at its peak; its workers not counted."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, __file__, workdir, split, feed]
        environment = os.environ | {"GLIBC_TUNABLES": KEEP_MEMORY}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    return int(result.stdout) / 1e3


def run(workdir: str, split: str, feed: str) -> None:
    import jax

    import flax_resnet as fr

    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as train.py does

    config = fr.default_config()
    config.model = "cifar_resnet20"
    config.train_split = split
    config.eval_split = "test[:512]"
    config.num_steps = 20
    config.data_feed = feed
    config.stream_workers = 1
    fr.train(config, workdir)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)


def main() -> None:
    if len(sys.argv) > 1:
        return run(*sys.argv[1:])
    print("| feed | training images | peak, MB |")
    print("|---|---|---|")
    for feed in ("resident", "stream"):
        for images in (25_000, 50_000):
            print(f"| {feed} | {images} | {peak(f'train[:{images}]', feed):.0f} |", flush=True)


if __name__ == "__main__":
    main()
