"""The training program that XLA makes for an H100, of which there need be none."""

import math
import re
from collections import Counter
from typing import NamedTuple

import jax
import pytest

from benchmarks import compiled
from benchmarks.compiled import Module, Shape
from flax_resnet.training.plan import Plan
from tests.conftest import optimizing

pytestmark = pytest.mark.aot


class Program(NamedTuple):
    """What is compiled."""

    net: str
    batch_size: int
    pixels: int = 32
    devices: int = 1
    accumulation_steps: int = 1

    @property
    def is_scanned(self) -> bool:
        return self.pixels == 32

    @property
    def steps(self) -> int:
        return compiled.STEPS_A_CALL if self.is_scanned else 1


# The examples of a device are no number of channels, by which activations are told from kernels;
# and many: what is small XLA leaves in float32 between two kernels.
PROGRAMS = (
    Program("cifar_resnet18", 520),
    Program("resnet50", 264, pixels=224),
    Program("cifar_resnet8", 3328, devices=8, accumulation_steps=2),
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.net)
def test_nothing_is_wasted_on_an_h100(program):
    pytest.importorskip("jax_plugins.xla_cuda13")
    plan = compiled.plan_of(
        compiled.topology("h100", program.devices),
        program.net,
        program.batch_size,
        program.pixels,
        accumulation_steps=program.accumulation_steps,
    )
    with optimizing():
        text = compiled.lower(plan, scanned=program.is_scanned).compile().as_text()
    assert text
    module = Module(text)
    kernels = [leaf for leaf in jax.tree.leaves(compiled.state_of(plan).params) if leaf.ndim == 4]
    examples = program.batch_size // program.devices // program.accumulation_steps

    convolutions_are_cudnns(module, 3 * len(kernels) - 1)
    no_activation_is_moved_or_wide(module, examples)
    state_is_donated(module, plan)
    no_weight_is_transposed(module)
    loops_have_a_known_length(module, program)
    if program.devices > 1:
        gradients_meet_once_a_step(module, program, sum(kernel.size for kernel in kernels))


def convolutions_are_cudnns(module: Module, count: int) -> None:
    """In bfloat16 and NHWC: forward and two gradients, less that of the images."""
    kernels = [kernel for kernel in module.walk() if kernel.is_convolution]
    assert len(kernels) == count
    for kernel in kernels:
        call = kernel.instruction
        assert call.target.startswith("__cudnn$conv"), call.name
        assert "dim_labels=b01f_o01i->b01f" in call.attributes, call.name
        shapes = [shape for name in call.operands for shape in kernel.computation[name].shapes]
        for shape in (*shapes, call.shapes[0]):
            if len(shape.dims) == 4:
                assert (shape.dtype, shape.layout) == ("bf16", (3, 2, 1, 0)), call.name


def no_activation_is_moved_or_wide(module: Module, examples: int) -> None:
    """None is copied, transposed or in float32 in memory."""

    def is_activation(shape: Shape) -> bool:
        return len(shape.dims) == 4 and shape.dims[0] == examples and math.prod(shape.dims[1:3]) > 1

    found = 0
    for kernel in module.walk():
        for one in (kernel.instruction, *kernel.fused.values()):
            if one.opcode in ("copy", "transpose"):
                for shape in one.shapes:
                    # With five axes these are the images, on their way into the parts of a batch.
                    assert examples not in shape.dims or len(shape.dims) not in (3, 4), one.name
        for shape in filter(is_activation, kernel.instruction.shapes):
            found += 1
            assert shape.dtype != "f32", kernel.instruction.name
            assert shape.layout == (3, 2, 1, 0), kernel.instruction.name
    assert found


def state_is_donated(module: Module, plan: Plan) -> None:
    aliases = re.search(r"input_output_alias=\{ (.*?) \}, entry", module.header)
    assert aliases
    outputs = [int(i) for i in re.findall(r"\{(\d+)\}: \(\1, \{\}", aliases[1])]
    assert outputs == list(range(len(jax.tree.leaves(compiled.state_of(plan)))))


def no_weight_is_transposed(module: Module) -> None:
    """Nor its momentum, all of which are float32. What is cast to bfloat16 may be."""
    for kernel in module.walk():
        for one in (kernel.instruction, *kernel.fused.values()):
            if one.opcode == "transpose":
                for shape in one.shapes:
                    assert (shape.dtype, len(shape.dims)) != ("f32", 4), one.name


def loops_have_a_known_length(module: Module, program: Program) -> None:
    loops = [
        one
        for computation in module.computations.values()
        for one in computation.values()
        if one.opcode == "while"
    ]
    expected = [n for n in (program.steps, program.accumulation_steps) if n > 1]
    assert sorted(loop.trip_count or 0 for loop in loops) == sorted(expected)


def gradients_meet_once_a_step(module: Module, program: Program, size: int) -> None:
    """Of what is summed over devices, BatchNorm's statistics alone are in the loop over parts."""
    summed = Counter()
    for kernel in module.walk():
        if kernel.instruction.opcode.startswith("all-reduce"):
            elements = sum(math.prod(shape.dims) for shape in kernel.instruction.shapes)
            summed[kernel.times] += elements
    assert sorted(summed) == [program.steps, program.steps * program.accumulation_steps]
    assert size <= summed[program.steps] < 1.1 * size
    assert summed[program.steps * program.accumulation_steps] < 0.1 * size
