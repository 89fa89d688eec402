"""The lesson's numbers against computations of another kind, and its program on digits."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet.cli import run_program
from flax_resnet.lesson import __main__ as program
from flax_resnet.lesson import measure

pytestmark = pytest.mark.slow  # it seldom changes

# The smallest net that has everything; two stages.
tiny = partial(
    fr.ResNet, num_classes=3, widths=(8, 16), strides=(1, 2), cifar_stem=True, shortcut="identity"
)


@pytest.mark.parametrize(("block", "planes"), [(fr.BasicBlock, 8), (fr.Bottleneck, 2)])
def test_block_of_zero_scale_is_relu_of_its_input(block, planes, rng):
    x = jnp.asarray(rng.normal(size=(4, 6, 6, 8)), jnp.float32)
    block = block(planes, zero_init_residual=True)
    variables = block.init(jax.random.key(0), x, train=False)
    out, _ = block.apply(variables, x, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(out, np.maximum(x, 0))


@pytest.mark.parametrize("zero_init_residual", [True, False])
def test_block_changes(zero_init_residual, rng):
    model = tiny(fr.BasicBlock, (2, 2), zero_init_residual=zero_init_residual)
    images = jnp.asarray(rng.normal(size=(4, 8, 8, 3)), jnp.float32)
    variables = measure.initial_variables(model, 0, images.shape[1:])
    maps = measure.stage_maps(model, variables, images)
    changes = measure.block_changes(maps)
    assert [c.name for c in changes] == ["layer1_0", "layer1_1", "layer2_1"]
    assert all((c.largest == 0) == (c.relative == 0) == zero_init_residual for c in changes)
    # The maps are what the net itself goes through.
    outputs, _ = model.apply(variables, images, train=True, features=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(dict(maps)["layer2_1"], outputs["layer2"])


def test_gradient_norms_are_those_of_sgd_by_hand(rng):
    model = tiny(fr.BasicBlock, (1, 1))
    images = jnp.asarray(rng.normal(size=(6, 8, 8, 3)), jnp.float32)
    labels = np.array([0, 1, 2, 0, 1, 2], np.int32)
    variables = measure.initial_variables(model, 0, images.shape[1:])

    @jax.jit
    @jax.value_and_grad
    def loss_and_gradient(params):
        logits, _ = model.apply(
            {**variables, "params": params}, images, train=True, mutable=["batch_stats"]
        )
        return -jax.nn.log_softmax(logits)[jnp.arange(6), labels].mean()

    # The batch is the whole set, so that its order does not matter.
    steps = measure.measure_training(
        model, variables, images, labels, batch_size=6, steps=3, seed=0
    )
    params = variables["params"]
    velocity = jax.tree.map(jnp.zeros_like, params)
    inner = [(f"layer{i}_0", f"conv{j}") for i in (1, 2) for j in (1, 2)]
    for measured in steps:
        loss, gradient = loss_and_gradient(params)
        np.testing.assert_allclose(measured.loss, loss, rtol=1e-4)
        for norms, tree in ((measured.gradients, gradient), (measured.kernels, params)):
            kernels = [tree[block][name]["kernel"] for block, name in inner]
            kernels = [tree["conv1"]["kernel"], *kernels, tree["fc"]["kernel"]]
            expected = [np.linalg.norm(kernel.ravel()) for kernel in kernels]
            np.testing.assert_allclose(norms, expected, rtol=1e-3)
        velocity = jax.tree.map(lambda v, g, p: 0.9 * v + g + 1e-4 * p, velocity, gradient, params)
        params = jax.tree.map(lambda p, v: p - 0.1 * v, params, velocity)


@pytest.mark.parametrize(
    ("block", "shortcut"),
    [
        (fr.BasicBlock, "none"),
        (fr.BasicBlock, "identity"),
        (fr.Bottleneck, "none"),
        (fr.Bottleneck, "projection"),
    ],
)
def test_receptive_fields_follow_the_formula(block, shortcut):
    model = tiny(block, (2, 3), shortcut=shortcut)
    # 1 + the sum over convolutions of (size - 1) * the product of the strides before.
    per_block = 2 if block is fr.BasicBlock else 1
    first = 3 + 2 * 2 * per_block
    second = first + 2 + 2 * 2 * (3 * per_block - 1)
    expected = [("stem", 1, 3), ("layer1", 1, first), ("layer2", 2, second)]
    stages = measure.stages(model, (12, 12, 3))
    assert [(s.name, s.stride, s.field) for s in stages] == expected
    assert stages[2].shape == (6, 6, 16 * block.expansion)


def test_receptive_fields_of_many_blocks():
    """Of ResNet-152's: paths through fifty blocks may not vanish."""
    layers = (3, 8, 36, 3)
    model = tiny(
        fr.Bottleneck, layers, widths=(4,) * 4, strides=(1, 2, 2, 2), shortcut="projection"
    )
    field, stride, expected = 3, 1, [3]
    for stage, count in enumerate(layers):
        for block in range(count):
            field += 2 * stride  # of the one 3x3 convolution
            stride *= 2 if stage and not block else 1
        expected.append(field)
    assert [stage.field for stage in measure.stages(model, (16, 16, 3))] == expected
    with pytest.raises(ValueError, match="of 123 convolutions of more than 1x1 are lost"):
        measure.stages(tiny(fr.BasicBlock, (31, 30)), (16, 16, 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"norm": "group"}, "need norm='batch', squeeze_excite=False and eca=False"),
        ({"squeeze_excite": True}, "need norm='batch', squeeze_excite=False and eca=False"),
        ({"eca": True}, "need norm='batch', squeeze_excite=False and eca=False"),
        ({"weight_standardization": True}, "need weight_standardization=False"),
    ],
)
def test_a_field_that_cannot_be_measured_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        measure.stages(tiny(fr.BasicBlock, (1, 1), **fields), (12, 12, 3))


