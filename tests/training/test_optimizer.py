"""SGD and learning rates against PyTorch's."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flax_resnet.errors import InputError
from flax_resnet.training import learning_rate_schedule, make_optimizer
from flax_resnet.training.config import Config

torch = pytest.importorskip("torch")

STEPS_PER_EPOCH, TOTAL_STEPS = 10, 100


def rates(**fields) -> np.ndarray:
    schedule = learning_rate_schedule(
        Config(**fields), steps_per_epoch=STEPS_PER_EPOCH, total_steps=TOTAL_STEPS
    )
    return np.array([schedule(step) for step in range(TOTAL_STEPS)])


def torch_rates(make_scheduler, peak: float) -> np.ndarray:
    """The learning rate of every step of torch.optim.SGD under a scheduler."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=peak)
    scheduler = make_scheduler(optimizer)
    out = []
    for _ in range(TOTAL_STEPS):
        out.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return np.array(out)


def test_constant():
    np.testing.assert_allclose(rates(schedule="constant", learning_rate=0.3), 0.3, rtol=1e-6)


def test_step_is_multi_step_lr():
    ours = rates(schedule="step", learning_rate=0.1, decay_at=(0.5, 0.75), decay_factor=0.2)
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [50, 75], gamma=0.2), 0.1
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


def test_two_drops_at_one_step_are_two():
    ours = rates(schedule="step", decay_at=(0.5, 0.501), decay_factor=0.2, learning_rate=1.0)
    np.testing.assert_allclose(ours[[49, 51]], [1, 0.04], rtol=1e-6)


def test_cosine_is_cosine_annealing_lr():
    ours = rates(schedule="cosine", learning_rate=0.1)
    theirs = torch_rates(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, TOTAL_STEPS), 0.1)
    np.testing.assert_allclose(ours, theirs, atol=1e-7)


def test_one_cycle_is_one_cycle_lr():
    ours = rates(schedule="onecycle", learning_rate=0.1, warmup_epochs=3.0)
    theirs = torch_rates(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.1, TOTAL_STEPS, pct_start=0.3), 0.1
    )
    # PyTorch turns a step earlier and ends a step earlier: the curve of its steps 0 ... 99 is
    # that of ours at 0 ... 100.
    assert ours[0] == pytest.approx(theirs[0])
    assert ours[30] == pytest.approx(theirs[29]) == pytest.approx(0.1)

    def cosine(first, last, steps):
        return last + (first - last) / 2 * (1 + np.cos(np.pi * np.arange(steps) / steps))

    expected = np.concatenate([cosine(0.1 / 25, 0.1, 30), cosine(0.1, 0.1 / 25e4, 70)])
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-7)


def test_one_cycle_has_its_peak_after_the_warm_up():
    config = Config(schedule="onecycle", learning_rate=0.1, warmup_epochs=1.0)
    for warmup in range(1, 100):
        rate = learning_rate_schedule(config, steps_per_epoch=warmup, total_steps=100)
        assert np.argmax([float(jnp.asarray(rate(warmup + i))) for i in (-1, 0, 1)]) == 1
    # Of less than half a step nothing is left.
    config = dataclasses.replace(config, warmup_epochs=0.01)
    rate = learning_rate_schedule(config, steps_per_epoch=22, total_steps=100)
    assert float(jnp.asarray(rate(0))) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", ["constant", "step", "cosine"])
def test_warm_up_rises_evenly_to_the_peak(schedule):
    ours = rates(schedule=schedule, learning_rate=0.2, warmup_epochs=2.0)
    np.testing.assert_allclose(ours[:21], 0.2 * np.arange(1, 22) / 21, rtol=1e-5)
    assert ours.max() == ours[20]
    if schedule == "cosine":  # to 0, in the steps that are left
        fall = 0.1 * (1 + np.cos(np.pi * np.arange(80) / 80))
        np.testing.assert_allclose(ours[20:], fall, atol=1e-6)
    if schedule == "step":  # the drops stay where they were
        np.testing.assert_allclose(ours[[49, 50, 74, 75]], [0.2, 0.02, 0.02, 0.002], rtol=1e-5)


def test_warm_up_is_shorter_than_the_run():
    with pytest.raises(
        InputError, match=r"warmup_epochs=10.0 is 100 steps, but the run has only 100"
    ):
        rates(warmup_epochs=10.0)


