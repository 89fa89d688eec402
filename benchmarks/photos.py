"""Photographs on their way to the net: decoding, cropping, waiting for them, memory.

    python benchmarks/photos.py [decode] [kept] [waiting] [memory] [--data ../shared/data/ants_bees]

decode: images a second of one worker process, ours and that of torch.utils.data.DataLoader, which
take turns on the same files: decode, random resized crop to 224, batches of 32, uint8. Ours is
Grain's process as the trainer starts it. PyTorch's dataset is written out below as torchvision
has it on Pillow images (Image.open, convert, crop box, resize), for torchvision need not be
installed. The 500x375 pictures are photographs as they are; the large ones are photographs
enlarged to 1600x1200 (Lanczos, JPEG quality 90).

kept: the same crops by one thread, read from the files and from pictures that stay decoded.

waiting: share of a step of resnet50 at 224, batch 8, that `fr.train` waits for data, at 0, 1 and 2
worker processes; the first two steps are left out.

memory: of the program and its worker processes (proportional set size), over an epoch.

Figures are medians over the rounds, ratios those of neighbours in time.
"""

import argparse
import contextlib
import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from PIL import Image

import flax_resnet as fr
from flax_resnet.data import Folder, Photos, Sizing, TrainBatches, stream
from flax_resnet.progress import quietly
from flax_resnet.training import data as training_data
from flax_resnet.training import feeds

SIZE, BATCH = 224, 32
SIZING = Sizing(SIZE, 256)


def make_folder(data: Path, folder: Path, *, large: bool) -> None:
    """train/photos/*.jpg of one size: those of `data` that have it, or enlarged ones."""
    inside = folder / "train" / "photos"
    inside.mkdir(parents=True)
    for path in sorted(data.glob("train/*/*.jpg")):
        with Image.open(path) as image:
            if image.size == (500, 375):
                if large:
                    image = image.resize((1600, 1200), Image.Resampling.LANCZOS)
                    image.save(inside / path.name, quality=90)
                else:
                    (inside / path.name).write_bytes(path.read_bytes())


def pictures(folder: Path) -> Photos:
    return Photos(Folder(str(folder), "train"), SIZING, random_crops=True)


class TorchPhotos(torch.utils.data.Dataset):
    """ImageFolder with RandomResizedCrop(224) and PILToTensor, as torchvision does them."""

    def __init__(self, paths: list[str], length: int):
        self._paths, self._length = paths, length

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        with open(self._paths[i % len(self._paths)], "rb") as file:
            image = Image.open(file).convert("RGB")
        top, left, height, width = self._box(*image.size)
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR)
        return torch.as_tensor(np.array(image, copy=True)).permute(2, 0, 1), 0

    def _box(self, width: int, height: int) -> tuple[int, int, int, int]:
        log_ratio = torch.log(torch.tensor((3 / 4, 4 / 3)))
        for _ in range(10):
            area = width * height * torch.empty(1).uniform_(0.08, 1).item()
            ratio = torch.exp(torch.empty(1).uniform_(*log_ratio.tolist())).item()
            w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if 0 < w <= width and 0 < h <= height:
                top = torch.randint(0, height - h + 1, (1,)).item()
                left = torch.randint(0, width - w + 1, (1,)).item()
                return int(top), int(left), h, w
        return 0, 0, height, width  # for these sizes the ratio is allowed


def rate(read: Iterator[Any], count: int) -> float:
    """Images a second of so many batches, after those that were read ahead."""
    for _ in itertools.islice(read, 6):
        pass
    started = time.perf_counter()
    for _ in itertools.islice(read, count):
        pass
    return BATCH * count / (time.perf_counter() - started)


def our_rate(split: Photos, count: int, workers: int) -> float:
    made = TrainBatches(split, 0, BATCH, slice(None), 0, count + 10)
    with contextlib.closing(stream(made, workers)) as read:
        return rate(read, count)


def torch_rate(paths: list[str], count: int, workers: int) -> float:
    loader = torch.utils.data.DataLoader(
        TorchPhotos(paths, BATCH * (count + 10)), BATCH, shuffle=True, num_workers=workers
    )
    return rate(iter(loader), count)


def compare_decoding(folders: dict[str, Path], rounds: int) -> None:
    print("| JPEGs | ours, images/s of a worker | PyTorch, images/s of a worker | ratio |")
    print("|---|---|---|---|")
    for name, folder in folders.items():
        split = pictures(folder)
        paths, count = Folder(str(folder), "train").paths, 30 if name == "500x375" else 8
        rates = [(our_rate(split, count, 1), torch_rate(paths, count, 1)) for _ in range(rounds)]
        ours, theirs = (statistics.median(side) for side in zip(*rates, strict=True))
        ratio = statistics.median(one / other for one, other in rates)
        print(f"| {name} | {ours:.0f} | {theirs:.0f} | {ratio:.2f} |", flush=True)