def test_a_field_longer_than_the_first_row():
    model = tiny(fr.Bottleneck, (1, 1), widths=(2, 2), strides=(8, 8))
    assert measure.stages(model, (64, 64, 1))[2].field == 3 + 2 + 2 * 8


def test_influence_stays_inside_the_field(rng):
    model = tiny(fr.BasicBlock, (1, 1))
    images = jnp.asarray(rng.normal(size=(4, 32, 32, 3)), jnp.float32)
    variables = measure.initial_variables(model, 0, images.shape[1:])
    seen = measure.influence(model, variables, images, "layer2")
    field = measure.stages(model, (32, 32, 3))[2].field
    rows, columns = np.nonzero(seen)
    assert (rows.min(), rows.max()) == (16 - field // 2, 16 + field // 2)
    assert (columns.min(), columns.max()) == (rows.min(), rows.max())
    assert measure.central_square(seen, 1 - 1e-6) == field
    assert measure.central_square(np.ones((5, 5)), 0.3) == 3


def run(arguments):
    """The exit code of the program."""
    with pytest.raises(SystemExit) as stop:
        run_program(program.make_parser(), program.main, arguments)
    return stop.value.code


@pytest.mark.slow
def test_program_writes_figures(digits_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measure, "DEPTHS", dict.fromkeys((20, 56, 110), fr.cifar_resnet8))
    monkeypatch.setattr(program, "lab10_resnet50", partial(tiny, fr.Bottleneck, (1, 1)))
    run(
        f"--dataset digits --data_dir {digits_dir} --output {tmp_path / 'new' / 'folder'} "
        "--parts identity gradients fields --steps 2 --batch_size 8 --quiet".split()
    )
    captured = capsys.readouterr()
    assert captured.err == ""
    assert "residual, last scale 0: largest |output - input| of 1 blocks 0," in captured.out
    files = {path.name for path in (tmp_path / "new" / "folder").iterdir()}
    pictures = {f"{name}.png" for name in ("identity", "gradients", "gradients-loss", "fields")}
    assert files == pictures | {"identity.json", "gradients.json", "fields.json"}
    for name in pictures:
        path = tmp_path / "new" / "folder" / name
        assert path.read_bytes().startswith(b"\x89PNG")
        assert path.stat().st_size < 200_000
    numbers = json.loads((tmp_path / "new" / "folder" / "gradients.json").read_text())
    assert len(numbers["nets"]["plain-110"]["loss"]) == 2


def test_curves_of_a_run(finished, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    metrics = (finished[0] / "metrics.jsonl").read_text()
    # One run under four names: what is tried is the drawing.
    paths = [tmp_path / f"cifar_{name}.jsonl" for name in ("plain20", "plain56", "resnet20")]
    for path in paths:
        path.write_text(metrics)
    folder = tmp_path / "deep"
    folder.mkdir()
    # As eval_every above 1 leaves it.
    first, *rest = metrics.splitlines()
    first = json.dumps(json.loads(first) | {"test_loss": None, "test_accuracy": None})
    (folder / "metrics.jsonl").write_text("\n".join([first, *rest]))
    (folder / "config.json").write_text('{"model": "cifar_resnet56"}')
    arguments = ["--parts", "curves", "--output", "~", "--metrics", *map(str, paths)]

    capsys.readouterr()
    run(arguments)
    keys = "--config.model=cifar_resnet56 --config.num_steps=7800"
    missing = f"{keys} --workdir runs/cifar_resnet56\n"
    assert capsys.readouterr().out.count(missing) == 1
    assert not (tmp_path / "curves.png").exists()
    for place in ("~/deep/metrics.jsonl", "~/deep"):
        run([*arguments, place])
        assert "cifar_resnet56: epoch " in capsys.readouterr().out
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    drawn = json.loads((tmp_path / "curves.json").read_text())
    epochs = {name: [record["epoch"] for record in records] for name, records in drawn.items()}
    assert epochs["cifar_resnet56"] == epochs["cifar_plain20"][1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--dataset mnist", "invalid choice: 'mnist'"),
        ("--steps 1", "1 is not from 2"),
        ("--steps many", "invalid integer value: 'many'"),
        ("--dataset digits --batch_size 5000", "digits has 1437 images"),
        ("--output {file}", "cannot write into"),
        ("--parts curves --metrics {file}", "does not hold the metrics of a run"),
        ("--parts curves --metrics {file}x", "does not hold the metrics of a run"),
    ],
)
def test_bad_input_is_one_line(arguments, message, digits_dir, tmp_path, capsys):
    file = tmp_path / "cifar_plain20.jsonl"
    file.write_text("{}\n")
    if "--output" not in arguments:
        arguments += f" --output {tmp_path}"
    arguments = arguments.format(file=file).split()
    assert run([*arguments, "--data_dir", str(digits_dir), "--quiet"]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
