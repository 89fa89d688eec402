"""Peak resident memory of a CIFAR-10 run on a CPU, and what doubling the data adds.

    TFDS_DATA_DIR=... python benchmarks/memory.py

train.py on cifar_resnet20, batch 128, 20 steps, on half of the training images and on all of
them, from memory and streamed by one worker process.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def peak(images: int, feed: str) -> float:
    """MB of the largest process of a run at its peak."""
    with tempfile.TemporaryDirectory() as workdir:
        run = subprocess.Popen(
            [
                *(sys.executable, "train.py", "--quiet", f"--workdir={workdir}"),
                "--config=configs/cifar_resnet20.py",
                "--config.num_steps=20",
                f"--config.train_split=train[:{images}]",
                "--config.eval_split=test[:512]",
                f"--config.data_feed={feed}",
                "--config.stream_workers=1",
            ],
            cwd=ROOT,
        )
        _, status, usage = os.wait4(run.pid, 0)
    if status:
        sys.exit(f"train.py has failed, status {status}")
    return usage.ru_maxrss * 1024 / 1e6


def main() -> None:
    print("| feed | training images | peak, MB |")
    print("|---|---|---|")
    for feed in ("resident", "stream"):
        for images in (25_000, 50_000):
            print(f"| {feed} | {images} | {peak(images, feed):.0f} |", flush=True)


if __name__ == "__main__":
    main()
