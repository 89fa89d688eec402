"""Seconds of training of configs/cifar_speedrun.py, and what they reach, ours and PyTorch's.

    TFDS_DATA_DIR=... python benchmarks/speedrun.py [--rounds 3] [--workdir runs/speedrun]

Both train the recipe's net on one device from the same weights, with the same learning rates,
weight decay, label smoothing and augmentation, the data on the device; float32 on a CPU,
bfloat16 compute on a GPU. Ours is train.py; PyTorch's is the fastest variant of train_step.py.
They take turns, each run in a process of its own, on a CPU with memory kept; round i has seed i.
Seconds are of the steps of all epochs, batches included: not of compilation, evaluation and what
ours writes between two epochs. Accuracies are of the whole test split, without test-time
augmentation.
"""

import argparse
import json
import os
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_step
from training_loop import in_a_process, torch_data

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "configs" / "cifar_speedrun.py"


def recipe(seed: int) -> Any:
    config = runpy.run_path(str(RECIPE))["get_config"]()
    config.seed = seed
    return config


def ours(seed: int, workdir: Path) -> tuple[float, float]:
    """Seconds and accuracy of a run of ours."""
    arguments = [f"--config={RECIPE}", f"--config.seed={seed}", f"--workdir={workdir}"]
    subprocess.run([sys.executable, ROOT / "train.py", *arguments], check=True)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    images = recipe(seed).batch_size * lines[0]["step"]
    return sum(images / line["images_per_second"] for line in lines), lines[-1]["test_accuracy"]


def torch_run(seed: int, variant: str) -> tuple[float, float]:
    """Seconds and accuracy of a run of PyTorch's."""
    import jax

    # JAX makes the first weights and the learning rates; a GPU is PyTorch's alone.
    jax.config.update("jax_platforms", "cpu")
    import numpy as np
    import torch

    import flax_resnet as fr
    from flax_resnet.data import channel_statistics
    from flax_resnet.training.config import check_config
    from flax_resnet.training.optimizer import learning_rate_schedule
    from flax_resnet.training.programs import random_keys

    config = check_config(recipe(seed))
    assert config.horizontal_flip  # by chance, as `torch_data` does
    torch.manual_seed(seed)
    train, test = (fr.load_dataset(config.dataset, split) for split in ("train", "test"))
    epoch = torch_data(
        train,
        variant,
        batch_size=config.batch_size,
        crop_padding=config.crop_padding,
        cutout=config.cutout,
    )

    net = fr.create_model(config.model, **config.model_fields)
    init_key, *_ = random_keys(seed)
    variables = net.init(init_key, jax.numpy.zeros((1, *train.image_shape)), train=False)
    model = train_step.torch_net(config.model, variant, **config.model_fields)
    optimizer = torch_optimizer(model, config)
    step = train_step.torch_step(model, optimizer, variant, config.label_smoothing)
    for _, batch in zip(range(3), epoch(), strict=False):
        step(*batch)  # compiles, and records a CUDA graph
    model.load_state_dict(fr.to_torch(net, variables))
    optimizer.state.clear()

    steps_per_epoch = len(train) // config.batch_size
    total_steps = config.num_epochs * steps_per_epoch
    schedule = learning_rate_schedule(
        config, steps_per_epoch=steps_per_epoch, total_steps=total_steps
    )
    rates = iter(np.asarray(jax.vmap(schedule)(jax.numpy.arange(total_steps))))
    started = time.perf_counter()
    for _ in range(config.num_epochs):
        for batch in epoch():
            rate = float(next(rates))
            for group in optimizer.param_groups:
                group["lr"] = rate
            step(*batch)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started

    mean, std = channel_statistics([train.images])
    return seconds, torch_accuracy(model, variant, test, mean, std)


def torch_optimizer(model: Any, config: Any) -> Any:
    """PyTorch's of a config, whose learning rate is set before every step."""
    import torch

    of_others = config.weight_decay * config.decay_bn_and_bias
    return torch.optim.SGD(
        [
            {"params": [p for p in model.parameters() if p.ndim > 1]},
            {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": of_others},
        ],
        momentum=config.momentum,
        nesterov=config.nesterov,
        weight_decay=config.weight_decay,
        fused=torch.cuda.is_available() or None,
    )


def torch_accuracy(model: Any, variant: str, test: Any, mean: Any, std: Any) -> float:
    """On a whole split, normalised by these."""
    import torch

    model.eval()
    place = train_step.torch_place(variant)
    autocast = torch.autocast(place["device"], torch.bfloat16, enabled=place["device"] == "cuda")
    correct = 0
    with torch.no_grad(), autocast:
        for at in range(0, len(test), 500):
            images = (test.images[at : at + 500] / 255 - mean) / std
            images = torch.from_numpy(images.transpose(0, 3, 1, 2)).float().to(**place)
            answers = model(images).argmax(1).cpu().numpy()
            correct += int((answers == test.labels[at : at + 500]).sum())
    return correct / len(test)


def main() -> None:
    parser = argparse.ArgumentParser(description="Our shortest training against PyTorch's.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workdir", type=Path, help="keeps our runs; a folder not there yet")
    parser.add_argument("--variant", help="of PyTorch; else the fastest")
    arguments = parser.parse_args()
    if arguments.workdir and arguments.workdir.exists():
        parser.error(f"--workdir: {arguments.workdir} is there already")

    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    import torch

    on_cpu = not torch.cuda.is_available()
    config = recipe(0)
    fields = {name: value for name, value in config.model_fields.items() if value is not None}
    variants = [arguments.variant] if arguments.variant else train_step.VARIANTS
    variant = train_step.best_variant(
        config.model, config.batch_size, keep_memory=on_cpu, variants=variants, **fields
    )
    # glibc reads it when the process of a run starts.
    os.environ["GLIBC_TUNABLES"] = train_step.KEEP_MEMORY if on_cpu else ""
    print("| seed | ours, s | accuracy | PyTorch, s | accuracy | ratio |")
    print("|---|---|---|---|---|---|", flush=True)
    ratios = []
    with tempfile.TemporaryDirectory() as temporary:
        for seed in range(arguments.rounds):
            runs: list[Any] = [(ours, seed, (arguments.workdir or Path(temporary)) / str(seed))]
            # The machine's speed drifts: neither side is always the first.
            runs.insert(seed % 2, (torch_run, seed, variant))
            done = {}
            for run in runs:
                done[run[0]] = seconds, accuracy = in_a_process(*run)
                print(f"{run[0].__name__}: {seconds:.0f} s, {accuracy:.2%}", file=sys.stderr)
            (our_seconds, our_accuracy), (seconds, accuracy) = done[ours], done[torch_run]
            ratios.append(seconds / our_seconds)
            print(
                f"| {seed} | {our_seconds:.0f} | {our_accuracy:.2%} "
                f"| {seconds:.0f} ({variant}) | {accuracy:.2%} | {ratios[-1]:.2f} |",
                flush=True,
            )
    print(f"median ratio: {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
