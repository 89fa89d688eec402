"""Our convolution: PyTorch's numbers in float64, derivatives of every kind, and its fallbacks."""

import contextlib
import errno
import os
import shutil
import stat
import subprocess
import sys
import textwrap
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import flax_resnet as fr
from flax_resnet.models import native
from flax_resnet.models.convolution import convolution

torch = pytest.importorskip("torch")

# (N, H, W, CI, CO, kernel, stride, padding)
CASES = [
    (5, 32, 32, 3, 16, 3, 1, 1),  # CIFAR's stem
    (3, 45, 38, 3, 64, 7, 2, 3),  # ImageNet's
    (2, 15, 12, 1, 16, 7, 2, 3),  # and of gray images, whose last tile of taps has a row
    (9, 17, 13, 16, 48, 3, 2, 1),
    (7, 8, 9, 64, 32, 1, 1, 0),
    (7, 9, 8, 32, 128, 1, 2, 0),
    (3, 1, 2, 256, 512, 3, 2, 1),
    (2, 6, 5, 16, 32, 5, 3, 2),
    (2, 80, 70, 32, 16, 5, 1, 2),  # more than fits into a core's cache at a time
    (4, 4, 4, 128, 256, 3, 2, 1),  # a kernel whose gradient is divided by rows
    (1, 7, 7, 20, 24, 3, 1, 1),  # channels that fill no vector register
    (33, 32, 32, 64, 64, 5, 1, 2),  # streamed past the caches, after the first of the taps
    (65, 32, 32, 32, 32, 1, 2, 0),  # its input gradient streamed, zeros included
    (4, 5, 5, 64, 32, 3, 1, 1),  # too few tiles for Winograd
    (200, 1, 1, 32, 32, 3, 1, 1),  # images smaller than a tile
    (9, 17, 13, 16, 16, 3, 1, 1),  # Winograd's from here on: tiles cut at the edges
    (2, 80, 70, 32, 128, 3, 1, 1),  # more tiles than fit
    (32, 4, 4, 48, 80, 3, 1, 1),  # blocks of one vector of 16 lanes
    (33, 4, 4, 24, 40, 3, 1, 1),  # or of 8
    (8, 8, 8, 512, 64, 3, 1, 1),  # a gradient divided by channels and by tiles
    (65, 32, 32, 32, 32, 3, 1, 1),  # streamed
    (16, 6, 9, 16, 32, 3, 1, 0),
    (16, 6, 9, 32, 16, 3, 1, 2),
    (16, 6, 9, 32, 16, 3, 1, 3),
]

# and the number of groups
GROUPED = [
    (3, 9, 7, 32, 32, 3, 1, 1, 32),  # depthwise
    (2, 8, 9, 48, 48, 5, 2, 2, 48),
    (2, 9, 8, 16, 32, 5, 1, 2, 16),  # two outputs of each input
    (1, 13, 11, 128, 128, 3, 1, 1, 32),  # the four stages of resnext50_32x4d
    (2, 10, 9, 256, 256, 3, 2, 1, 32),
    (3, 5, 6, 512, 512, 3, 2, 1, 32),
    (1, 3, 4, 1024, 1024, 3, 1, 1, 32),
    (3, 8, 8, 24, 16, 3, 2, 1, 8),
    (2, 7, 7, 64, 32, 3, 1, 1, 2),
    (1, 6, 5, 48, 48, 3, 1, 1, 2),  # a register's channels in part of one group, in part of another
    (3, 8, 9, 96, 96, 1, 1, 0, 3),
    (1, 90, 61, 32, 64, 3, 1, 1, 8),  # strips of an image
    (2, 9, 7, 20, 20, 3, 1, 1, 2),  # XLA's
]


