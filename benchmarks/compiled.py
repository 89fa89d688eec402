"""What the compilers make of our training steps for GPUs and TPUs, none of which has to be there.

    pip install --no-deps jax-cuda13-plugin==V jax-cuda13-pjrt==V libtpu    # V: that of jax
    python benchmarks/compiled.py
    python benchmarks/compiled.py --cards h100 --programs cifar_resnet18:512 resnet50:256:224

A program is NET:BATCH[:PIXELS]. With 32x32 pixels it is what `train.py` calls on data that lies
on the device, 16 steps in a scan; with more, its single step on a batch that is streamed. The
compute is bfloat16. Nothing of it is run: figures are counted in the compiled program (its HLO),
for each step.

GB are what kernels read and write, each operand and result once, of those that are sliced the
slice. "copies" are kernels that do nothing but copy or transpose. Of a GPU every kernel takes at
least its bytes at the memory's rate, or its operations at the matrix units' if that is more;
the sum is "at best". Of a TPU the compiler itself estimates the cycles. Launches, collectives and
what a kernel falls short of are in neither.
"""

import argparse
import math
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # the plugins compile only
os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # where this machine would be asked which TPU it has

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import topologies

import flax_resnet as fr
from flax_resnet.training import create_state, cross_entropy, make_optimizer, programs
from flax_resnet.training.config import Config
from flax_resnet.training.data import Data
from flax_resnet.training.feeds import STEPS_A_CALL
from flax_resnet.training.mesh import by_example, make_mesh, replicated
from flax_resnet.training.plan import Plan
from flax_resnet.training.steps import TrainState


class Card(NamedTuple):
    """A device by its published figures.

    Attributes:
      flops: bfloat16 operations of its matrix units a second, dense.
      bandwidth: bytes of its memory a second.
      clock: cycles a second, of a TPU.
    """

    flops: float
    bandwidth: float
    clock: float = 0.0


CARDS = {
    # "NVIDIA H100 Tensor Core GPU" and "NVIDIA A100 Tensor Core GPU", data sheets, SXM, 80 GB.
    "h100": Card(989.4e12, 3.352e12),
    "a100": Card(312e12, 2.039e12),
    # "TPU v5e" and "TPU v6e", Google Cloud's documentation. The clock is that of which the matrix
    # units make these operations: four of 128x128; and as many as four of 256x256, since libtpu
    # has a large product take fewer cycles than the two in that documentation could.
    "v5e": Card(197e12, 819e9, 197e12 / (2 * 4 * 128**2)),
    "v6e": Card(918e12, 1640e9, 918e12 / (2 * 4 * 256**2)),
}
PROGRAMS = (
    "cifar_resnet18:128",
    "cifar_resnet18:512",
    "cifar_resnet20:128",
    "lab10_resnet50:128",
    "resnet50:256:224",
)


# An HLO module as text.

_SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2}
_SIZES |= {"f32": 4, "s32": 4, "u32": 4, "f64": 8, "s64": 8, "u64": 8, "token": 0}
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([\d,]*))?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = ")
_CALLED = re.compile(r"(?:calls|to_apply|body)=%?([\w.-]+)")
_NOT_RUN = {
    "after-all",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "parameter",
    "partition-id",
    "tuple",
}


class Shape(NamedTuple):
    """An array's type, its dimensions and, the fastest one first, how these lie in memory."""

    dtype: str
    dims: tuple[int, ...]
    layout: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.dims) * _SIZES[self.dtype]


