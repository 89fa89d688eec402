"""Images a second of a training step, ours and PyTorch's, measured in turn.

    python benchmarks/train_step.py
    python benchmarks/train_step.py --nets resnext50_32x4d --batch_sizes 8 --image_size 224

Both train on one batch that stays on the device: forward, backward and SGD with momentum
and weight decay; float32 on a CPU, bfloat16 compute on a GPU, where `torch.compile` has
mode="max-autotune". Each PyTorch variant first runs alone for a while, with memory kept on a
CPU; the fastest is "PyTorch best". Then ours and it take turns, each in a process of its own, on
a CPU with the allocator's default settings and with train.py's, which keep memory ("kept"), on
both sides. Figures are medians over the rounds, the ratio is that of neighbours in time.

GFLOP/s count the multiplications and additions of convolutions and fc, as
torch.utils.flop_counter does; "of matmul" is their share of the rate of a large matrix
product measured in the same rounds, more than all of it where Winograd's way takes fewer.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for train and tests.models.torch_resnet

from flax_resnet.memory import KEEP_MEMORY, reuse_memory

NETS = ("cifar_resnet20", "lab10_resnet50", "cifar_resnet18")
VARIANTS = ("eager", "channels_last", "compile", "compile channels_last")


def prepare_ours(net: str, batch_size: int, image_size: int = 32) -> Callable[[int], None]:
    """A function that does that many steps and waits for the last."""
    import jax
    import jax.numpy as jnp

    import flax_resnet as fr
    from flax_resnet.training.config import Config
    from flax_resnet.training.optimizer import make_optimizer
    from flax_resnet.training.steps import create_state, train_step

    if os.environ.get("GLIBC_TUNABLES") == KEEP_MEMORY:
        reuse_memory()
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    model = fr.create_model(net, dtype=dtype)
    optimizer = make_optimizer(Config(nesterov=False), lambda step: 0.1)
    shape = (image_size, image_size, 3)
    state = jax.jit(partial(create_state, model, optimizer, image_shape=shape))(jax.random.key(0))
    batch = {
        "image": jax.random.normal(jax.random.key(1), (batch_size, *shape)),
        "label": jnp.arange(batch_size) % 10,
    }
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer), donate_argnums=0)

    def run(steps: int) -> None:
        nonlocal state
        metrics = {}
        for _ in range(steps):
            state, metrics = step(state, batch)
        jax.block_until_ready(metrics)

    return run


def torch_place(variant: str) -> dict[str, Any]:
    """Device and layout of a variant's images and weights, as `Tensor.to` takes them."""
    import torch

    layout = torch.channels_last if "channels_last" in variant else torch.contiguous_format
    return {"device": "cuda" if torch.cuda.is_available() else "cpu", "memory_format": layout}


def torch_net(net: str, variant: str, **fields) -> Any:
    """PyTorch's twin of a net, where and as the variant has it."""
    from tests.models import torch_resnet

    return torch_resnet.create(net, **fields).train().to(**torch_place(variant))


def torch_compiled(model: Any, variant: str) -> Any:
    """The model, compiled where the variant has it; on a GPU with CUDA graphs."""
    import torch

    mode = "max-autotune" if torch.cuda.is_available() else "default"
    return torch.compile(model, mode=mode) if "compile" in variant else model


def torch_step(model: Any, optimizer: Any, variant: str, label_smoothing: float = 0.0) -> Callable:
    """A function of images [N, C, H, W] and labels that does a step in PyTorch."""
    import torch

    torch.backends.cudnn.benchmark = True
    predict = torch_compiled(model, variant)
    loss_of = torch.nn.CrossEntropyLoss(label_smoothing=label_smoothing)

    def step(images, labels) -> None:
        optimizer.zero_grad()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.is_cuda):
            loss = loss_of(predict(images), labels)
        loss.backward()
        optimizer.step()

    return step


def torch_sgd(model: Any) -> Any:
    """The optimizer of `prepare_ours`."""
    import torch

    fused = torch.cuda.is_available() or None  # fewer passes over memory
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4, fused=fused)


def prepare_torch(
    net: str, batch_size: int, variant: str, image_size: int = 32, **fields
) -> Callable[[int], None]:
    """As `prepare_ours`, in PyTorch."""
    import torch

    model = torch_net(net, variant, **fields)
    step = torch_step(model, torch_sgd(model), variant)
    images = torch.randn(batch_size, 3, image_size, image_size).to(**torch_place(variant))
    labels = (torch.arange(batch_size) % 10).to(images.device)

    def run(steps: int) -> None:
        for _ in range(steps):
            step(images, labels)
        if images.is_cuda:
            torch.cuda.synchronize()

    return run


def prepare_matmul(size: int) -> Callable[[int], None]:
    """Products of two square matrices, in the type of `prepare_ours`."""
    import jax
    import jax.numpy as jnp

    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    a, b = jax.random.normal(jax.random.key(0), (2, size, size), dtype)
    multiply = jax.jit(jnp.matmul)

    def run(steps: int) -> None:
        product = a
        for _ in range(steps):
            product = multiply(a, b)
        product.block_until_ready()

    return run


