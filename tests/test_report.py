"""The report of a run: its numbers, and that it is whole and safe as one file."""

import base64
import dataclasses
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import tracemalloc
from html.parser import HTMLParser
from io import BytesIO
from unittest import mock

import numpy as np
import pytest
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import confusion_matrix, precision_recall_fscore_support

import flax_resnet as fr
from flax_resnet import report
from flax_resnet.evaluate import Evaluation, open_test_set, summarize
from flax_resnet.report import __main__ as program
from flax_resnet.report import calibration, curves, page, pictures

HOSTILE = "<script>alert('\"&')</script>"


class Page(HTMLParser):
    """What of a page the tests look at: its tags with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br", "input", "image"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag  # so the page is well-formed

    def handle_data(self, data):
        self.text.append(data)


def read(path):
    page = Page(path)
    assert not page.open
    return page


def assert_stands_alone(page):
    scripts = re.findall(r"<script>(.*?)</script>", page.html, re.DOTALL)
    tags = [attributes for tag, attributes in page.tags if tag == "script"]
    assert tags == [{"type": "application/json", "id": "drawn"}, {}]
    # Whatever else the page says, a browser runs and fetches nothing.
    (script,) = scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy == (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert re.match("#|data:image/(png|jpeg);base64,", value)
            assert not re.search(r"url\((?!#)|@import", value or "")
    assert not re.search(r"@import|url\((?!#)", "".join(page.text))
    assert not re.search("https?:", page.html)


def drawn(page):
    """What the script draws."""
    return json.loads(re.findall(r'id="drawn">(.*?)</script>', page.html)[0])


def test_page_has_all_and_stands_alone(finished, run, evaluation, tmp_path):
    path = report.write_report([finished[0]], tmp_path / "one.html")
    shown = read(path)
    assert_stands_alone(shown)
    for heading in ("Curves", "Confusion", "Classes", "Calibration", "First layer", "Config"):
        assert heading in shown.text
    wrong = int((~evaluation.correct).sum())
    images = [attributes for tag, attributes in shown.tags if tag == "image"]
    assert len(images) == min(wrong, 12) * 3  # a picture and two maps
    text = " ".join(shown.text)
    assert f"{run.records[-1]['test_accuracy']:.2%}" in shown.text
    assert "101 images" in shown.text
    assert run.hardware["cpu"] in text
    assert run.versions["jax"] in text


def test_curves_are_the_lines_of_the_files(finished, run):
    charts = {chart["name"]: chart for chart in curves.charts([run, run])}
    test, train, other, _ = charts["Accuracy (%)"]["lines"]
    assert [test["run"], train["run"], other["run"]] == [0, 0, 1]
    assert [test["split"], train["split"]] == ["test", "train"]
    assert list(test["x"]) == [1, 2, 3, 4]
    expected = [100 * record["test_accuracy"] for record in run.records]
    np.testing.assert_allclose(test["y"], expected, rtol=1e-4)
    error = charts["Error (%)"]["lines"][1]["y"]
    np.testing.assert_allclose(np.add(error, train["y"]), 100, rtol=1e-4)
    # It has no line in steps.jsonl, so it is by the steps at the epochs' ends.
    assert charts["Gradient norm"]["x"] == "step"
    assert list(charts["Gradient norm"]["lines"][0]["x"]) == [r["step"] for r in run.records]


def test_curves_by_step(run_copy):
    line = {"step": 5, "learning_rate": 0.25, "gradient_norm": 2.0, "loss": 1.0}
    others = ({"gradient_norm": float("nan")}, {"learning_rate": ""}, {"step": 10**400})
    bad = ["torn", "[]", '{"step": 7}', *(json.dumps(line | other) for other in others), "{"]
    many = [json.dumps(line | {"step": step}) for step in range(10, 3010)]
    (run_copy / "steps.jsonl").write_text("\n".join([json.dumps(line), *bad, *many]))
    charts = {chart["name"]: chart for chart in curves.charts([fr.load_run(run_copy)])}
    (rate,) = charts["Learning rate"]["lines"]
    assert rate["x"][:2] == (5, 13)  # every fourth of 3001
    assert set(rate["y"]) == {0.25}
    assert set(charts["Gradient norm"]["lines"][0]["y"]) == {2.0}


def test_lines_beyond_any_size(run_copy, capsys):
    (run_copy / "steps.jsonl").touch()
    os.truncate(run_copy / "steps.jsonl", 10**12)
    charts = {chart["name"]: chart for chart in curves.charts([fr.load_run(run_copy)])}
    assert list(charts["Learning rate"]["lines"][0]["x"]) == [8, 16, 24, 32]
    said = "steps.jsonl cannot be read: it has 1,000,000,000,000 bytes; the curves go by epochs\n"
    assert capsys.readouterr().err == f"{run_copy}/{said}"


def test_run_is_not_the_same_to_the_colour_blind():
    """Machado et al., IEEE TVCG 15(6), 2009: what of a colour, in linear RGB, they see."""
    seen = {
        "all": np.eye(3),
        "protanope": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        "deuteranope": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    }
    colors = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in curves.COLORS])
    for matrix in seen.values():
        both = itertools.combinations(np.clip(colors**2.2 @ np.transpose(matrix), 0, 1), 2)
        assert min(np.abs(a ** (1 / 2.2) - b ** (1 / 2.2)).max() for a, b in both) > 0.15


def test_runs_in_one_another(finished, run_copy, tmp_path):
    other = run_copy.rename(tmp_path / HOSTILE.replace("/", "|"))
    config = json.loads((other / "config.json").read_text())
    config["learning_rate"] = 0.0625
    (other / "config.json").write_text(json.dumps(config))
    path = report.write_report([finished[0], other])
    assert path == finished[0] / "report.html"
    shown = read(path)
    path.unlink()
    assert_stands_alone(shown)
    assert sum(other.name in text for text in shown.text) == 4  # title, heading, table, its part
    assert [one["name"] for one in drawn(shown)["runs"]] == [finished[0].name, other.name]
    assert {line["run"] for line in drawn(shown)["charts"][0]["lines"]} == {0, 1}
    assert shown.text.count("learning_rate") == 1 + 2  # what differs, and the configs
    boxes = [a["data-run"] for tag, a in shown.tags if tag == "input" and "data-run" in a]
    assert boxes == ["0", "1"]


def test_best_of_several_runs():
    def about(accuracy, loss, rate, **more):
        numbers = {
            "test accuracy": page.Number(accuracy, f"{accuracy:.0%}", ""),
            "test loss": page.Number(loss, str(loss), ""),
        }
        return {"numbers": numbers | more, "config": [("seed", "0", False), ("lr", rate, True)]}

    time = {"time": page.Number(3.0, "3 s", "")}
    columns = page.compare([about(0.5, 2.0, "1"), about(0.75, 2.0, "2", **time)])
    assert columns == [
        {"name": "test accuracy", "cells": ["50%", "75%"], "best": {1}, "config": False},
        {"name": "test loss", "cells": ["2.0", "2.0"], "best": set(), "config": False},
        {"name": "time", "cells": ["-", "3 s"], "best": set(), "config": False},
        {"name": "lr", "cells": ["1", "2"], "best": set(), "config": True},
    ]


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
def test_browser_draws_the_curves(finished, tmp_path):
    path = report.write_report([finished[0]], tmp_path / "one.html")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    options = [f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=30000"]
    result = subprocess.run(
        [*command, *options, path.as_uri()], capture_output=True, text=True, check=True, timeout=60
    )
    charts = drawn(read(path))["charts"]
    assert result.stdout.count('class="chart"') == len(charts) == 6
    lines = re.findall(r'class="line[^"]*"[^>]*d="M([\d.,L]*)"', result.stdout)
    assert [line.count(",") for line in lines] == [
        sum(not chart["log"] or y > 0 for y in line["y"])
        for chart in charts
        for line in chart["lines"]
    ]


def test_hostile_names_are_text(run_copy, monkeypatch):
    load = report.open_run
    names = (HOSTILE, *"123456789")
    monkeypatch.setattr(page, "open_test_set", lambda *_: open_test_set(load(run_copy, "newest")))
    monkeypatch.setattr(
        report, "open_run", lambda *a: dataclasses.replace(load(*a), class_names=names)
    )
    config = json.loads((run_copy / "config.json").read_text())
    config["train_split"] = HOSTILE
    (run_copy / "config.json").write_text(json.dumps(config))
    shown = read(report.write_report([run_copy]))
    assert_stands_alone(shown)
    assert shown.text.count(HOSTILE) >= 4  # two in the confusion matrix, a class, the config


def test_confusions_and_classes_are_those_of_scikit_learn(run, rng):
    labels = rng.integers(0, 9, 300).astype(np.int32)
    logits = rng.normal(size=(300, 10)).astype(np.float32)
    logits[:, 8] -= 9  # is never predicted, and 9 is never right
    evaluation = Evaluation(logits, labels)
    predictions = logits.argmax(1)
    expected = confusion_matrix(labels, predictions, labels=np.arange(10))
    rows = page._confusion(run, evaluation)["rows"]
    np.testing.assert_array_equal([[cell[0] for cell in row] for _, row in rows], expected)
    classes = page._classes(summarize(run, evaluation)["classes"], evaluation)
    expected = precision_recall_fscore_support(
        labels,
        predictions,
        labels=np.arange(10),
        zero_division=np.nan,  # pyright: ignore[reportArgumentType]
    )
    for name, values in zip(("precision", "recall", "f1", "examples"), expected, strict=True):
        np.testing.assert_allclose(np.array([c[name] for c in classes], float), np.asarray(values))


def test_confusion_of_many_classes_is_a_picture(run, rng):
    many = dataclasses.replace(run, class_names=tuple(f"<{i}>" for i in range(40)))
    labels = rng.integers(0, 40, 101).astype(np.int32)
    labels[:5] = 7
    predictions = np.where(labels == 7, 9, labels)
    evaluation = Evaluation(np.eye(40, dtype=np.float32)[predictions], labels)
    confusions = page.confusion_matrix(evaluation, 40)
    shown = page._confusion(many, evaluation)
    assert shown["rows"] is None
    png = Image.open(BytesIO(base64.b64decode(shown["picture"].partition(",")[2])))
    np.testing.assert_array_equal(np.asarray(png)[..., 3] > 0, confusions > 0)
    (pair,) = page._pairs(many, open_test_set(run), evaluation)
    count = int((labels == 7).sum())
    assert (pair["label"], pair["prediction"], pair["count"]) == ("<7>", "<9>", count)
    assert pair["share"] == 1
    assert [i for i, _ in pair["pictures"]] == np.flatnonzero(labels == 7)[:4].tolist()


def test_confusion_of_very_many_classes_takes_little_memory(run, rng):
    """Where a matrix of all pairs would take 40 GB."""
    names = tuple(map(str, range(70_000)))
    labels = rng.permutation(70_000)[:5000].astype(np.int32)
    predictions = np.where(np.arange(5000) < 9, 69_999, labels)
    labels[:7] = 5
    evaluation = mock.Mock(
        labels=labels,
        predictions=predictions,
        correct=predictions == labels,
        logits=np.broadcast_to(np.float32(0), (5000, 70_000)),
    )
    many = dataclasses.replace(run, class_names=names)
    images = mock.Mock(read=lambda shown: (np.zeros((len(shown), 8, 8, 3), np.uint8), None))
    tracemalloc.start()
    page._confusion(many, evaluation)
    pairs = page._pairs(many, images, evaluation)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most < 100e6
    first = pairs[0]
    assert (first["label"], first["prediction"], first["count"]) == ("5", "69999", 7)
    matrix = page.confusion_matrix(evaluation, 70_000)
    assert (matrix.sum(), matrix.shape) == (5000, (500, 500))
    assert matrix[0, 499] >= 7


def test_calibration(rng):
    confidence = rng.uniform(0.1, 1, 2000)
    confidence[:3] = 1.0, 0.2, 1 / 15
    correct = rng.uniform(size=2000) < confidence**2
    expected = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            expected += inside.mean() * gap
    shown = calibration.calibration(confidence, correct)
    assert shown["error"] == pytest.approx(expected)
    assert sum(one["count"] for one in shown["bins"]) == 2000
    for one in shown["bins"]:
        inside = (confidence > one["low"]) & (confidence <= one["high"])
        assert (one["count"], one["right"]) == (inside.sum(), correct[inside].sum())
        interval = binomtest(one["right"], one["count"]).proportion_ci(method="wilson")
        assert one["interval"] == pytest.approx(tuple(interval))


def test_mistakes_come_with_the_surest_first(run, rng):
    data = open_test_set(run)
    assert isinstance(data, fr.Dataset)
    logits = rng.normal(size=(101, 10)).astype(np.float32)
    evaluation = Evaluation(logits, data.labels)
    mistakes = page._mistakes(run, data, evaluation)
    wrong = np.nonzero(logits.argmax(1) != data.labels)[0]
    surest = sorted(wrong, key=lambda i: -evaluation.probabilities[i].max())[:12]
    assert [one["index"] for one in mistakes] == surest
    for one in mistakes:
        assert one["label"] == str(data.labels[one["index"]]) != one["prediction"]
        assert len(one["maps"]) == 2


def test_large_pictures_are_jpeg(rng):
    pixels = np.tile(np.linspace(0, 255, 80).astype(np.uint8)[:, None, None], (1, 100, 3))
    for image, kind, at_most in ((pixels, "jpeg", None), (pixels, "png", 50)):
        start, _, content = pictures.data_url(image, at_most).partition(",")
        assert start == f"data:image/{kind};base64"
        stored = Image.open(BytesIO(base64.b64decode(content)))
        assert stored.size == ((100, 80) if at_most is None else (50, 40))
    assert "png" in pictures.data_url(rng.integers(0, 256, (9, 9, 5), dtype=np.uint8))


def test_without_data_the_rest_is_shown(run_copy, monkeypatch):
    def no_data(*_):
        raise fr.InputError("no data and no network")

    monkeypatch.setattr(page, "open_test_set", no_data)
    shown = read(report.write_report([run_copy]))
    assert_stands_alone(shown)
    assert "There is none: no data and no network" in shown.text
    assert {"Curves", "First layer"} <= set(shown.text)
    assert "Confusion" not in shown.text


def test_run_without_an_epoch(run_copy):
    (run_copy / "metrics.jsonl").unlink()
    shown = read(report.write_report([run_copy]))
    assert "No epoch is done yet." in shown.text


def test_program(finished, tmp_path, call):
    path = tmp_path / "page.html"
    code, out, err = call(program, finished[0], "--output", path)
    assert (code, out, err) == (0, f"{path}\n", "evaluating 101 images ...\n")
    for arguments, message in (
        ((tmp_path,), "is not the folder of a run"),
        ((finished[0], "--output", tmp_path / "no" / "page.html"), "there is no folder "),
        ((finished[0], "--output", tmp_path), "is not a file: name one by --output"),
        ((), "required: RUN"),
    ):
        code, out, err = call(program, *arguments)  # before anything is evaluated
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_training_survives_a_report_that_fails(tmp_path, capsys):
    report.report_after_training(tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        f"writing {tmp_path}/report.html",
        f"there is no report: {tmp_path} is not the folder of a run: it has no config.json",
    ]
