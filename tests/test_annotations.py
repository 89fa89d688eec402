"""The shapes in the signatures are true: jaxtyping and beartype check them at every call."""

import subprocess
import sys
import textwrap

import pytest

PROGRAM = """
    from functools import partial
    from jaxtyping import TypeCheckError, install_import_hook

    parts = ["models", "data.augment", "training.steps"]
    with install_import_hook([f"flax_resnet.{part}" for part in parts], "beartype.beartype"):
        import flax_resnet as fr

    import jax
    import jax.numpy as jnp
    import optax
    from flax_resnet.data import augment, normalize
    from flax_resnet.training import create_state, eval_step, train_step

    small = {"widths": (8, 16), "strides": (1, 2)}
    models = [
        fr.ResNet(fr.BasicBlock, (1, 2), cifar_stem=True, squeeze_excite=True, **small),
        fr.ResNet(fr.BasicBlock, (1, 3), shortcut="identity", scan_blocks=True, **small),
        fr.ResNet(fr.Bottleneck, (1, 1), deep_stem=True, shortcut="average", groups=2, **small),
        fr.ResNet(fr.PreActBasicBlock, (1, 1), shortcut="none", norm="group", **small),
        fr.ResNet(fr.PreActBottleneck, (1, 1), stochastic_depth=0.1, dtype=jnp.bfloat16, **small),
        fr.ResNet9(widths=(8, 8, 16, 16)),
        fr.VGG((1, 1), widths=(8, 16), hidden=8, batch_norm=True),
    ]

    def steps(model, images, labels):
        key = jax.random.key(0)
        images = normalize(augment(images, labels, key, crop_padding=2, flip=True), (0.5,), (0.2,))
        optimizer = optax.sgd(0.1)
        state = create_state(model, optimizer, key, images.shape[1:])
        batch = {"image": images, "label": labels, "mask": labels == labels}
        state, _ = train_step(state, batch, model=model, optimizer=optimizer, dropout_key=key)
        outputs = model.apply(state.variables, images, train=False, features=True)
        return eval_step(state.variables, batch, model=model), outputs

    images, labels = jnp.zeros((4, 9, 14, 1), jnp.uint8), jnp.zeros(4, jnp.int32)
    for model in models:
        jax.eval_shape(partial(steps, model), images, labels)
    try:
        jax.eval_shape(partial(fr.BasicBlock(8).init, train=False), jax.random.key(0), images)
    except TypeCheckError:
        print("checked")  # images are floats
"""


@pytest.mark.slow
def test_shapes_are_those_of_the_signatures():
    command = [sys.executable, "-c", textwrap.dedent(PROGRAM)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout == "checked\n", done.stderr