def compare_kept(folders: dict[str, Path], rounds: int) -> None:
    print("| JPEGs | from files, images/s of a thread | kept decoded | ratio |")
    print("|---|---|---|---|")
    for name, folder in folders.items():
        split = pictures(folder)
        kept = split.keeping()
        our_rate(kept, 10, 0)  # reads them
        rates = [(our_rate(kept, 20, 0), our_rate(split, 20, 0)) for _ in range(rounds)]
        ours, theirs = (statistics.median(side) for side in zip(*rates, strict=True))
        ratio = statistics.median(one / other for one, other in rates)
        print(f"| {name} | {theirs:.0f} | {ours:.0f} | {ratio:.2f} |", flush=True)


def measure_waiting(folder: Path, processes: list[int], steps: int) -> None:
    print("| worker processes | step, s | waiting for data, s | share |")
    print("|---|---|---|---|")
    for workers in processes:
        with quietly():
            seconds, waits = train(folder, workers, steps)
        print(f"| {workers} | {seconds:.2f} | {waits:.4f} | {waits / seconds:.2%} |", flush=True)


def train(folder: Path, workers: int, steps: int) -> tuple[float, float]:
    """Seconds a step of fr.train, and how many of them it waits for data."""
    waits: list[float] = []
    ends: list[float] = []

    def timed(*arguments: Any) -> Iterator[Any]:
        with contextlib.closing(training_data.read_ahead(*arguments)) as read:
            while True:
                started = time.perf_counter()
                batch = next(read, None)
                if batch is None:
                    return
                ends.append(time.perf_counter())
                waits.append(ends[-1] - started)
                yield batch

    config = fr.default_config()
    config.dataset = f"folder:{folder}"
    config.train_split = "train+train+train"  # an epoch is longer than the run
    config.eval_split = "train[:8]"
    config.image_size, config.crop = SIZE, "resized"
    config.normalize = "imagenet"
    config.model = "resnet50"
    config.batch_size = config.eval_batch_size = 8
    config.num_steps = steps
    config.data_feed, config.stream_workers = "stream", workers
    config.checkpoint_minutes = 1000.0
    before, feeds.read_ahead = feeds.read_ahead, timed
    try:
        with tempfile.TemporaryDirectory() as workdir:
            fr.train(config, workdir)
    finally:
        feeds.read_ahead = before
    # The first batch is there before the first step.
    waits, ends = waits[3:], ends[2:]
    return statistics.median(np.diff(ends)), statistics.median(waits)


def measure_memory(folders: dict[str, Path]) -> None:
    print("| JPEGs | images read | memory, MB |")
    print("|---|---|---|")
    for name, folder in folders.items():
        count = 60 if name == "500x375" else 20
        made = TrainBatches(pictures(folder), 0, BATCH, slice(None), 0, 4 * count)
        with contextlib.closing(stream(made, 2)) as read:
            for quarter in range(1, 5):
                for _ in itertools.islice(read, count - (quarter == 4)):
                    pass
                print(f"| {name} | {quarter * count * BATCH} | {memory():.0f} |", flush=True)


def memory() -> float:
    """MB of this process and those that it has started, what they share counted once."""
    mine = Path("/proc/self/task").glob("*/children")
    children = [pid for file in mine for pid in file.read_text().split()]
    total = 0
    for pid in ("self", *children):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1])
    return total * 1024 / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description="Photographs on their way to the net.")
    parts = ("decode", "kept", "waiting", "memory")
    parser.add_argument("parts", nargs="*", default=parts)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/ants_bees"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2], help="to wait for")
    parser.add_argument("--steps", type=int, default=12, help="of a run that may wait")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # as train.py
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"500x375": Path(scratch, "small"), "1600x1200": Path(scratch, "large")}
        for name, folder in folders.items():
            make_folder(arguments.data, folder, large=name != "500x375")
        runs: dict[str, Callable[[], None]] = {
            "decode": lambda: compare_decoding(folders, arguments.rounds),
            "kept": lambda: compare_kept(folders, arguments.rounds),
            "waiting": lambda: measure_waiting(
                folders["500x375"], arguments.workers, arguments.steps
            ),
            "memory": lambda: measure_memory(folders),
        }
        for part in arguments.parts:
            runs[part]()
            print()


if __name__ == "__main__":
    main()
