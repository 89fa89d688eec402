"""The page to try a run on: what it answers, and the page itself where gradio is installed."""

import dataclasses
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import flax_resnet as fr
from flax_resnet import demo
from flax_resnet.data import normalize

pytestmark = pytest.mark.slow  # it is an extra


def test_examples_and_what_it_says_of_them(finished, config, tmp_path):
    run = fr.load_run(finished[0])
    paths = demo.write_examples(run, tmp_path)
    images = [np.asarray(Image.open(path)) for path in paths]
    test = fr.load_dataset("digits", config.eval_split, config.data_dir)
    labels = [test.labels[(test.images == image).all((1, 2, 3)).argmax()] for image in images]
    assert len(set(labels)) == len(labels) == 8
    named, shown = demo.make_answer(run)(paths[0])
    logits = run.model.apply(
        run.variables, normalize(images[0][None], run.mean, run.std), train=False
    )
    expected = softmax(np.float64(logits[0]))
    np.testing.assert_allclose([named[str(i)] for i in range(10)], expected, rtol=1e-3, atol=1e-6)
    assert shown is not None
    assert shown.size == (896, 448)


def test_examples_that_cannot_be_read(finished, tmp_path, capsys):
    run = fr.load_run(finished[0])
    gone = dataclasses.replace(run, config=dataclasses.replace(run.config, eval_split="gone"))
    assert demo.write_examples(gone, tmp_path) == []
    assert capsys.readouterr().err.startswith("there are no examples: ")


@pytest.mark.parametrize("gradio", [None, SimpleNamespace(__version__="5.49.1")])
def test_without_a_gradio_that_will_do(finished, monkeypatch, call, gradio):
    monkeypatch.setitem(sys.modules, "gradio", gradio)
    code, out, err = call(demo, "--quiet", "--workdir", finished[0])
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "the page needs gradio 6 or newer: pip install -U gradio" in err


def test_page(finished):
    pytest.importorskip("gradio")
    page = demo.make_page(fr.load_run(finished[0]), [])
    assert page.get_config_file()["title"] == finished[0].name
