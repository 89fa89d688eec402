"""Weights in files and from the Hub: what can be read, what is refused, what is written."""

import argparse
import builtins
import logging
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import flax_resnet as fr

MODEL = fr.cifar_resnet8()


@pytest.fixture(scope="module")
def variables():
    """Random ones for `MODEL`, since equal ones would hide a mix-up."""
    shapes = jax.eval_shape(
        lambda: MODEL.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)), train=False)
    )
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.array(rng.normal(size=s.shape), s.dtype), shapes)


@pytest.fixture
def path(tmp_path, variables):
    fr.save_weights(MODEL, variables, tmp_path / "net.safetensors")
    return tmp_path / "net.safetensors"


@pytest.fixture
def arrays(path):
    return safetensors.numpy.load_file(path)


def without(monkeypatch, package: str) -> None:
    """Importing the package fails, as if it were not installed."""
    real = builtins.__import__

    def fails(name, *args, **kwargs):
        if name.partition(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", fails)


def assert_refused(path, *, reason: str) -> None:
    with pytest.raises(ValueError, match=reason) as error:
        fr.from_torch(MODEL, path)
    assert path.name in str(error.value)
    assert "\n" not in str(error.value)


class TestSafetensors:
    def test_round_trip_is_exact(self, path, variables):
        chex.assert_trees_all_equal(fr.from_torch(MODEL, path), variables)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, str(path)), variables)
        model, ours = fr.create_model("cifar_resnet8", weights=path)
        assert model == MODEL
        chex.assert_trees_all_equal(ours, variables)

    def test_pytorch_reads_what_we_write(self, tmp_path):
        torch = pytest.importorskip("torch")
        from safetensors.torch import load_file

        from tests.models import torch_resnet

        theirs = torch_resnet.randomize(torch_resnet.create("cifar_resnet8")).state_dict()
        fr.save_weights(MODEL, fr.from_torch(MODEL, theirs), tmp_path / "net.safetensors")
        ours = load_file(tmp_path / "net.safetensors")
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor), name
            assert ours[name].dtype == tensor.dtype, name

    def test_needs_no_pytorch(self, tmp_path, variables, monkeypatch):
        without(monkeypatch, "torch")
        fr.save_weights(MODEL, variables, tmp_path / "net.safetensors")
        fr.from_torch(MODEL, tmp_path / "net.safetensors")

    @pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, np.float64])
    def test_other_types_become_float32(self, tmp_path, arrays, dtype):
        arrays["fc.weight"] = arrays["fc.weight"].astype(dtype)
        safetensors.numpy.save_file(arrays, tmp_path / "other.safetensors")
        kernel = fr.from_torch(MODEL, tmp_path / "other.safetensors")["params"]["fc"]["kernel"]
        assert kernel.dtype == jnp.float32
        np.testing.assert_array_equal(kernel, arrays["fc.weight"].astype(np.float32).T)

    def test_file_is_replaced_whole_or_not_at_all(self, path, variables, monkeypatch):
        before = path.read_bytes()
        other = jax.tree.map(lambda x: x + 1, variables)

        def full(self, data):
            with self.open("wb") as file:
                file.write(data[:100])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr("pathlib.Path.write_bytes", full)
            with pytest.raises(ValueError, match="No space left on device"):
                fr.save_weights(MODEL, other, path)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == [path.name]
        fr.save_weights(MODEL, other, path)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, path), other)

    def test_where_it_cannot_be_saved(self, tmp_path, variables):
        with pytest.raises(ValueError, match=r"saved as \.safetensors, not .*net\.pth"):
            fr.save_weights(MODEL, variables, tmp_path / "net.pth")
        with pytest.raises(ValueError, match=r"cannot write .*No such file or directory"):
            fr.save_weights(MODEL, variables, tmp_path / "missing" / "net.safetensors")

    def test_damaged_at_any_place(self, path, tmp_path):
        whole = path.read_bytes()
        cut = tmp_path / "cut.safetensors"
        for length in (1, 7, 8, 100, len(whole) // 2, len(whole) - 1):
            cut.write_bytes(whole[:length])
            assert_refused(cut, reason="cannot read .*cut.safetensors: ")
        for place in (0, 3, 8, 20):
            cut.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
            assert_refused(cut, reason="cannot read .*cut.safetensors: ")

    def test_nothing_in_it(self, tmp_path):
        safetensors.numpy.save_file({}, tmp_path / "net.safetensors")
        assert_refused(tmp_path / "net.safetensors", reason="missing conv1.weight; missing")

    def test_unknown_type(self, tmp_path):
        torch = pytest.importorskip("torch")
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
        assert_refused(tmp_path / "f8.safetensors", reason="float8_e4m3fn")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "pt"])