def xla_convolution(x, kernel, stride, padding):
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        [(padding, padding)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def assert_close(ours, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        assert np.abs(a - b).max() <= tolerance * np.abs(b).max()


def custom_calls(function, *arguments) -> bool:
    return "flax_resnet_" in jax.jit(function).lower(*arguments).as_text()


@pytest.mark.parametrize("case", [(*case, 1) for case in CASES] + GROUPED, ids=str)
def test_value_and_gradients_are_torchs_in_float64(case, rng):
    n, height, width, ci, co, size, stride, padding, groups = case
    x = rng.normal(size=(n, height, width, ci)).astype(np.float32)
    kernel = rng.normal(size=(size, size, ci // groups, co)).astype(np.float32)

    x64 = torch.from_numpy(x).double().permute(0, 3, 1, 2).requires_grad_()
    kernel64 = torch.from_numpy(kernel).double().permute(3, 2, 0, 1).requires_grad_()
    out64 = torch.nn.functional.conv2d(x64, kernel64, stride=stride, padding=padding, groups=groups)
    g = rng.normal(size=(*out64.shape[:1], *out64.shape[2:], co)).astype(np.float32)
    out64.backward(torch.from_numpy(g).double().permute(0, 3, 1, 2))

    @jax.jit
    def value_and_gradients(x, kernel, g):
        convolve = partial(convolution, stride=stride, padding=padding, groups=groups)
        out, vjp = jax.vjp(convolve, x, kernel)
        return out, *vjp(g)

    out, by_x, by_kernel = value_and_gradients(x, kernel, g)
    assert_close(out, out64.detach().permute(0, 2, 3, 1))
    assert_close(by_x, x64.grad.permute(0, 2, 3, 1))
    assert_close(by_kernel, kernel64.grad.permute(2, 3, 1, 0))


def test_groups_stay_groups_elsewhere():
    x, kernel = jnp.ones((3, 8, 8, 24)), jnp.ones((3, 3, 3, 16))
    convolve = jax.jit(partial(convolution, stride=2, padding=1, groups=8))
    for platform in ("cuda", "tpu"):
        lowered = convolve.trace(x, kernel).lower(lowering_platforms=(platform,))
        assert "feature_group_count = 8" in lowered.as_text()


@pytest.fixture
def operands(rng):
    x = rng.normal(size=(16, 9, 7, 16)).astype(np.float32)
    return x, rng.normal(scale=0.1, size=(3, 3, 16, 32)).astype(np.float32)


def ours(x, kernel):
    return convolution(x, kernel, stride=2, padding=1)


def xlas(x, kernel):
    return xla_convolution(x, kernel, 2, 1)


def gradients(convolve):
    return jax.grad(lambda x, kernel: jnp.sum(jnp.sin(convolve(x, kernel))), argnums=(0, 1))


def test_runs_in_our_own_code(operands):
    assert native.load() is not None
    assert custom_calls(ours, *operands)
    assert custom_calls(gradients(ours), *operands)


@pytest.mark.parametrize("devices", [1, 2])
def test_in_shard_map(operands, devices):
    mesh = Mesh(np.array(jax.devices()[:devices]), ("data",))
    by_example = PartitionSpec("data")
    specs = (by_example, PartitionSpec())
    divided = jax.shard_map(ours, mesh=mesh, in_specs=specs, out_specs=by_example)
    assert custom_calls(divided, *operands) == (devices == 1)
    out, (by_x, by_kernel) = jax.jit(divided)(*operands), jax.jit(gradients(divided))(*operands)
    assert_close(out, xlas(*operands))
    assert_close(by_x, gradients(xlas)(*operands)[0])
    assert_close(by_kernel, gradients(xlas)(*operands)[1])


@pytest.mark.parametrize("set_mesh", [False, True])
@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
def test_on_a_mesh_of_any_kind(axis_type, manual, set_mesh, operands):
    mesh = jax.make_mesh((2,), ("data",), (axis_type,), devices=jax.devices()[:2])
    by_example, everywhere = PartitionSpec("data"), PartitionSpec()
    placed = [
        jax.device_put(array, NamedSharding(mesh, spec))
        for array, spec in zip(operands, (by_example, everywhere), strict=True)
    ]

    divided = ours
    if manual:
        specs = (by_example, everywhere)
        divided = jax.shard_map(ours, mesh=mesh, in_specs=specs, out_specs=by_example)

    def with_derivatives(convolve):
        def sum_of_gradients(*primals):
            return sum(map(jnp.sum, gradients(convolve)(*primals)))

        return lambda *primals: (convolve(*primals), gradients(sum_of_gradients)(*primals))

    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        of_ours = jax.jit(with_derivatives(divided))
        out, second = of_ours(*placed)
        for platform in ("cuda", "tpu"):
            of_ours.trace(*placed).lower(lowering_platforms=(platform,))
    assert out.sharding.spec[0] == "data"
    assert_close((out, second), with_derivatives(xlas)(*operands))


@pytest.mark.parametrize(
    "model",
    [
        fr.ResNet(fr.BasicBlock, (1, 1), widths=(8, 16), strides=(1, 2), shortcut="average"),
        fr.ResNet(fr.Bottleneck, (1, 2), widths=(8, 16), strides=(1, 2), squeeze_excite=True),
        fr.ResNet(fr.Bottleneck, (1,), widths=(64,), strides=(2,), groups=8, width_per_group=4),
        fr.ResNet(fr.PreActBasicBlock, (1,), widths=(8,), strides=(1,), shortcut="identity"),
        fr.ResNet(fr.BasicBlock, (3,), widths=(8,), strides=(1,), scan_blocks=True),
        fr.ResNet(fr.BasicBlock, (1,), widths=(8,), strides=(1,), norm="group"),
        fr.cifar_resnet9(),
        fr.vgg11_bn(),
    ],
    ids=lambda model: type(model).__name__,
)
def test_models_on_a_mesh_with_explicit_axes(model):
    mesh = jax.make_mesh((2,), ("data",), devices=jax.devices()[:2])
    images = jax.ShapeDtypeStruct(
        (4, 32, 32, 3), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("data"))
    )
    shapes = jax.eval_shape(partial(model.init, train=False), jax.random.key(0), images)
    variables = jax.tree.map(
        lambda a: a.update(sharding=NamedSharding(mesh, PartitionSpec())), shapes
    )

    def loss(params, rest, x):
        variables = {"params": params, **rest}
        logits, _ = model.apply(
            variables, x, train=True, mutable=["batch_stats"], rngs={"dropout": jax.random.key(0)}
        )
        return jnp.mean(logits**2)

    params = variables.pop("params")
    traced = jax.jit(jax.grad(loss)).trace(params, variables, images)
    for platform in ("cpu", "cuda", "tpu"):
        traced.lower(lowering_platforms=(platform,))


@pytest.mark.parametrize("devices", [1, 2])
def test_in_pmap(operands, devices):
    x, kernel = operands
    stacked = (jnp.stack([x] * devices), jnp.stack([kernel] * devices))
    for convolve, expected in ((ours, xlas), (gradients(ours), gradients(xlas))):
        everywhere = jax.pmap(convolve, devices=jax.devices()[:devices])(*stacked)
        alone = jax.tree.map(lambda a: jnp.stack([a] * devices), expected(*operands))
        jax.tree.map(assert_close, everywhere, alone)


def test_second_derivatives(operands):
    def forward_over_reverse(convolve):
        return lambda *primals: jax.jvp(gradients(convolve), primals, primals)[1]

    def reverse_over_reverse(convolve):
        return jax.grad(
            lambda *primals: sum(jnp.sum(jnp.cos(g)) for g in gradients(convolve)(*primals)),
            argnums=(0, 1),
        )

    for derivative in (forward_over_reverse, reverse_over_reverse):
        assert custom_calls(derivative(ours), *operands)
        assert_close(jax.jit(derivative(ours))(*operands), jax.jit(derivative(xlas))(*operands))


def test_vmap(operands):
    x, kernel = operands
    kernels = np.stack([kernel, 2 * kernel], axis=1)
    for axes in ((None, 1), (0, 1)):  # an ensemble on the same images, and each on its own
        arguments = (x if axes[0] is None else np.stack([x, 3 * x]), kernels)
        of_each = jax.vmap(gradients(ours), axes)
        assert custom_calls(of_each, *arguments)
        assert_close(of_each(*arguments), jax.vmap(gradients(xlas), axes)(*arguments))

    def of_each_example(convolve):
        return jax.vmap(lambda x: gradients(convolve)(x[None], kernel))(x)

    assert_close(of_each_example(ours), of_each_example(xlas))


def test_devices_divide_the_batch(operands):
    mesh = Mesh(np.array(jax.devices()), ("data",))
    by_example = NamedSharding(mesh, PartitionSpec("data"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = (by_example, everywhere)
    divided = jax.jit(gradients(ours), in_shardings=shardings, out_shardings=shardings)
    assert_close(divided(*operands), gradients(xlas)(*operands))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_types_run_in_xla(dtype, operands):
    x, kernel = (jnp.asarray(a, dtype) for a in operands)
    assert not custom_calls(ours, x, kernel)
    np.testing.assert_array_equal(ours(x, kernel), xlas(x, kernel))


@pytest.mark.parametrize(
    ("x", "kernel", "geometry"),
    [
        ((9, 7, 16), (3, 3, 16, 32), (1, 1)),
        ((2, 1, 9, 7, 16), (3, 3, 16, 32), (1, 1)),
        ((1, 9, 7, 16), (3, 3, 8, 32), (1, 1)),
        ((1, 9, 7, 8), (3, 3, 16, 32), (1, 1)),
        ((1, 2, 7, 16), (3, 3, 16, 32), (1, 0)),
        ((1, 9, 7, 16), (3, 3, 16, 32), (1, -1)),
        ((1, 9, 7, 16), (3, 3, 16, 32), (0, 1)),
    ],
)
def test_shapes_that_do_not_go_together(x, kernel, geometry):
    stride, padding = geometry
    with pytest.raises(ValueError, match=r"convolved|does not fit|at least"):
        convolution(jnp.ones(x), jnp.ones(kernel), stride=stride, padding=padding)


def test_groups_divide_the_channels_that_come_out():
    x, kernel = jnp.ones((1, 9, 7, 16)), jnp.ones((3, 3, 8, 31))
    with pytest.raises(ValueError, match="in 2 groups"):
        convolution(x, kernel, groups=2, stride=1, padding=1)


def test_an_empty_batch(operands):
    x, kernel = operands
    out, (by_x, by_kernel) = ours(x[:0], kernel), gradients(ours)(x[:0], kernel)
    assert out.shape == (0, 5, 4, 32)
    assert by_x.shape == (0, 9, 7, 16)
    np.testing.assert_array_equal(by_kernel, np.zeros_like(kernel))


ARM = "aarch64-linux-gnu-g++ -static"
SANITIZED = "g++ -march=native -fsanitize=address,undefined -fno-sanitize-recover=all"


@pytest.mark.parametrize(
    ("compiler", "emulator", "instructions"),
    [
        ("g++ -march=x86-64", "", "sse2"),
        ("g++ -march=x86-64-v3", "", "avx2"),
        pytest.param(SANITIZED, "", "", marks=pytest.mark.slow, id="sanitized"),
        pytest.param(ARM, "qemu-aarch64", "", marks=pytest.mark.arm, id="arm"),
    ],
)
def test_other_processors(compiler, emulator, instructions, tmp_path):
    for program in (compiler.split()[0], emulator):
        if program and not shutil.which(program):
            pytest.skip(f"there is no {program}")
    if instructions not in Path("/proc/cpuinfo").read_text():
        pytest.skip(f"this CPU has no {instructions}")
    folder, program = Path(__file__).with_name("kernels"), tmp_path / "kernels_test"
    include = [f"-I{folder}", f"-I{native._SOURCE.parent}"]
    build = [*compiler.split(), "-std=c++17", "-O1", "-pthread", *include, "-o", program]
    subprocess.run([*build, folder / "kernels_test.cc"], check=True)
    result = subprocess.run([*emulator.split(), program], capture_output=True, text=True)
    assert (result.returncode, result.stdout) == (0, "")


@pytest.mark.parametrize(
    "compiler",
    ["no_such_compiler", *(pytest.param(c, marks=pytest.mark.slow) for c in ("false", "c++ '"))],
)
def test_without_a_compiler_xla_does_it(compiler, user_cache):
    program = textwrap.dedent("""
        import functools, jax
        from flax_resnet.models.convolution import convolution

        x, kernel = jax.numpy.ones((1, 8, 8, 16)), jax.numpy.ones((1, 1, 16, 16))
        convolve = jax.jit(functools.partial(convolution, stride=1, padding=0))
        print("flax_resnet_" in convolve.lower(x, kernel).as_text(), convolve(x, kernel).sum())
    """)
    environment = {**os.environ, "CXX": compiler}
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout == f"False {8 * 8 * 16 * 16:.1f}\n"
    assert result.stderr.count("could not be compiled or loaded") == 1


@pytest.fixture
def at_once(monkeypatch):
    """To compile convolution.cc is to copy what this session has compiled of it."""
    compiled = Path(native._library()._name).read_bytes()
    run = native._run

    def copy(*command):
        if "-o" not in command:
            return run(*command)
        Path(command[command.index("-o") + 1]).write_bytes(compiled)
        return b""

    monkeypatch.setattr(native, "_run", copy)


def test_compiled_once(at_once, user_cache, monkeypatch):
    monkeypatch.setenv("CXX", f"env {os.environ.get('CXX', 'c++')}")  # as with a ccache before it
    library = Path(native._library()._name)
    assert library.is_relative_to(user_cache)
    assert [library] == list(library.parent.iterdir())
    written = library.stat().st_mtime_ns
    native._library()
    assert library.stat().st_mtime_ns == written


def test_damaged_library_is_compiled_anew(at_once, user_cache):
    folder = user_cache / "flax_resnet" / "native"
    folder.mkdir(parents=True)
    places: list[Path] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_copy", lambda built, kept: places.append(kept))
        native._library()
    places[0].touch()
    assert native._library().lanes() > 0
    assert places[0].stat().st_size > 0


def test_what_others_could_have_written_is_not_run(at_once, user_cache, monkeypatch):
    before = os.umask(0)
    try:
        library = Path(native._library()._name)
    finally:
        os.umask(before)
    folder = library.parent
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, library)] == [0o700, 0o600]

    for opened, mode in ((folder, 0o777), (folder, 0o720), (library, 0o602), (library, 0o660)):
        library.write_bytes(library.read_bytes())
        written = library.stat().st_mtime_ns
        opened.chmod(mode)
        assert Path(native._library()._name) == library
        assert library.stat().st_mtime_ns > written
        assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, library)] == [0o700, 0o600]

    uid = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: uid + 1)
    assert not Path(native._library()._name).is_relative_to(user_cache)


@pytest.mark.parametrize("problem", ["no_home", "a file in the way", "no room"])
def test_compiled_where_there_is_no_cache(problem, at_once, user_cache, monkeypatch, request):
    def no_room(*_):
        raise OSError(errno.ENOSPC, "no space left on device")

    if problem == "no_home":
        request.getfixturevalue(problem)
    elif problem == "no room":
        monkeypatch.setattr(shutil, "copy", no_room)
    else:
        user_cache.write_text("")
    assert native._library().lanes() > 0
