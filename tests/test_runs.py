"""Opening a run's folder, whole, damaged, or with a run at work in it."""

import hashlib
import json
import os
import shutil

import chex
import filelock
import jax
import numpy as np
import pytest

import flax_resnet as fr
from flax_resnet import runs
from flax_resnet.data import normalize
from flax_resnet.training import check_config, checkpoint_files, initial
from flax_resnet.training.checkpoint_files import choose_checkpoint


def contents(folder):
    """Of every file: its bytes and when they were written."""
    return {
        path.relative_to(folder): (path.stat().st_mtime_ns, path.is_file() and path.read_bytes())
        for path in folder.rglob("*")
    }


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_history(path, **changes):
    """Of a checkpoint, which stays sound."""
    change_json(path, **changes)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    change_json(path.parents[1] / "manifest.json", **{"run/metadata": digest})


def test_newest_checkpoint_is_the_state_at_the_end(finished, config):
    folder, state = finished
    run = fr.load_run(folder, "newest")
    chex.assert_trees_all_equal(jax.device_get(run.variables), jax.device_get(state.variables))
    assert run.step == 32
    accuracy = f"{run.records[-1]['test_accuracy']:.2%}"
    expected = f"<Run in {folder}: cifar_resnet8 at step 32, test accuracy {accuracy}>"
    assert repr(run) == expected
    assert run.config == check_config(config)
    assert run.class_names == tuple("0123456789")
    assert run.image_shape == (32, 32, 3)
    images = fr.load_dataset("digits", config.train_split, config.data_dir).images / 255
    np.testing.assert_allclose(run.mean, images.mean((0, 1, 2)), rtol=1e-6)
    np.testing.assert_allclose(run.std, images.std((0, 1, 2)), rtol=1e-6)
    assert [record["epoch"] for record in run.records] == [1, 2, 3, 4]
    assert run.test_accuracy == run.records[-1]["test_accuracy"]
    assert run.versions["jax"] == jax.__version__
    assert run.hardware["devices"] == "8 x cpu (cpu)"
    assert set(run.hardware) == {"devices", "cpu", "memory", "system", "python"}


def test_best_and_numbered_checkpoints(finished):
    run = fr.load_run(finished[0])
    best = max(run.records, key=lambda record: record["test_accuracy"])
    assert (run.step, run.test_accuracy) == (best["step"], best["test_accuracy"])
    for step in (24, "24"):
        assert fr.load_run(finished[0], step).step == 24


def test_folder_stays_as_it_is_while_a_run_is_at_work(run_copy):
    # A checkpoint, and a line of metrics.jsonl, that are just being written.
    (run_copy / "checkpoints" / "40.orbax-checkpoint-tmp" / "state").mkdir(parents=True)
    with (run_copy / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 5, "st')
    with filelock.FileLock(run_copy / ".lock"):
        before = contents(run_copy)
        run = fr.load_run(run_copy, "newest")
        assert contents(run_copy) == before
    assert (run.step, len(run.records)) == (32, 4)


def test_checkpoint_that_a_run_deletes_meanwhile(run_copy, monkeypatch):
    def damage_of(folder):
        if folder.name == "32":
            shutil.rmtree(folder)
            return "state/manifest.ocdbt is missing"

    monkeypatch.setattr(checkpoint_files, "damage_of", damage_of)
    monkeypatch.setattr(runs, "_SECONDS_TO_DELETE", 0)
    assert fr.load_run(run_copy, "newest").step == 24


def test_best_is_the_first_with_the_highest_accuracy(run_copy):
    for step in ("16", "24"):
        history = run_copy / "checkpoints" / step / "run" / "metadata"
        records = json.loads(history.read_text())["records"]
        records[-1]["test_accuracy"] = 0.99
        change_history(history, records=records)
    assert fr.load_run(run_copy).step == 16
    assert fr.load_run(run_copy, "newest").step == 32
    assert choose_checkpoint(run_copy, "best").name == "16"  # of `init_from`


def test_best_of_none_evaluated_is_the_newest(run_copy):
    for history in run_copy.glob("checkpoints/*/run/metadata"):
        change_history(history, records=[])
    assert choose_checkpoint(run_copy, "best").name == "32"


def test_run_in_its_first_epoch(run_copy):
    for name in ("16", "24", "32"):
        change_history(run_copy / "checkpoints" / name / "run" / "metadata", records=[])
    (run_copy / "metrics.jsonl").unlink()
    run = fr.load_run(run_copy)
    assert (run.test_accuracy, run.records) == (None, ())


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def holes(path):
    path.touch()
    os.truncate(path, 10**12)


def change_line(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text().splitlines()[0]) | changes) + "\n")


