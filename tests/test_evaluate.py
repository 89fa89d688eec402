"""Evaluation of a run, against the run's own numbers and scikit-learn's."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from sklearn import metrics

import flax_resnet as fr
from flax_resnet import evaluate as module
from flax_resnet import predict, runs
from flax_resnet.data import Source
from flax_resnet.evaluate import Evaluation, evaluate, open_test_set, summarize, wilson_interval


def test_number_is_that_of_metrics_jsonl(run, evaluation):
    summary = summarize(run, evaluation)
    assert summary["examples"] == 101  # in batches of 40
    assert summary["accuracy"] == run.records[-1]["test_accuracy"]
    assert summary["loss"] == pytest.approx(run.records[-1]["test_loss"], rel=1e-4)


def test_numbers_are_those_of_scikit_learn(run, rng):
    labels = rng.integers(0, 9, 500).astype(np.int32)  # and no 9
    logits = rng.normal(size=(500, 10)).astype(np.float32)
    logits[np.arange(500), labels] += 1
    evaluation = Evaluation(logits, labels)
    summary = summarize(run, evaluation)
    every = np.arange(10)
    assert summary["accuracy"] == metrics.accuracy_score(labels, logits.argmax(1))
    top5 = metrics.top_k_accuracy_score(labels, logits, k=5, labels=every)
    assert summary["top5_accuracy"] == pytest.approx(top5)
    loss = metrics.log_loss(labels, evaluation.probabilities, labels=every)
    assert summary["loss"] == pytest.approx(loss)
    confusion = metrics.confusion_matrix(labels, logits.argmax(1), labels=every)
    recall = confusion.diagonal()[:9] / confusion.sum(1)[:9]
    accuracies = [one["accuracy"] for one in summary["classes"]]
    np.testing.assert_allclose(accuracies[:9], recall)
    assert accuracies[9] is None
    assert [one["name"] for one in summary["classes"]] == list("0123456789")
    assert sum(one["examples"] for one in summary["classes"]) == 500


def test_what_would_not_fit_is_refused(run, monkeypatch):
    monkeypatch.setattr(module, "host_memory", lambda: 32 * 101 * 10)
    with pytest.raises(fr.InputError, match="of 101 images of 10 classes would take 0 GiB: name"):
        evaluate(run, open_test_set(run))


@pytest.mark.parametrize(("correct", "count"), [(0, 10), (7, 10), (10, 10), (9321, 10000)])
def test_interval_is_wilsons(correct, count):
    z, p = 1.959963984540054, correct / count
    centre = (p + z**2 / (2 * count)) / (1 + z**2 / count)
    reach = z / (1 + z**2 / count) * math.sqrt(p * (1 - p) / count + z**2 / (4 * count**2))
    assert wilson_interval(correct, count) == pytest.approx((centre - reach, centre + reach))


def test_split_from_disk_gives_the_same(run, evaluation, monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 0)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, stream_workers=0))
    data = open_test_set(run)
    assert isinstance(data, Source)
    streamed = evaluate(run, data)
    np.testing.assert_array_equal(streamed.logits, evaluation.logits)
    np.testing.assert_array_equal(streamed.labels, evaluation.labels)


def test_flips_give_the_mean_of_both_sides(run, evaluation):
    data = open_test_set(run)
    assert isinstance(data, fr.Dataset)
    mirrored = evaluate(run, dataclasses.replace(data, images=data.images[:, :, ::-1]))
    both = evaluate(run, data, flip=True)
    mean = (evaluation.logits + mirrored.logits) / 2
    np.testing.assert_allclose(both.logits, mean, rtol=1e-4, atol=1e-4)


def test_program(finished, evaluation, call):
    code, out, err = call(module, "--workdir", finished[0], "--checkpoint", "newest", "--json")
    assert (code, err) == (0, "evaluating 101 images ...\n")
    printed = json.loads(out)
    assert printed["accuracy"] == evaluation.correct.mean()
    assert (printed["checkpoint"], printed["split"], printed["tta"]) == (32, "test[:101]", False)

    code, out, err = call(module, "--workdir", finished[0], "--tta", "--quiet")
    assert (code, err) == (0, "")
    assert "on 101 images of digits test[:101], with horizontal flips" in out
    assert len(out.splitlines()) == 7 + 10
    assert "\x1b" not in out

    code, out, err = call(module, "--workdir", finished[0], "--tta", "--json", "--quiet")
    assert (code, err) == (0, "")
    best = fr.load_run(finished[0])
    one, both = (evaluate(best, open_test_set(best), flip=flip).loss for flip in (False, True))
    assert json.loads(out)["loss"] == pytest.approx(both)
    assert one != pytest.approx(both)


def test_bad_input_is_one_line_and_exit_code_2(finished, tmp_path, call):
    for arguments, message in (
        (("--workdir", tmp_path), "is not the folder of a run"),
        (("--workdir", finished[0], "--checkpoint", "worst"), "use best, newest or one of"),
        (("--checkpoint", "best"), "required: --workdir"),
    ):
        code, out, err = call(module, *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert message in err


def test_checkpoint_of_a_huge_array_is_one_line(huge, call, monkeypatch):
    monkeypatch.setattr(runs, "_SECONDS_TO_DELETE", 0)
    for program, arguments in ((module, ()), (predict, ("a.png",))):
        code, out, err = call(program, "--workdir", huge, "--quiet", *arguments)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "is of another model: params.fc.kernel float32[1000000, 1000000]" in err


def test_memory_that_is_not_enough_is_one_line(finished, call, monkeypatch):
    def fail(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes")

    monkeypatch.setattr(module, "evaluate", fail)
    code, _, err = call(module, "--workdir", finished[0], "--quiet")
    assert (code, err.count("\n")) == (2, 1)
    assert "the memory is not enough: perhaps another program" in err


def test_data_of_another_kind(run):
    other = dataclasses.replace(run, class_names=("cat", "dog"))
    with pytest.raises(fr.InputError, match="digits has other classes than the run in"):
        open_test_set(other)
    other = dataclasses.replace(run, image_shape=(32, 32, 1))
    with pytest.raises(fr.InputError, match=r"digits has images of another shape, \(32, 32, 3\)"):
        open_test_set(other)