class TestWhatIsNoWeights:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it is empty"),
            (b"\n<!DOCTYPE html><html><title>404</title></html>", "it is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
            (b"0123456789" * 10, "cannot read"),
            (pickle.dumps([1, 2, 3]), "cannot read|no state_dict"),
        ],
    )
    def test_other_content(self, tmp_path, suffix, content, reason):
        file = tmp_path / f"net.{suffix}"
        file.write_bytes(content)
        assert_refused(file, reason=reason)

    def test_no_file(self, tmp_path, suffix):
        assert_refused(tmp_path / f"net.{suffix}", reason="there is no file")
        (tmp_path / f"net.{suffix}").mkdir()
        assert_refused(tmp_path / f"net.{suffix}", reason="is not a file")


def test_other_suffix(tmp_path):
    (tmp_path / "net.ckpt").write_bytes(b"?")
    assert_refused(tmp_path / "net.ckpt", reason=r"read from \.safetensors, \.pth and \.pt")


class Pickled:
    """What a malicious file holds: unpickling it would call a function."""

    ran: list[str] = []  # noqa: RUF012

    def __reduce__(self):
        return Pickled.ran.append, ("code",)


class TestPickles:
    @pytest.fixture
    def tensors(self, arrays):
        torch = pytest.importorskip("torch")
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @pytest.mark.parametrize("suffix", ["pth", "pt"])
    @pytest.mark.parametrize("zipped", [True, False])
    def test_state_dict(self, tmp_path, tensors, variables, suffix, zipped):
        import torch

        file = tmp_path / f"net.{suffix}"
        torch.save(tensors, file, _use_new_zipfile_serialization=zipped)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, file), variables)

    @pytest.mark.parametrize("wrapper", ["state_dict", "model", "model_state_dict"])
    @pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
    def test_training_checkpoint(self, tmp_path, tensors, variables, wrapper, prefix):
        import torch

        wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
        file = tmp_path / "checkpoint.pth"
        arguments = argparse.Namespace(model="resnet18", lr=0.1)  # as timm and torchvision have
        torch.save({"args": arguments, wrapper: wrapped, "optimizer": {"lr": 0.1}}, file)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, file), variables)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, wrapped), variables)

    def test_code_is_not_run(self, tmp_path, tensors):
        import torch

        file = tmp_path / "evil.pth"
        for content in (tensors | {"extra": Pickled()}, Pickled()):
            torch.save(content, file)
            assert_refused(file, reason="holds more than tensors; nothing in it was run")
            file.write_bytes(pickle.dumps(content))
            assert_refused(file, reason="holds more than tensors; nothing in it was run")
        assert Pickled.ran == []

    def test_damaged(self, tmp_path, tensors):
        import torch

        file = tmp_path / "cut.pth"
        torch.save(tensors, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert_refused(file, reason="damaged")

    def test_no_state_dict(self, tmp_path):
        torch = pytest.importorskip("torch")
        for content in ({"epoch": 3}, {0: torch.zeros(3)}, [1, 2], torch.zeros(3)):
            torch.save(content, tmp_path / "other.pth")
            assert_refused(tmp_path / "other.pth", reason="holds no state_dict")

    def test_without_pytorch(self, tmp_path, monkeypatch):
        (tmp_path / "net.pth").write_bytes(b"?")
        without(monkeypatch, "torch")
        needs = r"net\.pth needs PyTorch 2\.5 or newer; \.safetensors does not"
        with pytest.raises(ImportError, match=needs):
            fr.from_torch(MODEL, tmp_path / "net.pth")


class TestCreateModel:
    def test_fields_are_set(self, path):
        model, _ = fr.create_model("cifar_resnet8", weights=path, dtype=jnp.bfloat16)
        assert model.dtype == jnp.bfloat16

    def test_other_classes_get_a_new_classifier(self, path, variables, caplog):
        with caplog.at_level(logging.WARNING, "flax_resnet"):
            model, ours = fr.create_model("cifar_resnet8", weights=path, num_classes=7)
        assert [r.getMessage() for r in caplog.records] == [
            f"{path} has 10 classes, not 7: the classifier starts anew"
        ]
        fc = ours["params"].pop("fc")
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        initial = jax.jit(
            lambda: model.lazy_init(jax.random.key(0), images, train=False)["params"]["fc"]
        )
        chex.assert_trees_all_equal(fc, initial())
        assert fc["kernel"].shape == (64, 7)
        rest = {name: v for name, v in variables["params"].items() if name != "fc"}
        chex.assert_trees_all_equal(ours["params"], rest)
        chex.assert_trees_all_equal(ours["batch_stats"], variables["batch_stats"])

    def test_without_classifier(self, path, tmp_path, variables, caplog):
        _, ours = fr.create_model("cifar_resnet8", weights=path, num_classes=0)
        params = {name: v for name, v in variables["params"].items() if name != "fc"}
        chex.assert_trees_all_equal(ours, {**variables, "params": params})
        assert not caplog.records

        fr.save_weights(MODEL, ours, tmp_path / "backbone.safetensors")
        _, ours = fr.create_model("cifar_resnet8", weights=tmp_path / "backbone.safetensors")
        assert ours["params"].pop("fc")["kernel"].shape == (64, 10)
        chex.assert_trees_all_equal(ours, {**variables, "params": params})
        assert "has 0 classes, not 10" in caplog.text

    def test_last_layer_of_vgg_is_its_classifier(self, tmp_path):
        small = {"widths": (2,) * 5, "hidden": 3}
        model = fr.vgg11(num_classes=4, **small)
        images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        shapes = jax.eval_shape(lambda: model.lazy_init(jax.random.key(0), images, train=False))
        variables = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
        fr.save_weights(model, variables, tmp_path / "vgg.safetensors")
        _, ours = fr.create_model(
            "vgg11", weights=tmp_path / "vgg.safetensors", num_classes=5, **small
        )
        assert ours["params"].pop("classifier_6")["bias"].shape == (5,)
        del variables["params"]["classifier_6"]
        chex.assert_trees_all_equal(ours, variables)

    def test_all_that_does_not_fit_is_listed(self, tmp_path, arrays):
        del arrays["layer2.0.bn1.weight"]
        arrays["head.weight"] = np.zeros(3)
        arrays["fc.weight"] = np.zeros((7, 65))
        arrays["fc.bias"] = np.zeros(7)
        path = tmp_path / "other.safetensors"
        safetensors.numpy.save_file(arrays, path)
        with pytest.raises(ValueError, match=r"other\.safetensors") as error:
            fr.create_model("cifar_resnet8", weights=path)
        message = str(error.value)
        assert "missing layer2.0.bn1.weight" in message
        assert "left over head.weight" in message
        assert "fc.weight has shape (7, 65), expected (7, 64)" in message
        assert "fc.bias" not in message

    def test_weights_of_another_model(self, path):
        with pytest.raises(ValueError, match=r"missing layer1\.2\.bn2\.running_var"):
            fr.create_model("cifar_resnet20", weights=path)

    def test_name_of_nothing(self):
        with pytest.raises(ValueError, match="net is neither a file nor the id of a Hub repo"):
            fr.create_model("cifar_resnet8", weights="net")


class TestHub:
    """The Hub itself is never asked."""

    @pytest.fixture
    def hub(self):
        return pytest.importorskip("huggingface_hub")

    @staticmethod
    def absent(*args, **kwargs):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not in the cache")

    def test_cached_file_needs_no_network(self, hub, path, variables, monkeypatch):
        def download(repository, name, *, local_files_only):
            assert (repository, name, local_files_only) == ("a/b", "model.safetensors", True)
            return str(path)

        monkeypatch.setattr(hub, "hf_hub_download", download)
        _, ours = fr.create_model("cifar_resnet8", weights="a/b")
        chex.assert_trees_all_equal(ours, variables)

    def test_file_is_fetched(self, hub, path, variables, monkeypatch):
        def download(repository, name, *, local_files_only=False):
            return self.absent() if local_files_only else str(path)

        asked = []
        monkeypatch.setattr(hub, "hf_hub_download", download)
        monkeypatch.setattr(hub, "get_hf_file_metadata", asked.append)
        _, ours = fr.create_model("cifar_resnet8", weights="timm/resnet8.b-c_d")
        chex.assert_trees_all_equal(ours, variables)
        assert "timm/resnet8.b-c_d" in asked[0]
        assert "model.safetensors" in asked[0]

    def test_without_network(self, hub, monkeypatch):
        def fail(url):
            raise ConnectionError("Name or service not known\nand more")

        monkeypatch.setattr(hub, "hf_hub_download", self.absent)
        monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
        with pytest.raises(
            ValueError, match=r"no file a/b, .*Hub: Name or service not known and more$"
        ):
            fr.create_model("cifar_resnet8", weights="a/b")

    def test_without_the_extra(self, monkeypatch):
        without(monkeypatch, "huggingface_hub")
        with pytest.raises(ImportError, match="needs huggingface_hub: pip install huggingface_hub"):
            fr.create_model("cifar_resnet8", weights="a/b")