def flip_a_bit(folder):
    path = max(
        (folder / "checkpoints" / "32" / "state").rglob("d/*"), key=lambda p: p.stat().st_size
    )
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "is not the folder of a run: it has no config"),
        (lambda f: (f / "config.json").write_text("[]"), "does not hold a JSON object"),
        (lambda f: (f / "config.json").write_text("[" * 10**5), "config.json cannot be read: "),
        (lambda f: (f / "config.json").write_text('{"a":' * 30 + "1" + "}" * 30), "is nested more"),
        (lambda f: (f / "dataset.json").write_text("[]"), "does not hold a JSON object"),
        (lambda f: (f / "checkpoints/32/manifest.json").write_text("[]"), "not hold a JSON object"),
        (lambda f: (f / "checkpoints/32/manifest.json").write_text('{"\0": 1}'), "is damaged: "),
        (lambda f: change_history(f / "checkpoints/32/run/metadata", records=1), "hold records as"),
        (lambda f: change_json(f / "dataset.json", image_shape=[0, 32, 3]), "hold image_shape as"),
        (lambda f: change_json(f / "dataset.json", image_shape=[-1, 32, 3]), "hold image_shape as"),
        (lambda f: change_json(f / "dataset.json", image_shape=[10**6, 10**6, 3]), "image_shape"),
        (lambda f: change_json(f / "dataset.json", image_shape=[10**30, 1, 3]), "image_shape as"),
        (lambda f: holes(f / "checkpoints/32/state/d/holes"), "0 bytes, mostly holes"),
        (lambda f: pipe(f / "config.json"), "is not the folder of a run"),
        (lambda f: pipe(f / "dataset.json"), "dataset.json is not a file: take it out of"),
        (lambda f: pipe(f / "metrics.jsonl"), "metrics.jsonl is not a file"),
        (lambda f: holes(f / "metrics.jsonl"), "cannot be read: it has 1,000,000,000,000 bytes"),
        (lambda f: change_line(f / "metrics.jsonl", epoch=10**400), "is damaged in line 1"),
        (lambda f: change_line(f / "metrics.jsonl", gradient_norm="1"), "is damaged in line 1"),
        (lambda f: pipe(f / "checkpoints/32/manifest.json"), "manifest.json is not a file"),
        (lambda f: pipe(f / "checkpoints/32/_CHECKPOINT_METADATA"), "_METADATA is not a file"),
        (lambda f: pipe(f / "checkpoints/32/state/d/pipe"), "state/d/pipe is not a file"),
        (lambda f: change_json(f / "config.json", seeed=1), "did you mean 'seed'?"),
        (lambda f: change_json(f / "config.json", model="cifar_resnet20"), "is of another model"),
        (lambda f: (f / "dataset.json").unlink(), "dataset.json cannot be read"),
        (lambda f: change_json(f / "dataset.json", class_names="0123456789"), "is damaged"),
        (lambda f: change_json(f / "dataset.json", std=[1.0]), "is damaged: it does not hold"),
        (lambda f: change_json(f / "dataset.json", class_names=["cat"]), "is of another model"),
        (lambda f: (f / "metrics.jsonl").write_text('{"epoch": "1"}\n'), "is damaged in line 1"),
        (lambda f: shutil.rmtree(f / "checkpoints"), "holds no checkpoint of a run"),
        (flip_a_bit, "checkpoints/32 is damaged: state/"),
    ],
)
def test_bad_folder_is_one_line(run_copy, monkeypatch, damage, message):
    monkeypatch.setattr(runs, "_SECONDS_TO_DELETE", 0)
    damage(run_copy)
    with pytest.raises(fr.InputError, match=r"\A[^\n]+\Z") as error:
        fr.load_run(run_copy, "newest")
    assert message in str(error.value)
    assert str(run_copy) in str(error.value)


