"""Logits and gradients on a GPU or TPU beside those of the CPU in float32.

    python benchmarks/parity.py [--nets cifar_resnet18 ...]

Every net has the same random weights and images on both, batch statistics in BatchNorm, and the
loss of training. On the device it computes in float32 with JAX's highest precision, and in
bfloat16 as it trains. It has one block a stage: through many with random weights, rounding grows
until the gradients have nothing in common. Errors are the Euclidean norm of the difference, as a
share of that of the CPU's: of the logits, and of the gradients of all parameters together. Exits
with 1 if one is above its limit in `LIMITS`.

The gradients' limits are the larger ones: where rounding moves a value past 0, ReLU's gradient
comes or goes. The CPU's own errors of these nets are, in float32 beside float64, up to 2.5e-6 and
3.7e-3, and in bfloat16 beside float32 up to 0.021 and 0.30.
"""

import argparse
import os
import sys
from functools import partial
from operator import le
from typing import Any

# The CPU beside whatever else there is.
if platforms := os.environ.get("JAX_PLATFORMS"):
    os.environ["JAX_PLATFORMS"] = platforms if "cpu" in platforms else f"{platforms},cpu"

import jax
import jax.numpy as jnp
import optax

import flax_resnet as fr
from flax_resnet.training import cross_entropy

NETS = (
    "cifar_resnet20",
    "cifar_resnet18",
    "lab10_resnet50",
    "cifar_preact_resnet18",
    "resnext50_32x4d",
)
# Of the logits and of the gradients.
LIMITS = {"float32": (1e-4, 2e-2), "bfloat16": (0.1, 0.6)}


def results(net: str, dtype: str, device: Any, batch_size: int) -> Any:
    """(logits, gradients) of a net on a device, as arrays of the host."""
    size = 32 if net.startswith(("cifar", "lab10")) else 64
    model = fr.create_model(net, num_classes=10, dtype=jnp.dtype(dtype))
    model = model.clone(layers=(1,) * len(model.layers))
    cpu = jax.local_devices(backend="cpu")[0]
    with jax.default_device(cpu):  # whose random numbers count on both
        images = jax.random.normal(jax.random.key(1), (batch_size, size, size, 3))
        variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)
        labels = jnp.arange(batch_size) % 10

    @jax.jit
    def compute(params, batch_stats, images, labels):
        def loss(params):
            variables = {"params": params, "batch_stats": batch_stats}
            logits, _ = model.apply(variables, images, train=True, mutable=["batch_stats"])
            return cross_entropy(jnp.float32(logits), labels).mean(), logits

        gradients, logits = jax.grad(loss, has_aux=True)(params)
        return logits, gradients

    operands = (variables["params"], variables["batch_stats"], images, labels)
    precision = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precision), jax.default_device(device):
        return jax.device_get(compute(*jax.device_put(operands, device)))


def error(ours: Any, reference: Any) -> float:
    """Of all arrays together, as a share of the reference's norm."""
    difference = jax.tree.map(lambda a, b: jnp.float32(a) - jnp.float32(b), ours, reference)
    return float(optax.tree.norm(difference) / optax.tree.norm(reference))


def main() -> None:
    parser = argparse.ArgumentParser(description="A device's numbers beside the CPU's.")
    parser.add_argument("--nets", nargs="+", default=NETS)
    parser.add_argument("--batch_size", type=int, default=32)
    arguments = parser.parse_args()
    device, cpu = jax.devices()[0], jax.local_devices(backend="cpu")[0]
    print(f"on {device.device_kind}\n\n| net | type | logits | gradients |\n|---|---|---:|---:|")
    wrong = False
    for net in arguments.nets:
        reference = results(net, "float32", cpu, arguments.batch_size)
        for dtype, limits in LIMITS.items():
            ours = results(net, dtype, device, arguments.batch_size)
            errors = [error(*pair) for pair in zip(ours, reference, strict=True)]
            print(f"| {net} | {dtype} | {errors[0]:.1e} | {errors[1]:.1e} |", flush=True)
            wrong |= not all(map(le, errors, limits))  # NaN is wrong
    sys.exit(wrong)


if __name__ == "__main__":
    main()
