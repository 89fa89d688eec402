"""The check of a config, and the recipes in configs/."""

import ast
import dataclasses
import importlib.util
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import flax_resnet as fr
from flax_resnet.training import check_config, default_config
from flax_resnet.training.config import Config

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs").glob("*.py"))


def get_config(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def test_defaults_are_a_valid_run():
    assert check_config(default_config()) == Config()


def test_keys_that_are_left_out_have_their_defaults():
    config = default_config()
    del config.momentum
    config.num_steps = 7
    config.data_dir = "somewhere"
    assert check_config(config) == Config(num_steps=7, data_dir="somewhere")


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipe_is_valid_and_says_how_to_run_it(path):
    check_config(get_config(path))
    docstring = ast.get_docstring(ast.parse(path.read_text()))
    assert f"python train.py --config configs/{path.name}" in (docstring or "")


# What the recipes are known by: He et al. section 4.2, and the lesson.
FACTS = {
    "cifar_resnet18": {"model": "cifar_resnet18", "num_epochs": 200, "batch_size": 128,
                       "schedule": "cosine", "nesterov": True, "weight_decay": 5e-4},
    "cifar_resnet18_short": {"model": "cifar_resnet18", "num_epochs": 30, "optimizer": "muon",
                             "schedule": "onecycle"},
    "cifar_resnet20": {"model": "cifar_resnet20", "num_steps": 64_000, "batch_size": 128,
                       "learning_rate": 0.1, "decay_at": (0.5, 0.75), "decay_factor": 0.1,
                       "weight_decay": 1e-4, "momentum": 0.9, "nesterov": False},
    "cifar_resnet20_quick": {"model": "cifar_resnet20", "num_epochs": 5, "schedule": "onecycle"},
    "cifar_speedrun": {"model": "cifar_resnet9", "schedule": "onecycle"},
    "cifar_speedrun_gpu": {"model": "cifar_resnet9", "optimizer": "muon"},
    "lab10_resnet50": {"model": "lab10_resnet50", "batch_size": 256, "horizontal_flip": False,
                       "num_epochs": 6, "optimizer": "muon", "learning_rate": 0.1,
                       "momentum": 0.6, "weight_decay": 0.1, "schedule": "onecycle"},
    "digits_resnet8": {"model": "cifar_resnet8", "dataset": "digits", "horizontal_flip": False},
    "fashion_mnist": {"model": "cifar_resnet20", "dataset": "fashion_mnist",
                      "horizontal_flip": True, "schedule": "onecycle"},
    "photos": {"model": "resnet18", "crop": "resized", "image_size": 128, "normalize": "auto"},
    "imagenet_resnet50": {"model": "resnet50", "num_epochs": 90, "learning_rate": 0.1,
                          "batch_size": 256, "warmup_epochs": 5.0, "weight_decay": 1e-4,
                          "momentum": 0.9, "nesterov": True,
                          "decay_bn_and_bias": False, "crop": "resized", "image_size": 224},
    "finetune": {"init_from": "", "freeze": ("conv1", "bn1", "layer1"), "learning_rate": 0.01},
}  # fmt: skip


def test_recipes_are_those_that_they_are_known_as():
    assert set(FACTS) == {path.stem for path in RECIPES}
    for path in RECIPES:
        run = dataclasses.asdict(check_config(get_config(path)))
        assert {key: run[key] for key in FACTS[path.stem]} == FACTS[path.stem]


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learnng_rate", 0.1, "unknown config key 'learnng_rate': did you mean 'learning_rate'?"),
        ("zzz", 1, "unknown config key 'zzz'"),
        ("wd", 1, "unknown config key 'wd': did you mean 'weight_decay'?"),
        ("Batch-Size", 1, "unknown config key 'Batch-Size': did you mean 'batch_size'?"),
        ("batch_size", "128", "batch_size must be of type int, not '128'"),
        ("batch_size", 0, "batch_size must be at least 1, not 0"),
        ("batch_size", 1.5, "batch_size must be of type int, not 1.5"),
        ("num_steps", -1, "num_steps must be at least 1, not -1"),
        ("num_steps", "many", "num_steps must be of type int or None, not 'many'"),
        ("learning_rate", float("nan"), "learning_rate must be above 0 and finite, not nan"),
        ("learning_rate", float("inf"), "learning_rate must be above 0 and finite, not inf"),
        ("schedule", "linear", "schedule must be one of constant, step, cosine, onecycle"),
        ("decay_at", (0.5, 1.5), "decay_at must be fractions of the run, between 0 and 1"),
        ("decay_at", (50, 75), "decay_at must be fractions of the run, between 0 and 1"),
        ("dtype", "float16", "dtype must be one of auto, float32, bfloat16"),
        ("model", "resnet19", "unknown model 'resnet19': did you mean resnet18"),
        ("model_fields", {"depth": 3}, "model_fields do not fit cifar_resnet18: .*'depth'"),
        ("seed", -1, r"seed must be from 0 to 2\*\*32 - 1, not -1"),
        ("momentum", 1.0, "momentum must be at least 0 and below 1"),
        ("momentum", 0.0, "nesterov needs momentum above 0"),
        ("profile_steps", (1.5, 3), "profile_steps must be a tuple of whole numbers, not"),
        ("crop_area", ("a", 1), "crop_area must be a tuple of numbers, not"),
        ("freeze", (1,), "freeze must be a tuple of strings, not"),
        ("model_fields", 3, "model_fields must be a dict, not 3"),
        ("eval_resize", 100, "eval_resize needs image_size, such as 224"),
        ("schedule", "onecycle", "schedule 'onecycle' needs warmup_epochs above 0"),
        ("label_smoothing", 1.0, "label_smoothing must be at least 0 and below 1"),
    ],
)
def test_bad_value(key, value, message):
    config = default_config().to_dict()
    config[key] = value
    with pytest.raises(fr.InputError, match=message.replace("|", r"\|").replace("?", r"\?")):
        check_config(config)