def test_an_unknown_schedule():
    with pytest.raises(InputError, match="unknown schedule 'linear'"):
        rates(schedule="linear")


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_that_of_torch(rng, nesterov, momentum):
    nesterov = nesterov and momentum > 0
    config = Config(
        schedule="step",
        learning_rate=0.1,
        decay_at=(0.05,),
        momentum=momentum,
        nesterov=nesterov,
        weight_decay=0.01,
    )
    schedule = learning_rate_schedule(
        config, steps_per_epoch=STEPS_PER_EPOCH, total_steps=TOTAL_STEPS
    )
    optimizer = make_optimizer(config, schedule)
    initial = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    params: Any = jax.tree.map(jnp.float32, initial)
    state = optimizer.init(params)

    twins = {
        k: torch.tensor(v, dtype=torch.float32, requires_grad=True) for k, v in initial.items()
    }
    twin = torch.optim.SGD(
        twins.values(), lr=0.1, momentum=momentum, nesterov=nesterov, weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.MultiStepLR(twin, [5], gamma=0.1)
    for _ in range(10):
        grads = {k: rng.normal(size=v.shape) for k, v in initial.items()}
        updates, state = optimizer.update(jax.tree.map(jnp.float32, grads), state, params)
        params = optax.apply_updates(params, updates)
        for k, v in twins.items():
            v.grad = torch.tensor(grads[k], dtype=torch.float32)
        twin.step()
        scheduler.step()
        for k, v in twins.items():
            np.testing.assert_allclose(params[k], v.detach(), rtol=1e-5, atol=1e-6)


def test_weight_decay_leaves_out_norms_and_biases_on_request():
    params = {
        "conv1": {"kernel": jnp.ones((3, 3, 2, 2))},
        "bn1": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "fc": {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)},
    }
    zeros = jax.tree.map(jnp.zeros_like, params)
    config = Config(weight_decay=0.5, nesterov=False, momentum=0.0)
    for everything in (True, False):
        config = dataclasses.replace(config, decay_bn_and_bias=everything)
        optimizer = make_optimizer(config, optax.constant_schedule(1.0))
        updates, _ = optimizer.update(zeros, optimizer.init(params), params)
        small = -0.5 if everything else 0.0
        expected = {
            "conv1": {"kernel": -0.5},
            "bn1": {"scale": small, "bias": small},
            "fc": {"kernel": -0.5, "bias": small},
        }
        jax.tree.map(np.testing.assert_array_equal, updates, expected)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb", "muon"])
def test_every_optimizer_leaves_norms_and_biases_undecayed_on_request(name):
    layer = {"kernel": jnp.ones((3, 3, 2, 2)), "bias": jnp.ones(2), "scale": jnp.ones(2)}
    params = {"conv1": layer, "fc": layer | {"kernel": jnp.ones((2, 2))}}
    config = Config(optimizer=name, weight_decay=0.5, decay_bn_and_bias=False)
    zeros = jax.tree.map(jnp.zeros_like, params)
    after: Any = updated(config, params, [zeros])
    for module in ("conv1", "fc"):
        assert (after[module]["kernel"] < 1).all()
        assert (after[module]["bias"] == 1).all()
        assert (after[module]["scale"] == 1).all()


def updated(config, initial, gradients):
    """Parameters after these gradients with a constant learning rate."""
    optimizer = make_optimizer(config, optax.constant_schedule(config.learning_rate))
    params: Any = jax.tree.map(jnp.float32, initial)
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = optimizer.update(jax.tree.map(jnp.float32, gradient), state, params)
        params = optax.apply_updates(params, updates)
    return params


def drawn(rng):
    """Parameters, and ten gradients of them of growing length."""
    initial = {"kernel": rng.normal(size=(3, 4)), "bias": rng.normal(size=4)}
    gradients = [
        {name: (i + 1) / 5 * rng.normal(size=v.shape) for name, v in initial.items()}
        for i in range(10)
    ]
    return initial, gradients


