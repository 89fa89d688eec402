"""The README's Python, run as it stands."""

import re
from pathlib import Path

import pytest


def test_examples_run():
    torch_resnet = pytest.importorskip("tests.models.torch_resnet", exc_type=ImportError)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    examples = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(examples) == 3
    names = {"torch_model": torch_resnet.create("resnet50")}
    for example in examples:
        exec(example, names)
    assert names["logits"].shape == (8, 10)