def test_config_that_is_checked_may_be_checked_again():
    config = check_config({"seed": np.int64(3), "momentum": np.float32(0.5), "nesterov": False})
    assert (type(config.seed), config.momentum) == (int, 0.5)
    assert check_config(config) == config


def test_fields_of_a_model_that_no_file_can_hold():
    with pytest.raises(fr.InputError, match="model_fields are of numbers, text and lists"):
        check_config({"model": "cifar_resnet8", "model_fields": {"norm": lambda **_: None}})


def test_flips_alternate_only_where_there_are_flips():
    with pytest.raises(fr.InputError, match="alternating_flip needs horizontal_flip"):
        check_config({"alternating_flip": True, "horizontal_flip": False})


def test_all_problems_are_named_at_once():
    config = default_config().to_dict()
    config |= {"learnng_rate": 0.1, "batch_size": 0, "model": "resnet19"}
    with pytest.raises(fr.InputError) as error:
        check_config(config)
    for problem in ("learnng_rate", "batch_size", "resnet19"):
        assert problem in str(error.value)


def test_every_key_is_read_somewhere():
    read = set()
    for path in (ROOT / "flax_resnet").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            match node:
                case ast.Attribute(
                    ast.Name("config" | "checked") | ast.Attribute(attr="config" | "_config"), name
                ):
                    read.add(name)
    assert {field.name for field in dataclasses.fields(Config)} <= read


# Anything at all in place of a value, and keys that nobody thought of.
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
KEYS = st.sampled_from([field.name for field in dataclasses.fields(Config)])


@given(st.dictionaries(KEYS | st.text(), ANYTHING, min_size=1, max_size=4))
@example({"model": ""})
@example({"model": "a model\n" * 100})
@example({"model_fields": {"a field\n" * 100: 0}})
@settings(max_examples=100, deadline=None, derandomize=True)
def test_any_config_is_valid_or_refused_in_a_line(config):
    problem = ""
    try:
        check_config(config)
    except fr.InputError as error:
        problem = str(error)
    assert len(problem) < 300 * len(config)
    assert "\n" not in problem


# A value of every field of a model, and the model that takes it.
FIELDS = {
    "layers": ("cifar_resnet8", (2, 1, 1)),
    "widths": ("cifar_resnet8", (8, 16, 24)),
    "strides": ("cifar_resnet8", (2, 2, 1)),
    "cifar_stem": ("cifar_resnet8", False),
    "deep_stem": ("resnet18", True),
    "tiered_stem": ("resnet18d", True),
    "stem_width": ("cifar_resnet8", 8),
    "stem_pool": ("resnet18", "conv"),
    "replace_stride_with_dilation": ("cifar_resnet8", (False, True)),
    "output_stride": ("resnet18", 16),
    "shortcut": ("cifar_resnet8", "average"),
    "zero_init_residual": ("cifar_resnet8", True),
    "groups": ("lab10_resnet50", 2),
    "width_per_group": ("lab10_resnet50", 32),
    "squeeze_excite": ("cifar_resnet8", True),
    "se_ratio": ("seresnet18", 0.25),
    "eca": ("cifar_resnet8", True),
    "antialias": ("cifar_resnet8", "blur"),
    "weight_standardization": ("cifar_resnet8", True),
    "norm": ("cifar_resnet8", "group"),
    "final_norm": ("cifar_preact_resnet18", False),
    "batch_norm": ("vgg11", True),
    "hidden": ("vgg11", 512),
    "dropout": ("cifar_wrn16_8", 0.1),
    "stochastic_depth": ("cifar_resnet8", 0.1),
    "scan_blocks": ("cifar_resnet20", True),
}


def test_every_field_of_a_model_can_be_set():
    assert set(FIELDS) == set(default_config().model_fields)
    for name, (model, value) in FIELDS.items():
        config = default_config()
        config.model = model
        config.model_fields[name] = value
        run = check_config(config)
        assert getattr(fr.create_model(run.model, **run.model_fields), name) == value


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_fields", {"weights": "w.pth"}, "model_fields cannot set weights"),
        ("model_fields", {"layers": (10**5, 1, 1)}, "layers must be at most 400, not "),
        ("model_fields", {"widths": (10**9, 1, 1)}, "widths must be at most 65536, not "),
        ("model_fields", {"hidden": float("nan")}, "hidden must be at most 65536, not nan"),
        ("model_fields", {"shortcut": "none at all"}, "shortcut is 'projection', 'identity'"),
        ("model_fields", {"widths": (16, 32)}, "have one entry a stage"),
        ("num_epochs", True, "num_epochs must be of type int, not True"),
        ("batch_size", None, "batch_size must be of type int, not None"),
        ("seed", 10**400, "seed must be from .* to .*32, not 1000"),
        ("on_nan", "ignore", "on_nan must be one of stop, rollback"),
        ("data_feed", "disk", "data_feed must be one of auto, resident, stream"),
        ("batch_norm", "local", "batch_norm must be one of global, per_replica"),
        ("checkpoint_minutes", 0.0, "checkpoint_minutes must be above 0 and finite"),
        ("keep_checkpoints", 0, "keep_checkpoints must be at least 1"),
    ],
)
def test_bad_value_of_a_later_key(key, value, message):
    with pytest.raises(fr.InputError, match=message):
        check_config({key: value})