@pytest.mark.parametrize(("name", "clip_norm"), [("adamw", None), ("adamw", 1.5), ("sgd", 1.5)])
def test_adamw_and_clipping_are_those_of_torch(rng, name, clip_norm):
    initial, gradients = drawn(rng)
    config = Config(optimizer=name, learning_rate=0.03, weight_decay=0.1, clip_norm=clip_norm)
    twins = {name: torch.tensor(v, requires_grad=True) for name, v in initial.items()}
    twin = torch.optim.AdamW(twins.values(), lr=0.03, weight_decay=0.1)
    if name == "sgd":
        twin = torch.optim.SGD(
            twins.values(), lr=0.03, momentum=0.9, nesterov=True, weight_decay=0.1
        )
    for gradient in gradients:
        for key, v in twins.items():
            v.grad = torch.tensor(gradient[key])
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(twins.values(), clip_norm)
        twin.step()
    ours = updated(config, initial, gradients)
    for key, v in twins.items():
        np.testing.assert_allclose(ours[key], v.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_that_of_its_paper(rng, nesterov):
    """You et al., arXiv:1708.03888, algorithm 1; without rates of its own for biases.

    With nesterov a step looks ahead, as in torch.optim.SGD.
    """
    initial, gradients = drawn(rng)
    config = Config(optimizer="lars", learning_rate=2.0, weight_decay=0.1, nesterov=nesterov)
    w, v = initial["kernel"], 0.0
    b, u = initial["bias"], 0.0
    for gradient in gradients:
        g = gradient["kernel"] + 0.1 * w
        local = 0.001 * np.linalg.norm(w) / np.linalg.norm(g)
        change, change_b = 2.0 * local * g, 2.0 * (gradient["bias"] + 0.1 * b)
        v, u = 0.9 * v + change, 0.9 * u + change_b
        w = w - (change + 0.9 * v if nesterov else v)
        b = b - (change_b + 0.9 * u if nesterov else u)
    ours = updated(config, initial, gradients)
    np.testing.assert_allclose(ours["kernel"], w, rtol=1e-4)
    np.testing.assert_allclose(ours["bias"], b, rtol=1e-4)


def test_lamb_is_that_of_its_paper(rng):
    """You et al., arXiv:1904.00962, algorithm 2, with phi the identity."""
    initial, gradients = drawn(rng)
    config = Config(optimizer="lamb", learning_rate=0.05, weight_decay=0.1, decay_bn_and_bias=False)
    ours = updated(config, initial, gradients)
    for name, decay in (("kernel", 0.1), ("bias", 0.0)):
        x, m, v = initial[name], 0.0, 0.0
        for t, gradient in enumerate(gradients, 1):
            m = 0.9 * m + 0.1 * gradient[name]
            v = 0.999 * v + 0.001 * gradient[name] ** 2
            r = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
            change = r + decay * x
            x = x - 0.05 * np.linalg.norm(x) / np.linalg.norm(change) * change
        np.testing.assert_allclose(ours[name], x, rtol=1e-4)


@pytest.mark.parametrize("shape", [(3, 3, 2, 4), (1, 1, 2, 5), (4, 1, 1, 3, 2)])
def test_muon_is_that_of_its_author(rng, shape):
    """K. Jordan, "Muon: An optimizer for hidden layers in neural networks", 2024.

    In float64 by singular values; momentum is corrected for its start, as Adam's. The last shape
    is of four kernels on top of each other.
    """
    initial = {"kernel": rng.normal(size=shape), "bias": rng.normal(size=4)}
    gradients = [{name: rng.normal(size=v.shape) for name, v in initial.items()} for _ in range(3)]
    config = Config(
        optimizer="muon",
        learning_rate=0.2,
        momentum=0.6,
        weight_decay=0.1,
        decay_bn_and_bias=False,
    )
    matrices = initial["kernel"].reshape(-1, np.prod(shape[-4:-1]), shape[-1])
    momentum = 0.0
    for t, gradient in enumerate(gradients, 1):
        g = gradient["kernel"].reshape(matrices.shape)
        momentum = 0.6 * momentum + 0.4 * g
        ahead = 0.6 * momentum / (1 - 0.6 ** (t + 1)) + 0.4 * g / (1 - 0.6**t)
        left, values, right = np.linalg.svd(ahead, full_matrices=False)
        values /= np.linalg.norm(ahead, axis=(1, 2))[:, None]
        for _ in range(5):  # Newton and Schulz
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        length = max(1, shape[-1] / matrices.shape[1]) ** 0.5
        matrices = matrices - 0.2 * (length * left * values[:, None] @ right + 0.1 * matrices)
    ours = updated(config, initial, gradients)
    np.testing.assert_allclose(ours["kernel"], matrices.reshape(shape), rtol=1e-3, atol=1e-4)
    others = Config(optimizer="adamw", learning_rate=0.01, weight_decay=0.0)
    alone = [{"bias": gradient["bias"]} for gradient in gradients]
    expected = updated(others, {"bias": initial["bias"]}, alone)
    np.testing.assert_allclose(ours["bias"], expected["bias"], rtol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw", "lars", "lamb", "muon"])
def test_every_optimizer_leaves_what_is_frozen(rng, name):
    initial, gradients = drawn(rng)
    config = Config(optimizer=name, freeze=("conv1",), clip_norm=1.0)

    def tree(leaves):
        return {"conv1": leaves, "fc": {"kernel": leaves["kernel"]}}

    ours = updated(config, tree(initial), map(tree, gradients))
    for leaf in ("kernel", "bias"):
        np.testing.assert_array_equal(ours["conv1"][leaf], np.float32(initial[leaf]))
    assert not np.array_equal(ours["fc"]["kernel"], np.float32(initial["kernel"]))
    # The length that is clipped is that of what is trained alone.
    alone = updated(
        dataclasses.replace(config, freeze=()),
        {"fc": {"kernel": initial["kernel"]}},
        [{"fc": {"kernel": gradient["kernel"]}} for gradient in gradients],
    )
    np.testing.assert_allclose(ours["fc"]["kernel"], alone["fc"]["kernel"], rtol=1e-6)
