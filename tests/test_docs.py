"""The Python of docs/research.md, run as it stands."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

import flax_resnet as fr


def test_examples_of_research_run(tmp_path, monkeypatch):
    huggingface_hub = pytest.importorskip("huggingface_hub")
    monkeypatch.chdir(tmp_path)
    # The Hub's repository, as it lies in the Hub's cache after the first time.
    model = fr.resnet18()
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), np.float32)
    shapes = jax.eval_shape(lambda: model.lazy_init(jax.random.key(0), images, train=False))
    published = jax.tree.map(lambda s: np.ones(s.shape, s.dtype), shapes)
    fr.save_weights(model, published, "published.safetensors")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *args, **kwargs: "published.safetensors"
    )

    page = (Path(__file__).parents[1] / "docs" / "research.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(examples) == 15
    names = {}
    for example in examples:
        exec(example, names)
    assert max(names["value"], names["nnx_value"]) < np.log(10)  # what guessing costs
    for same in (names["restored"]["variables"], names["back"]):
        jax.tree.map(np.testing.assert_array_equal, same, names["variables"])
