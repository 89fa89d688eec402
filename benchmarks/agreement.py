"""What a recipe reaches, ours and PyTorch's, on the same batches from the same weights.

    TFDS_DATA_DIR=... python benchmarks/agreement.py --config configs/cifar_resnet20_quick.py \\
        --workdir runs/agreement [--seeds 0 1 2] [--config.KEY=VALUE ...]

Ours is train.py. PyTorch's twin of the net then begins with the same weights and takes the same
batches, which our code shuffles, augments and normalises; its layers, loss and optimizer are its
own. So the two differ by the rounding of sums, which training makes larger. Accuracies are those
of the last epoch, on the whole test split. In the end stands the mean difference with its 95%
interval (Student's t, by pairs of one seed).

Both go on where they were stopped: the folder has a run of ours for each seed, and of PyTorch's
the newest epoch and what the last one reached. It is for recipes with the optimizer "sgd",
without mixing of images.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
import train_step
from results import interval, last_accuracy
from speedrun import torch_accuracy, torch_optimizer

import flax_resnet as fr
from flax_resnet.data import Dataset, epoch_order
from flax_resnet.data.augment import normalize_values
from flax_resnet.training.config import check_config
from flax_resnet.training.own import Own
from flax_resnet.training.plan import make_plan
from flax_resnet.training.programs import make_augment, random_keys

ROOT = Path(__file__).parents[1]
VARIANT = "channels_last"


def ours(workdir: Path, arguments: list[str]) -> float:
    """Test accuracy of a run of train.py, or of what is left of it."""
    command = [sys.executable, str(ROOT / "train.py"), f"--workdir={workdir}", *arguments]
    subprocess.run(command, check=True)
    return last_accuracy(workdir)


def theirs(run: Path, folder: Path) -> float:
    """Test accuracy of PyTorch's training after a run of ours, or of what is left of it."""
    result = folder / "accuracy.json"
    if result.exists():
        return json.loads(result.read_text())
    config = check_config(json.loads((run / "config.json").read_text()))
    assert config.optimizer == "sgd"
    others = (config.mixup, config.cutmix, config.random_erasing, config.ema_decay)
    assert not any(others)
    plan = make_plan(config, run, Own())
    train, test = plan.data.train, plan.data.test
    assert isinstance(train, Dataset)
    assert plan.learning_rate
    augment = make_augment(plan)

    @jax.jit
    def batch_of(images, index, epoch):
        images = augment(images, index, epoch)
        images = normalize_values(images, plan.data.mean, plan.data.std)
        return images.transpose(0, 3, 1, 2)

    shape = (1, *train.image_shape)
    variables = plan.model.init(random_keys(config.seed).init, jnp.zeros(shape), train=False)
    channels = train.image_shape[-1]
    model = train_step.torch_net(config.model, VARIANT, in_channels=channels, **config.model_fields)
    model.load_state_dict(fr.to_torch(plan.model, variables))
    optimizer = torch_optimizer(model, config)
    step = train_step.torch_step(model, optimizer, VARIANT, config.label_smoothing)
    rates = np.asarray(jax.vmap(plan.learning_rate)(jnp.arange(plan.total_steps)))
    place = train_step.torch_place(VARIANT)

    folder.mkdir(parents=True, exist_ok=True)
    kept, done = folder / "newest.pt", 0
    if kept.exists():
        newest = torch.load(kept)
        model.load_state_dict(newest["model"])
        optimizer.load_state_dict(newest["optimizer"])
        done = newest["done"]
    for epoch in range(done // plan.steps_per_epoch, plan.num_epochs):
        order = epoch_order(config.seed, epoch, len(train))
        for position in range(min(plan.steps_per_epoch, plan.total_steps - done)):
            index = order[position * config.batch_size :][: config.batch_size]
            images = batch_of(train.images[index], index, epoch)
            for group in optimizer.param_groups:
                group["lr"] = float(rates[done])
            step(
                torch.from_numpy(np.array(images)).to(**place),
                torch.from_numpy(train.labels[index]).long().to(place["device"]),
            )
            done += 1
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "done": done}
        torch.save(state, partial := kept.with_suffix(".partial"))
        partial.replace(kept)
        print(f"PyTorch: epoch {epoch + 1}/{plan.num_epochs}", file=sys.stderr)
    accuracy = torch_accuracy(model, VARIANT, test, plan.data.mean, plan.data.std)
    result.write_text(json.dumps(accuracy))
    return accuracy


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What a recipe reaches, ours and PyTorch's, on the same batches.",
        epilog="Everything else is for train.py, such as --config=RECIPE and --config.KEY=VALUE.",
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options, rest = parser.parse_known_args()
    print("| seed | ours | PyTorch |\n|---|---|---|", flush=True)
    pairs = []
    for seed in options.seeds:
        run = options.workdir / f"ours-{seed}"
        one = ours(run, [*rest, f"--config.seed={seed}"])
        other = theirs(run, options.workdir / f"torch-{seed}")
        print(f"| {seed} | {one:.2%} | {other:.2%} |", flush=True)
        pairs.append((one, other))
    print(f"ours - PyTorch: {interval(pairs)} points")


if __name__ == "__main__":
    main()
