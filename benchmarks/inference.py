"""Milliseconds of an evaluation, ours and PyTorch's, measured in turn.

    python benchmarks/inference.py

Both take a batch of images that stays on the device to logits; float32 on a CPU, bfloat16 on a
GPU. PyTorch runs in inference_mode, eager in channels_last or compiled, whichever is faster when
alone. Then ours and it take turns, each in a process of its own, as both come: memory is not
kept. Figures are medians over the rounds, the ratio is that of neighbours in time, above 1 where
ours is faster.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # for train and tests.models.torch_resnet

from train_step import Worker, torch_compiled, torch_net, torch_place

NETS = ("resnet18", "resnet50", "resnext50_32x4d", "cifar_resnet18")
VARIANTS = ("channels_last", "compile", "compile channels_last")


def image_size(net: str) -> int:
    return 32 if net.startswith("cifar") else 224


def prepare_ours(net: str, batch_size: int) -> Callable[[int], None]:
    """A function that evaluates the batch so many times, one after the other."""
    import jax
    import jax.numpy as jnp

    import flax_resnet as fr

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = fr.create_model(net, dtype=dtype)
    shape = (batch_size, image_size(net), image_size(net), 3)
    images = jax.random.normal(jax.random.key(1), shape)
    variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images[:1])
    predict = jax.jit(partial(model.apply, train=False))

    def run(times: int) -> None:
        for _ in range(times):
            predict(variables, images).block_until_ready()

    return run


def prepare_torch(net: str, batch_size: int, variant: str) -> Callable[[int], None]:
    """As `prepare_ours`, in PyTorch."""
    import torch

    model = torch_net(net, variant).eval()
    images = torch.randn(batch_size, 3, image_size(net), image_size(net))
    images = images.to(**torch_place(variant))
    predict = torch_compiled(model, variant)

    @torch.inference_mode()
    def run(times: int) -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            for _ in range(times):
                predict(images)
                if images.is_cuda:
                    torch.cuda.synchronize()

    return run


def best_variant(net: str, batch_size: int) -> str:
    seconds = {}
    for variant in VARIANTS:
        worker = Worker(prepare_torch, net, batch_size, variant, keep_memory=False, seconds=1.0)
        seconds[variant] = statistics.median(worker.seconds_per_step() for _ in range(3))
        worker.stop()
        print(f"{net} {variant}: {1000 * seconds[variant]:.1f} ms", file=sys.stderr)
    return min(seconds, key=seconds.__getitem__)


def measure(net: str, batch_size: int, rounds: int) -> None:
    """Prints a line of the table."""
    best = best_variant(net, batch_size)
    workers = [
        Worker(prepare, net, batch_size, *arguments, keep_memory=False, seconds=1.0)
        for prepare, arguments in ((prepare_ours, ()), (prepare_torch, (best,)))
    ]
    seconds = [[worker.seconds_per_step() for worker in workers] for _ in range(rounds)]
    for worker in workers:
        worker.stop()
    ours, torch = (1000 * statistics.median(side) for side in zip(*seconds, strict=True))
    ratio = statistics.median(t / o for o, t in seconds)
    print(f"| {net} | {batch_size} | {ours:.1f} | {torch:.1f} ({best}) | {ratio:.2f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our evaluation against PyTorch's.")
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 32])
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()

    print("| net | batch | ours, ms | PyTorch best, ms | ratio |")
    print("|---|---|---|---|---|", flush=True)
    for net in arguments.nets:
        for batch_size in arguments.batch_sizes:
            measure(net, batch_size, arguments.rounds)


if __name__ == "__main__":
    main()