def digits(rate: float) -> str:
    """Three of them, or all before the point."""
    return f"{rate:,.0f}" if rate >= 1000 else f"{rate:.3g}"


def work(connection: Connection, prepare: Callable, arguments: tuple) -> None:
    """A process that runs as many steps as it is told to and answers with the seconds."""
    # Else the first process would take most of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    run = prepare(*arguments)
    run(3)
    while steps := connection.recv():
        run(1)  # slower after the other's turn
        started = time.perf_counter()
        run(steps)
        connection.send(time.perf_counter() - started)


class Worker:
    """A process with one thing to time; about `seconds` of it at a time."""

    def __init__(self, prepare: Callable, *arguments, keep_memory: bool, seconds: float = 3.0):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        # Else the program would wait for the others where one of them fails.
        self.process = context.Process(target=work, args=(other, prepare, arguments), daemon=True)
        # glibc reads it when the process starts.
        os.environ["GLIBC_TUNABLES"] = KEEP_MEMORY if keep_memory else ""
        self.process.start()
        other.close()
        self.steps = 2
        self.steps = max(2, round(seconds / self.seconds_per_step()))

    def seconds_per_step(self) -> float:
        self.connection.send(self.steps)
        return self.connection.recv() / self.steps

    def stop(self) -> None:
        self.connection.send(0)
        self.process.join()


def best_variant(
    net: str,
    batch_size: int,
    keep_memory: bool,
    variants: Sequence[str] = VARIANTS,
    **fields,
) -> str:
    """The PyTorch variant with the shortest step."""
    if len(variants) == 1:
        return variants[0]
    seconds = {}
    for variant in variants:
        prepare = partial(prepare_torch, **fields)
        worker = Worker(prepare, net, batch_size, variant, keep_memory=keep_memory)
        seconds[variant] = statistics.median(worker.seconds_per_step() for _ in range(3))
        worker.stop()
        print(f"{net} {variant}: {batch_size / seconds[variant]:.0f} images/s", file=sys.stderr)
    return min(seconds, key=seconds.__getitem__)


def flops(net: str, image_size: int = 32) -> int:
    """Floating-point operations of a training step on one image."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from tests.models import torch_resnet

    model = torch_resnet.create(net)
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(2, 3, image_size, image_size)).sum().backward()
    return counter.get_total_flops() // 2


def measure(
    net: str,
    batch_size: int,
    image_size: int,
    rounds: int,
    variants: Sequence[str],
    seconds_a_time: float,
    on_gpu: bool,
) -> None:
    """Prints a line of the table for each setting of the allocator."""
    best = best_variant(
        net, batch_size, keep_memory=not on_gpu, variants=variants, image_size=image_size
    )
    product_flops = 2 * (size := 8192 if on_gpu else 2048) ** 3
    matmul = Worker(prepare_matmul, size, keep_memory=False, seconds=seconds_a_time / 3)
    settings = (False,) if on_gpu else (False, True)

    def start(side, prepare, arguments, kept):
        worker = Worker(
            prepare, net, batch_size, *arguments, keep_memory=kept, seconds=seconds_a_time
        )
        # At once: PyTorch may compile for longer than there is time.
        rate = digits(batch_size / worker.seconds_per_step())
        print(f"{net} {batch_size} {side}: {rate} images/s", file=sys.stderr, flush=True)
        return worker

    workers = {
        (side, kept): start(side, prepare, arguments, kept)
        for kept in settings
        for side, prepare, arguments in (
            ("ours", prepare_ours, (image_size,)),
            ("torch", prepare_torch, (best, image_size)),
        )
    }
    seconds = {key: [] for key in workers}
    product_seconds = []
    for _ in range(rounds):
        for key, worker in workers.items():
            seconds[key].append(worker.seconds_per_step())
        product_seconds.append(matmul.seconds_per_step())
    for worker in (*workers.values(), matmul):
        worker.stop()

    matmul_rate = product_flops / statistics.median(product_seconds)
    for kept in settings:
        ours, torch = (statistics.median(seconds[side, kept]) for side in ("ours", "torch"))
        ratios = [t / o for o, t in zip(seconds["ours", kept], seconds["torch", kept], strict=True)]
        rate = flops(net, image_size) * batch_size / ours
        print(
            f"| {net} | {batch_size} | {'kept' if kept else 'default'} "
            f"| {digits(batch_size / ours)} | {digits(batch_size / torch)} ({best}) "
            f"| {statistics.median(ratios):.2f} "
            f"| {rate / 1e9:.0f} | {rate / matmul_rate:.0%} of {matmul_rate / 1e9:.0f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Our training step against PyTorch's.")
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[128])
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a measurement, about")
    parser.add_argument("--variants", nargs="+", default=VARIANTS, help="of PyTorch")
    arguments = parser.parse_args()

    import torch

    print("| net | batch | memory | ours | PyTorch best | ratio | GFLOP/s | of matmul |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for net in arguments.nets:
        for batch_size in arguments.batch_sizes:
            measure(
                net,
                batch_size,
                arguments.image_size,
                arguments.rounds,
                arguments.variants,
                arguments.seconds,
                torch.cuda.is_available(),
            )


if __name__ == "__main__":
    main()