def test_arrays_are_judged_before_they_are_read(huge, set_array, monkeypatch):
    """By the model, or by the memory where nobody knows the model."""
    monkeypatch.setattr(runs, "_SECONDS_TO_DELETE", 0)
    with pytest.raises(fr.InputError) as error:
        fr.load_run(huge, "newest")
    assert str(error.value) == (
        f"checkpoint {huge / 'checkpoints' / '32'} is of another model: params.fc.kernel "
        "float32[1000000, 1000000], expected float32[64, 10]"
    )
    with pytest.raises(
        fr.InputError, match=r"32 does not fit into memory: 4,000,000,\d{3},\d{3} b"
    ):
        checkpoint_files.read_variables(huge / "checkpoints" / "32")
    set_array(huge / "checkpoints" / "32", "params.fc.kernel", [64, 10], [10**6, 10**6])
    with pytest.raises(fr.InputError, match="damaged: an array is smaller than its parts"):
        fr.load_run(huge, "newest")


def test_unknown_checkpoint_names_those_there_are(finished):
    with pytest.raises(fr.InputError, match=r"no checkpoint 33 .* newest or one of .*24, 32"):
        fr.load_run(finished[0], 33)


def test_classifier_is_the_model_on_normalised_images(finished, config):
    run = fr.load_run(finished[0], "newest")
    images = fr.load_dataset("digits", "test[:7]", config.data_dir).images

    @jax.jit
    def logits(images):
        return run.model.apply(run.variables, normalize(images, run.mean, run.std), train=False)

    expected = logits(images)
    classify = runs.make_classifier(run, 10)
    np.testing.assert_allclose(classify(images), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(classify(images[:1]), expected[:1], rtol=1e-4, atol=1e-4)
    both = (expected + logits(np.flip(images, 2))) / 2
    flipped = runs.make_classifier(run, 10, flip=True)(images)
    np.testing.assert_allclose(flipped, both, rtol=1e-4, atol=1e-4)


def test_tilde_is_the_home_folder(finished, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(finished[0].parent))
    assert fr.load_run(f"~/{finished[0].name}").workdir == finished[0]
    assert initial.read_initial(
        check_config({"init_from": f"~/{finished[0].name}", "model": "cifar_resnet8"}), tmp_path
    )
    net = fr.create_model("cifar_resnet8", num_classes=2)
    variables = net.init(jax.random.key(0), np.zeros((1, 8, 8, 3)), train=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    fr.save_weights(net, variables, "~/w.safetensors")
    chex.assert_trees_all_equal(fr.from_torch(net, "~/w.safetensors"), variables)
    assert (tmp_path / "w.safetensors").is_file()


def test_no_home_is_a_line_and_no_folder_of_that_name(monkeypatch, tmp_path, config):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os.path, "expanduser", os.fspath)  # as without $HOME and a user of no name
    with pytest.raises(fr.InputError, match="there is no home folder for ~/run"):
        fr.train(config, "~/run")
    with pytest.raises(fr.InputError, match="there is no home folder for ~/run"):
        fr.load_run("~/run")
    with pytest.raises(ValueError, match=r"there is no home folder for ~/w\.safetensors"):
        fr.save_weights(fr.resnet18(), {}, "~/w.safetensors")
    assert not list(tmp_path.iterdir())