@dataclass
class Instruction:
    """A line of a computation.

    Attributes:
      shapes: of the result, several of a tuple.
      attributes: all that stands behind the operands.
    """

    name: str
    opcode: str
    shapes: list[Shape]
    operands: list[str]
    attributes: str
    is_root: bool

    @property
    def bytes(self) -> int:
        return sum(shape.bytes for shape in self.shapes)

    @property
    def called(self) -> str | None:
        """The computation that it runs."""
        match = _CALLED.search(self.attributes)
        return match[1] if match else None

    @property
    def trip_count(self) -> int | None:
        """Of a loop; None where the compiler does not know it."""
        match = re.search(r'"known_trip_count":\{"n":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    @property
    def target(self) -> str:
        """The library's function of a custom call, such as "__cudnn$convForward"."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""


Computation = dict[str, Instruction]


def _closing(text: str, start: int) -> int:
    """The place behind the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.end()
    raise ValueError(f"no closing bracket: {text[start : start + 100]}")


def _parse_shapes(text: str) -> list[Shape]:
    def numbers(joined: str | None) -> tuple[int, ...]:
        return tuple(map(int, joined.split(","))) if joined else ()

    return [Shape(m[1], numbers(m[2]), numbers(m[3])) for m in _ARRAY.finditer(text)]


def _parse(line: str, name: re.Match[str]) -> Instruction:
    start = name.end()
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    return Instruction(
        name[1],
        line[end:opening].strip(),
        _parse_shapes(line[start:end]),
        re.findall(r"%([\w.-]+)", line[opening:closing]),
        line[closing:],
        line.lstrip().startswith("ROOT"),
    )


@dataclass
class Kernel:
    """Something that is launched, `times` in a run of the program.

    Attributes:
      computation: in which `instruction` stands.
      fused: what it does, of a fusion.
    """

    instruction: Instruction
    computation: Computation
    fused: Computation
    times: int

    @property
    def bytes(self) -> int:
        """That it reads and writes."""
        if not self.fused:
            operands = {name for name in self.instruction.operands if name in self.computation}
            return self.instruction.bytes + sum(self.computation[name].bytes for name in operands)
        (root,) = (one for one in self.fused.values() if one.is_root)
        roots = [self.fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        parameters = [one for one in self.fused.values() if one.opcode == "parameter"]
        return sum(map(self._written, roots)) + sum(map(self._read, parameters))

    def _written(self, root: Instruction) -> int:
        while root.opcode == "bitcast":
            root = self.fused[root.operands[0]]
        if root.opcode == "dynamic-update-slice":  # in place
            return self.fused[root.operands[1]].bytes
        return root.bytes

    def _read(self, parameter: Instruction) -> int:
        """Of what is sliced the slices."""
        needed = 0
        for user in self.fused.values():
            if parameter.name not in user.operands:
                continue
            if user.opcode == "bitcast":
                needed += self._read(user)
            elif user.opcode in ("slice", "dynamic-slice", "gather"):
                needed += user.bytes
            elif user.opcode != "dynamic-update-slice" or user.operands[0] != parameter.name:
                needed += parameter.bytes
        return min(needed, parameter.bytes)

    @cached_property
    def flops(self) -> int:
        """Of convolutions and matrix products."""
        if not self.fused:
            return _flops(self.instruction, self.computation)
        return sum(_flops(one, self.fused) for one in self.fused.values())

    @property
    def is_convolution(self) -> bool:
        ones = [self.instruction, *self.fused.values()]
        return any("conv" in one.target or one.opcode == "convolution" for one in ones)

    @property
    def is_copy(self) -> bool:
        """Whether it but moves values, of one type or another."""
        moving = {"copy", "transpose", "copy-start"}
        ones = [self.instruction, *self.fused.values()]
        doing = {one.opcode for one in ones} - _NOT_RUN - {"fusion", "convert", "reshape"}
        return bool(doing) and doing <= moving

    @property
    def cycles(self) -> int:
        """That a TPU's compiler estimates."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.instruction.attributes)
        return int(match[1]) if match else 0


def _flops(one: Instruction, computation: Computation) -> int:
    operands = [computation[name].shapes[0].dims for name in one.operands if name in computation]
    if one.opcode == "dot":
        contracted = re.search(r"lhs_contracting_dims=\{([\d,]+)\}", one.attributes)
        depth = operands[0][int(contracted[1])] if contracted else 1
        return 2 * math.prod(one.shapes[0].dims) * depth
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.attributes)
    if not labels or not operands:
        return 0
    # Of a gradient cuDNN's call has the labels of the convolution forward.
    image, kernel, out = operands[0], operands[1], one.shapes[0].dims
    if one.target.endswith("BackwardInput"):
        image, out = out, image
    elif one.target.endswith("BackwardFilter"):
        kernel, out = out, kernel
    planes = kernel[labels[2].index("o")]
    return 2 * math.prod(out) * math.prod(kernel) // planes


class Module:
    """A compiled program: its computations by name, each a dict of instructions by name."""

    def __init__(self, text: str):
        self.header = text[: text.index("\n")]
        self.computations: dict[str, Computation] = {}
        self.entry = ""
        computation: Computation = {}
        for line in text.splitlines()[1:]:
            if line.endswith("{") and not line.startswith(" "):
                name = re.match(r"(ENTRY )?%?([\w.-]+)", line)
                assert name
                computation = self.computations[name[2]] = {}
                if name[1]:
                    self.entry = name[2]
            elif match := _INSTRUCTION.match(line):
                computation[match[1]] = _parse(line, match)

    def walk(self, name: str | None = None, times: int = 1, unknown: int = 1) -> Iterator[Kernel]:
        """What a run of a computation launches, with how often: loops and calls gone into.

        A loop whose length the program does not tell, as a TPU's, is taken to run `unknown` times.
        """
        computation = self.computations[name or self.entry]
        for instruction in computation.values():
            if instruction.opcode == "while":
                length = instruction.trip_count or unknown
                yield from self.walk(instruction.called, times * length, unknown)
            elif instruction.opcode in ("call", "async-start"):
                yield from self.walk(instruction.called, times, unknown)
            elif instruction.opcode not in _NOT_RUN and not instruction.opcode.endswith("-done"):
                fused = (
                    self.computations[instruction.called or ""]
                    if instruction.opcode == "fusion"
                    else {}
                )
                yield Kernel(instruction, computation, fused, times)


# What it costs.


@dataclass
class Cost:
    """Of a step.

    Attributes:
      kernels: launches.
      bytes: read and written; of them those of convolutions, and of kernels that but copy.
      flops: of convolutions and matrix products.
      seconds: at best.
    """

    kernels: float = 0.0
    bytes: float = 0.0
    convolution_bytes: float = 0.0
    copied_bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


def cost(module: Module, card: Card, steps: int) -> Cost:
    """Of each of the steps that a program does."""
    total = Cost()
    for kernel in module.walk(unknown=steps):
        share, moved = kernel.times / steps, kernel.bytes
        total.kernels += share
        total.bytes += share * moved
        total.flops += share * kernel.flops
        total.convolution_bytes += share * moved * kernel.is_convolution
        total.copied_bytes += share * moved * kernel.is_copy
        if card.clock:
            total.seconds += share * kernel.cycles / card.clock
        else:
            total.seconds += share * max(moved / card.bandwidth, kernel.flops / card.flops)
    return total


# The programs.


def topology(card: str, devices: int = 1) -> list[Any]:
    """Devices of a card that is not there, to compile for.

    Raises:
      RuntimeError: if there is no plugin for it.
    """
    if card.startswith("v"):
        shape = {1: "1x1", 4: "2x2", 8: "2x4"}[devices]
        bounds = {"chips_per_host_bounds": (1, 1, 1)} if devices == 1 else {}
        return topologies.get_topology_desc(f"{card}:{shape}", platform="tpu", **bounds).devices
    text = (Path(__file__).parent / "cards" / f"{card}.txtpb").read_text()
    options = {"target_config": text, "topology": f"1x1x{devices}"}
    return topologies.get_topology_desc(platform="cuda", **options).devices


def plan_of(devices: list[Any], net: str, batch_size: int, pixels: int, **fields: Any) -> Plan:
    """Of a training of a net on images that do not exist."""
    config = Config(
        model=net, batch_size=batch_size, crop="padded" if pixels == 32 else "resized", **fields
    )
    classes = 10 if pixels == 32 else 1000
    schedule = optax.cosine_decay_schedule(config.learning_rate, 1000)
    dataset = fr.Dataset(
        np.broadcast_to(np.uint8(0), (50_000, pixels, pixels, 3)),
        np.broadcast_to(np.int32(0), 50_000),
        tuple(map(str, range(classes))),
    )
    return Plan(
        config=config,
        workdir=Path(),
        brought={},
        mesh=make_mesh(batch_size, config.accumulation_steps, devices),
        data=Data(dataset, dataset, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), "none", is_resident=True),
        model=fr.create_model(net, num_classes=classes, dtype=jnp.bfloat16),
        initial={},
        loss=cross_entropy,
        test_loss=cross_entropy,
        augment=None,
        optimizer=make_optimizer(config, schedule),
        learning_rate=schedule,
        total_steps=1000,
    )


def state_of(plan: Plan) -> TrainState:
    """Its shapes, before the first step."""
    shape = plan.data.train.image_shape
    create = partial(create_state, plan.model, plan.optimizer, image_shape=shape)
    return jax.eval_shape(create, jax.random.key(0))


def lower(plan: Plan, *, scanned: bool) -> jax.stages.Lowered:
    """The training step of a plan, `STEPS_A_CALL` of them in a scan or one."""
    everywhere, divided = replicated(plan.mesh), by_example(plan.mesh)
    size, shape = plan.config.batch_size, plan.data.train.image_shape

    def array(*dims: int, dtype: Any = jnp.int32, sharding: Any = divided) -> Any:
        return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)

    state, step = state_of(plan), programs.make_train_step(plan)
    formats = programs.state_formats(state, plan.mesh)
    if not scanned:
        images = array(size, *shape, dtype=jnp.uint8)
        batch = {"image": images, "label": array(size), "index": array(size)}
        return programs.lower_training(step, state, formats, plan.mesh, batch)
    count = len(plan.data.train)
    many = programs.make_train_steps(
        step,
        programs.make_pick(plan.mesh, size, shape),
        steps_per_epoch=plan.steps_per_epoch,
        steps=STEPS_A_CALL,
    )
    images = array(count, math.prod(shape), dtype=jnp.uint8, sharding=everywhere)
    order = array(count, sharding=everywhere)
    data = {"image": images, "label": order}
    return programs.lower_training(many, state, formats, plan.mesh, data, order)


def row(name: str, program: str) -> str:
    """A line of the table."""
    net, batch_size, pixels = [*program.split(":"), "32"][:3]
    scanned = pixels == "32"
    plan = plan_of(topology(name), net, int(batch_size), int(pixels))
    compiled = lower(plan, scanned=scanned).compile()
    found = cost(Module(compiled.as_text() or ""), CARDS[name], STEPS_A_CALL if scanned else 1)
    memory = compiled.memory_analysis()
    assert memory
    return (
        f"| {name} | {net} | {batch_size} | {found.kernels:.0f} | {found.bytes / 1e9:.2f} "
        f"| {found.convolution_bytes / 1e9:.2f} | {found.copied_bytes / 1e9:.2f} "
        f"| {found.flops / 1e9:.0f} | {memory.temp_size_in_bytes / 1e9:.2f} "
        f"| {found.seconds * 1e3:.2f} | {int(batch_size) / found.seconds:,.0f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="What compilers make of our training steps.")
    parser.add_argument("--cards", nargs="+", choices=CARDS, default=list(CARDS))
    parser.add_argument("--programs", nargs="+", metavar="NET:BATCH[:PIXELS]", default=PROGRAMS)
    arguments = parser.parse_args()
    print(
        "| card | net | batch | kernels | GB | of convolutions | of copies | GFLOP "
        "| memory, GB | at best, ms | images/s |"
    )
    print(f"|---|---{'|---:' * 9}|", flush=True)
    for card in arguments.cards:
        for program in arguments.programs:
            print(row(card, program), flush=True)


if __name__ == "__main__":
    main()
