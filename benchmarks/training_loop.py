"""Images a second of whole training loops on CIFAR-10, ours and PyTorch's, in turn.

    TFDS_DATA_DIR=... python benchmarks/training_loop.py [--batch_sizes 128 512 1024]

Ours is `fr.train`. PyTorch's has the data on the device from the start, too: shuffle, crop,
flip and normalise there, then the step of train_step.py with torch.compile and
channels_last, bfloat16 autocast on a GPU. Every measurement is a process of its own, and
excludes what is compiled. Figures are medians over the rounds, the ratio is that of
neighbours in time. "of matmul" is the share that our loop has of the rate of a large matrix
product in the compute's type.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import train_step

VARIANT = "compile channels_last"


def ours(net: str, batch_size: int, steps: int) -> float:
    from loop_overhead import run_epoch

    return run_epoch(net, batch_size, steps, "resident")


def torch_data(
    dataset: Any, variant: str, *, batch_size: int, crop_padding: int, cutout: int = 0
) -> Callable[[], Iterator[Any]]:
    """A function that gives an epoch of batches in PyTorch: shuffled, cropped, flipped, hidden."""
    import torch

    from flax_resnet.data import channel_statistics

    place = train_step.torch_place(variant)
    device = place["device"]
    images = torch.from_numpy(dataset.images).to(device).permute(0, 3, 1, 2)
    labels = torch.from_numpy(dataset.labels).long().to(device)
    statistics = torch.tensor(channel_statistics([dataset.images]), device=device)
    mean, std = 255 * statistics[..., None, None]
    # Black pixels around, as torchvision's RandomCrop has them.
    padded = torch.nn.functional.pad(images, (crop_padding,) * 4)
    places = 2 * crop_padding + 1
    pixels, channels = torch.arange(32, device=device), torch.arange(3, device=device)

    def epoch():
        order = torch.randperm(len(images), device=device)
        for index in order[: len(order) // batch_size * batch_size].split(batch_size):
            top, left = torch.randint(places, (2, len(index), 1), device=device)
            columns = left + pixels
            flip = torch.rand(len(index), 1, device=device) < 0.5
            columns = torch.where(flip, columns.flip(1), columns)
            batch = padded[
                index[:, None, None, None],
                channels[None, :, None, None],
                (top + pixels)[:, None, :, None],
                columns[:, None, None, :],
            ]
            batch = (batch.float() - mean) / std
            if cutout:
                first = torch.randint(32, (2, len(index), 1), device=device) - cutout // 2
                covered = (first <= pixels) & (pixels < first + cutout)
                hidden = covered[0][:, None, :, None] & covered[1][:, None, None, :]
                batch = batch.masked_fill(hidden, 0.0)  # the mean
            yield batch.to(**place), labels[index]

    return epoch


def torch_loop(net: str, batch_size: int, steps: int, variant: str = VARIANT) -> float:
    import torch

    import flax_resnet as fr

    dataset = fr.load_dataset("cifar10", f"train[:{batch_size * steps}]")
    epoch = torch_data(dataset, variant, batch_size=batch_size, crop_padding=4)
    model = train_step.torch_net(net, variant)
    step = train_step.torch_step(model, train_step.torch_sgd(model), variant)

    def run() -> None:
        for batch in epoch():
            step(*batch)
        if torch.cuda.is_available():
            torch.cuda.synchronize()

    run()
    started = time.perf_counter()
    run()
    return len(dataset) / (time.perf_counter() - started)


def in_a_process(measure: Callable, *arguments) -> Any:
    # Not a Pool, which would wait for ever for a process that has died.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(measure, *arguments).result()


def matmul_flops(size: int) -> float:
    """Floating-point operations a second of a product of square matrices."""
    run = train_step.prepare_matmul(size)
    run(3)
    started = time.perf_counter()
    run(10)
    return 10 * 2 * size**3 / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our training loop against PyTorch's.")
    parser.add_argument("--net", default="cifar_resnet18")
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[128, 512, 1024])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=50_000, help="of an epoch")
    parser.add_argument("--variant", default=VARIANT, help="of PyTorch, see train_step.py")
    arguments = parser.parse_args()

    import torch

    size = 8192 if torch.cuda.is_available() else 2048
    print("| net | batch | fr.train, images/s | PyTorch, images/s | ratio | of matmul |")
    print("|---|---|---|---|---|---|", flush=True)
    for batch_size in arguments.batch_sizes:
        work = (arguments.net, batch_size, arguments.images // batch_size)
        rates = [
            (in_a_process(ours, *work), in_a_process(torch_loop, *work, arguments.variant))
            for _ in range(arguments.rounds)
        ]
        our_rate, torch_rate = (statistics.median(side) for side in zip(*rates, strict=True))
        ratio = statistics.median(one / other for one, other in rates)
        share = our_rate * train_step.flops(arguments.net) / in_a_process(matmul_flops, size)
        print(
            f"| {arguments.net} | {batch_size} | {our_rate:.0f} | {torch_rate:.0f} "
            f"| {ratio:.2f} | {share:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
