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


def peak(split: str, feed: str) -> tuple[float, float]:
    """MB of the run's process at its peak, and of the largest worker."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, __file__, workdir, split, feed]
        environment = os.environ | {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
        result = subprocess.run(
            command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
    run, worker = (int(kilobytes) / 1e3 for kilobytes in result.stdout.split())
    return run, worker


def run(workdir: str, split: str, feed: str) -> None:
    import flax_resnet as fr

    config = fr.default_config()
    config.model = "cifar_resnet20"
    config.train_split = split
    config.eval_split = "test[:512]"
    config.num_steps = 20
    config.data_feed = feed
    config.stream_workers = 1
    fr.train(config, workdir)
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        print(resource.getrusage(who).ru_maxrss)


def main() -> None:
    if len(sys.argv) > 1:
        return run(*sys.argv[1:])
    print("| feed | training images | run, MB | a worker, MB |")
    print("|---|---|---|---|")
    for feed in ("resident", "stream"):
        for images in (25_000, 50_000):
            own, worker = peak(f"train[:{images}]", feed)
            shown = f"{worker:.0f}" if feed == "stream" else "-"
            print(f"| {feed} | {images} | {own:.0f} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
