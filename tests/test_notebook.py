"""The notebook, run from its top to its end outside of Colab."""

import html
import json
import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "notebooks" / "colab.ipynb"


def test_it_is_stored_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Jupyter's event loops
def test_it_runs(tmp_path, digits_dir, monkeypatch):
    for name in ("configs", "train.py", "flax_resnet"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.setenv("QUICK", "1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")  # for so few steps
    monkeypatch.setenv("TFDS_DATA_DIR", str(digits_dir))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute(
        env=os.environ
    )

    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert "CPU: 1 x cpu" in text
    assert "epoch 2/2" in text
    assert "tensorboard --logdir" in text
    assert re.search(r"test_image[.]png\n +[\d.]+%  \d\n", text), text
    images = [output.data for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 2  # the picture, and where the net looked
    (page,) = [
        output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})
    ]
    assert html.escape("Content-Security-Policy") in page
    left = {path.name for path in tmp_path.iterdir() if not path.is_symlink()}
    assert left == {"runs", "ipython"}
    run = tmp_path / "runs" / "digits_resnet8-2-epochs"
    assert json.loads((run / "config.json").read_text())["num_epochs"] == 2
