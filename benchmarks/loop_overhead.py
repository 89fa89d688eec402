"""Images a second of `fr.train` over an epoch, beside those of the bare training step.

    TFDS_DATA_DIR=... python benchmarks/loop_overhead.py [--stream]

The run is cifar_resnet20 on CIFAR-10, batch 128: shuffling, cropping, flipping, metrics
and the bar included; compilation, evaluation and checkpoints are not in the run's own
images_per_second. The bare step is the compiled `train_step` on one batch that stays on
the device. They take turns in one process, and the figures are medians over the rounds.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import train_step

import flax_resnet as fr


def run_epoch(net: str, batch_size: int, steps: int, data_feed: str) -> float:
    """Images a second of `fr.train` in its second epoch, of that many steps."""
    config = fr.default_config()
    config.model = net
    config.batch_size = batch_size
    config.train_split = f"train[:{batch_size * steps}]"
    config.eval_split = "test[:512]"
    config.num_epochs = 2
    config.data_feed = data_feed
    with tempfile.TemporaryDirectory() as workdir:
        fr.train(config, workdir)
        _, line = Path(workdir, "metrics.jsonl").read_text().splitlines()
    return json.loads(line)["images_per_second"]


def main() -> None:
    parser = argparse.ArgumentParser(description="The training loop against its bare step.")
    parser.add_argument("--stream", action="store_true", help="read the data from disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100, help="of an epoch")
    arguments = parser.parse_args()

    data_feed = "stream" if arguments.stream else "resident"
    run_step = train_step.prepare_ours("cifar_resnet20", 128)
    run_step(3)
    bare, loop = [], []
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        run_step(arguments.steps)
        bare.append(128 * arguments.steps / (time.perf_counter() - started))
        loop.append(run_epoch("cifar_resnet20", 128, arguments.steps, data_feed))
    ratio = statistics.median(one / other for one, other in zip(loop, bare, strict=True))
    print("| feed | fr.train, images/s | bare step, images/s | ratio |")
    print("|---|---|---|---|")
    print(
        f"| {data_feed} | {statistics.median(loop):.0f} "
        f"| {statistics.median(bare):.0f} | {ratio:.3f} |"
    )


if __name__ == "__main__":
    main()
