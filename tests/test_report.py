"""The report of a run: its numbers, and that it is whole and safe as one file."""

import dataclasses
import json
import re
import tracemalloc
from html.parser import HTMLParser
from unittest import mock

import numpy as np
import pytest
from sklearn.metrics import confusion_matrix

import flax_resnet as fr
from flax_resnet import report
from flax_resnet.evaluate import Evaluation, open_test_set

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
        if tag not in ("meta", "img", "br"):
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
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert re.match("#|data:image/png;base64,", value)
            assert not re.search(r"url\((?!#)|@import", value or "")
    assert not re.search(r"@import|url\((?!#)", "".join(page.text))
    assert not re.search("https?:", page.html)


def test_page_has_all_and_stands_alone(finished, run, evaluation, tmp_path):
    path = report.write_report([finished[0]], tmp_path / "one.html")
    page = read(path)
    assert_stands_alone(page)
    for heading in ("Curves", "Confusion", "Classes", "Calibration", "First layer", "Config"):
        assert heading in page.text
    assert len([tag for tag, _ in page.tags if tag == "svg"]) == 5 + 1
    wrong = int((~evaluation.correct).sum())
    pictures = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == min(wrong, 12) + 1
    text = " ".join(page.text)
    assert f"{run.records[-1]['test_accuracy']:.2%} of 101 images" in text
    assert run.hardware["cpu"] in text
    assert run.versions["jax"] in text
    # Whatever the page says, a browser runs and fetches nothing.
    policy = next(a["content"] for _, a in page.tags if a.get("http-equiv"))
    assert policy == "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def test_runs_in_one_another(finished, run_copy, tmp_path):
    other = run_copy.rename(tmp_path / HOSTILE.replace("/", "|"))
    path = report.write_report([finished[0], other])
    assert path == finished[0] / "report.html"
    page = read(path)
    path.unlink()
    assert_stands_alone(page)
    assert page.text.count(other.name) == 3  # in the table, the legend and its own part
    colors = {
        c for c in ("var(--run0)", "var(--run1)", "var(--run2)") if f"stroke: {c}" in page.html
    }
    assert colors == {"var(--run0)", "var(--run1)"}


def test_hostile_names_are_text(run_copy, monkeypatch):
    load = report.open_run
    names = (HOSTILE, *"123456789")
    monkeypatch.setattr(report, "open_test_set", lambda *_: open_test_set(load(run_copy, "newest")))
    monkeypatch.setattr(
        report, "open_run", lambda *a: dataclasses.replace(load(*a), class_names=names)
    )
    config = json.loads((run_copy / "config.json").read_text())
    config["train_split"] = HOSTILE
    (run_copy / "config.json").write_text(json.dumps(config))
    page = read(report.write_report([run_copy]))
    assert_stands_alone(page)
    assert page.text.count(HOSTILE) >= 4  # two in the confusion matrix, a class, the config
    assert "<script" not in page.html


def test_confusion_matrix_is_that_of_scikit_learn(run, rng):
    labels = rng.integers(0, 9, 300).astype(np.int32)
    logits = rng.normal(size=(300, 10)).astype(np.float32)
    rows = report._confusion(run, Evaluation(logits, labels))["rows"]
    expected = confusion_matrix(labels, logits.argmax(1), labels=np.arange(10))
    np.testing.assert_array_equal([[cell[0] for cell in row] for _, row in rows], expected)


def test_confusion_of_many_classes_is_drawn(run, rng):
    many = dataclasses.replace(run, class_names=tuple(f"<{i}>" for i in range(40)))
    labels = rng.integers(0, 40, 4000).astype(np.int32)
    predictions = np.where(labels == 7, 9, labels)
    logits = np.eye(40, dtype=np.float32)[predictions]
    confusion = report._confusion(many, Evaluation(logits, labels))
    assert confusion["pairs"] == [("<7>", "<9>", int((labels == 7).sum()))]
    assert "data:image/png;base64," in confusion["svg"]
    assert "<7>" not in confusion["svg"]


def test_confusion_of_very_many_classes_takes_little_memory(run, rng):
    """Where a matrix of all pairs would take 40 GB."""
    names = tuple(map(str, range(70_000)))
    labels = rng.permutation(70_000)[:5000].astype(np.int32)
    predictions = np.where(np.arange(5000) < 9, 69_999, labels)
    labels[:7] = 5
    evaluation = mock.Mock(labels=labels, predictions=predictions, correct=predictions == labels)
    tracemalloc.start()
    confusion = report._confusion(dataclasses.replace(run, class_names=names), evaluation)
    assert tracemalloc.get_traced_memory()[1] < 100e6
    tracemalloc.stop()
    assert confusion["pairs"][0] == ("5", "69999", 7)
    assert sum(count for _, _, count in confusion["pairs"]) == 9
    matrix = report._confusion_matrix(evaluation, 70_000)
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
    bins = report.calibration_bins(confidence, correct, 15)
    assert report.calibration_error(*bins) == pytest.approx(expected)
    assert bins[0].sum() == 2000


def test_mistakes_come_with_the_surest_first(run, rng):
    data = open_test_set(run)
    assert isinstance(data, fr.Dataset)
    logits = rng.normal(size=(101, 10)).astype(np.float32)
    evaluation = Evaluation(logits, data.labels)
    mistakes = report._mistakes(run, data, evaluation, evaluation.probabilities)
    wrong = np.nonzero(logits.argmax(1) != data.labels)[0]
    surest = sorted(wrong, key=lambda i: -evaluation.probabilities[i].max())[:12]
    assert [one["index"] for one in mistakes] == surest
    for one in mistakes:
        assert one["label"] == str(data.labels[one["index"]]) != one["prediction"]


def test_without_data_the_rest_is_shown(run_copy, monkeypatch):
    def no_data(*_):
        raise fr.InputError("no data and no network")

    monkeypatch.setattr(report, "open_test_set", no_data)
    page = read(report.write_report([run_copy]))
    assert_stands_alone(page)
    assert "There is none: no data and no network" in page.text
    assert {"Curves", "First layer"} <= set(page.text)
    assert "Confusion" not in page.text


def test_run_without_an_epoch(run_copy):
    (run_copy / "metrics.jsonl").unlink()
    page = read(report.write_report([run_copy]))
    assert "No epoch is done yet." in page.text


def test_program(finished, tmp_path, call):
    path = tmp_path / "page.html"
    code, out, err = call(report, finished[0], "--output", path)
    assert (code, out, err) == (0, f"{path}\n", "evaluating 101 images ...\n")
    for arguments, message in (
        ((tmp_path,), "is not the folder of a run"),
        ((finished[0], "--output", tmp_path / "no" / "page.html"), "cannot be written: "),
        ((finished[0], "--output", tmp_path), "is not a file: name one by --output"),
        ((), "required: RUN"),
    ):
        code, out, err = call(report, "--quiet", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_training_survives_a_report_that_fails(tmp_path, capsys):
    report.report_after_training(tmp_path)
    assert capsys.readouterr().err.splitlines() == [
        f"writing {tmp_path}/report.html",
        f"there is no report: {tmp_path} is not the folder of a run: it has no config.json",
    ]
