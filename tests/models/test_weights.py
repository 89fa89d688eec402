"""Weights in files and from the Hub: what can be read, what is refused, what is written."""

import argparse
import builtins
import json
import logging
import os
import pickle
import shutil
import warnings
from functools import partial
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import flax_resnet as fr
from flax_resnet.models.weights import pretrained

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

    def test_bfloat16_becomes_float32_in_pytorch(self, variables):
        torch = pytest.importorskip("torch")
        small = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), variables)
        weight = fr.to_torch(MODEL, small)["fc.weight"]
        assert weight.dtype == torch.float32
        kernel = np.asarray(small["params"]["fc"]["kernel"], np.float32)
        np.testing.assert_array_equal(weight.numpy(), kernel.T)

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
        usual = path.with_name("usual")
        usual.touch()
        assert path.stat().st_mode == usual.stat().st_mode  # for others to read, too

    def test_variables_of_another_model(self, tmp_path, variables):
        with pytest.raises(ValueError, match=r"lack what the model has: .* and \d+ more$"):
            fr.save_weights(fr.resnet18(), variables, tmp_path / "net.safetensors")

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

    def test_header_of_any_length(self, path, variables):
        # Its first byte is then "{", as in JSON.
        whole = path.read_bytes()
        end = 8 + int.from_bytes(whole[:8], "little")
        header = whole[8:end] + b" " * ((ord("{") - (end - 8)) % 256)
        path.write_bytes(len(header).to_bytes(8, "little") + header + whole[end:])
        chex.assert_trees_all_equal(fr.from_torch(MODEL, path), variables)

    def test_nothing_in_it(self, tmp_path):
        safetensors.numpy.save_file({}, tmp_path / "net.safetensors")
        assert_refused(
            tmp_path / "net.safetensors",
            reason="missing bn1.bias, bn1.weight, conv1.weight, .* and 32 more",
        )

    def test_shape_beyond_all_bounds(self, tmp_path, arrays):
        arrays["conv1.weight"] = np.zeros((0, 1))
        safetensors.numpy.save_file(arrays, tmp_path / "net.safetensors")
        whole = (tmp_path / "net.safetensors").read_bytes()
        length = int.from_bytes(whole[:8], "little")
        header = whole[8 : 8 + length].replace(b"[0,1]", b"[1099511627776,0]")
        header += b" " * (-len(header) % 8)
        (tmp_path / "net.safetensors").write_bytes(
            len(header).to_bytes(8, "little") + header + whole[8 + length :]
        )
        assert_refused(
            tmp_path / "net.safetensors", reason=r"conv1.weight has shape \(1099511627776, 0\)"
        )

    def test_unknown_type(self, tmp_path):
        torch = pytest.importorskip("torch")
        from safetensors.torch import save_file

        save_file({"x": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "f8.safetensors")
        assert_refused(tmp_path / "f8.safetensors", reason="float8_e4m3fn")


@pytest.mark.parametrize("suffix", ["safetensors", "pth", "ckpt"])
class TestWhatIsNoWeights:
    @pytest.mark.parametrize(
        ("content", "reason"),
        [
            (b"", "it is empty"),
            (b"\n<!DOCTYPE html><html><title>404</title></html>", "it is a web page"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
            (b"0123456789" * 10, "it is neither of safetensors nor of torch.save"),
            (b'{"architectures": ["ResNet"]}', "no index of weights in shards"),
            (b'{"weight_map": {"conv1.weight": "../conv1.safetensors"}}', "no index of weights"),
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


def test_shards(tmp_path, arrays, variables):
    names = sorted(arrays)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    for shard in set(weight_map.values()):
        part = {name: arrays[name] for name in names if weight_map[name] == shard}
        safetensors.numpy.save_file(part, tmp_path / shard)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    chex.assert_trees_all_equal(fr.from_torch(MODEL, index), variables)


def test_index_that_names_itself(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"conv1.weight": index.name}}))
    assert_refused(index, reason="it is neither of safetensors nor of torch.save")


def test_index_of_holes(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text("{")
    os.truncate(index, 2**40)
    assert_refused(index, reason="no index of weights in shards")


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

    @pytest.mark.parametrize(
        "name", ["a.pth", "a.pt", "a.th", "a.tar", "a.pth.tar", "a.bin", "a.ckpt", "a.safetensors"]
    )
    @pytest.mark.parametrize("zipped", [True, False])
    def test_content_tells_what_it_is(self, tmp_path, tensors, path, variables, name, zipped):
        import torch

        torch.save(tensors, tmp_path / name, _use_new_zipfile_serialization=zipped)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, tmp_path / name), variables)
        (tmp_path / name).write_bytes(path.read_bytes())
        chex.assert_trees_all_equal(fr.from_torch(MODEL, tmp_path / name), variables)

    @pytest.mark.parametrize(
        "wrapper",
        ["state_dict", "model", "model_state_dict", "net", "model_ema", "state_dict_ema"],
    )
    @pytest.mark.parametrize("prefix", ["", "module.", "net._orig_mod.", "model.backbone.module."])
    def test_training_checkpoint(self, tmp_path, tensors, variables, wrapper, prefix):
        import torch

        wrapped = {prefix + name: tensor for name, tensor in tensors.items()}
        wrapped["n_averaged"] = torch.tensor(3)  # of torch.optim.swa_utils
        file = tmp_path / "checkpoint.pth"
        arguments = argparse.Namespace(model="resnet18", lr=0.1)  # as timm and torchvision have
        beside = {"optimizer": {"lr": 0.1}, "best": np.float64(0.9), "step": np.int64(3)}
        beside |= {"is_best": np.bool_(True), "epoch": np.int32(3), "loss": np.float32(1)}
        torch.save({"args": arguments, wrapper: wrapped, **beside}, file)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, file), variables)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, wrapped), variables)

    def test_averaged_weights_come_first(self, tmp_path, tensors, variables, caplog):
        import torch

        others = {name: tensor + 1 for name, tensor in tensors.items()}
        file = tmp_path / "checkpoint.pth.tar"
        torch.save({"state_dict": others, "state_dict_ema": tensors}, file)
        chex.assert_trees_all_equal(fr.from_torch(MODEL, file), variables)
        assert [r.getMessage() for r in caplog.records] == [
            f"{file} holds state_dict_ema and state_dict: state_dict_ema is taken"
        ]

    def test_prefix_of_some_is_no_prefix(self, arrays):
        some = {name if name == "fc.bias" else f"net.{name}": v for name, v in arrays.items()}
        with pytest.raises(ValueError, match=r"other names than the model: net\.bn1\.bias, .*"):
            fr.from_torch(MODEL, some)

    def test_code_is_not_run(self, tmp_path, tensors):
        import torch

        file = tmp_path / "evil.pth"
        for content in (tensors | {"extra": Pickled()}, Pickled()):
            torch.save(content, file)
            reason = "holds more than tensors.*; nothing in it was run"
            assert_refused(file, reason=reason)
            file.write_bytes(pickle.dumps(content))
            assert_refused(file, reason=reason)
        assert Pickled.ran == []

    def test_whole_module(self, tmp_path):
        torch = pytest.importorskip("torch")
        torch.save(torch.nn.Linear(1, 1), tmp_path / "whole.pt")
        reason = r"Linear; nothing in it was run\. In PyTorch write torch\.save\(model\.state_dict"
        assert_refused(tmp_path / "whole.pt", reason=reason)

    def test_other_archives(self, tmp_path, arrays):
        torch = pytest.importorskip("torch")
        with warnings.catch_warnings(action="ignore"):  # tracing is deprecated
            torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1, 1)).save(tmp_path / "script.pt")
        assert_refused(tmp_path / "script.pt", reason="TorchScript, which is code.*state_dict")
        np.savez(tmp_path / "arrays.npz", **arrays)
        assert_refused(tmp_path / "arrays.npz", reason="an archive of NumPy")

    def test_damaged(self, tmp_path, tensors):
        import torch

        file = tmp_path / "cut.pth"
        torch.save(tensors, file)
        whole = file.read_bytes()
        file.write_bytes(whole[: len(whole) // 2])
        assert_refused(file, reason="damaged")

    def test_no_state_dict(self, tmp_path):
        torch = pytest.importorskip("torch")
        for content, held in (
            ({"epoch": 3, "optimizer": {}}, "a dict of epoch, optimizer"),
            ({0: torch.zeros(3)}, "a dict of 0"),
            ({"model": {"a": torch.zeros(3), "b": None}}, "a dict of tensors and b"),
            ([1, 2], "list"),
            (torch.zeros(3), "Tensor"),
        ):
            torch.save(content, tmp_path / "other.pth")
            reason = f"holds no state_dict, which is a dict of tensors, but {held}$"
            assert_refused(tmp_path / "other.pth", reason=reason)

    def test_tensors_without_numbers(self, tmp_path, tensors):
        import torch

        bias = tensors["fc.bias"]
        with warnings.catch_warnings(action="ignore"):  # PyTorch lets go of such tensors
            quantized = torch.quantize_per_tensor(bias, 0.1, 0, torch.qint8)
        for other, reason in (
            (bias.to_sparse(), r"a sparse tensor: give its to_dense\(\)"),
            (quantized, r"a quantized .* dequantize"),
            (bias.to("meta"), "on the meta device, where it has no values"),
            (bias.to(torch.complex64), "not of real numbers, but complex64"),
        ):
            torch.save(tensors | {"fc.bias": other}, tmp_path / "odd.pth")
            assert_refused(tmp_path / "odd.pth", reason=f"odd.pth: fc.bias is {reason}")
            with pytest.raises(ValueError, match=f"^the state_dict: fc.bias is {reason}"):
                fr.from_torch(MODEL, tensors | {"fc.bias": other})

    def test_state_dict_within_a_larger_dict(self, tensors, variables):
        for name in ("state_dict", "model"):
            ours = fr.from_torch(MODEL, {name: tensors, "epoch": 3})
            chex.assert_trees_all_equal(ours, fr.from_torch(MODEL, tensors))

    def test_net_of_seven_stages(self):
        model = fr.VGG(layers=(1,) * 7, widths=(4,) * 7, hidden=8, num_classes=3)
        images = jnp.zeros((1, 128, 128, 3))
        variables = jax.jit(partial(model.init, train=False))(jax.random.key(0), images)
        chex.assert_trees_all_equal(fr.from_torch(model, fr.to_torch(model, variables)), variables)

    def test_without_pytorch(self, tmp_path, monkeypatch):
        (tmp_path / "net.pth").write_bytes(pickle.dumps({}))
        without(monkeypatch, "torch")
        needs = r"net\.pth needs PyTorch 2\.6 or newer; \.safetensors does not"
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

        fr.save_weights(MODEL.clone(num_classes=0), ours, tmp_path / "backbone.safetensors")
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
        with pytest.raises(ValueError, match=r"missing layer1\.1\.bn1\.bias") as error:
            fr.create_model("cifar_resnet110", weights=path)
        assert len(str(error.value)) < 400
        assert " and 505 more" in str(error.value)

    @pytest.mark.parametrize("channels", [1, 4, 7])
    def test_other_channels(self, path, tmp_path, variables, channels, caplog):
        """Equal channels give what they gave; and back again."""
        _, ours = fr.create_model("cifar_resnet8", weights=path, channels=channels)
        assert [r.getMessage() for r in caplog.records] == [
            f"the weights are for images of 3 channels, not {channels}: the first kernels are "
            f"{'summed' if channels == 1 else 'repeated and scaled'}"
        ]
        kernel = np.asarray(ours["params"]["conv1"].pop("kernel"))
        before = np.asarray(variables["params"]["conv1"]["kernel"], np.float64)
        expected = before[:, :, np.arange(channels) % 3] * 3 / channels
        if channels == 1:
            expected = before.sum(2, keepdims=True)
        np.testing.assert_allclose(kernel, expected, rtol=1e-5, atol=1e-6)
        rest = {**variables, "params": {**variables["params"], "conv1": {}}}
        chex.assert_trees_all_equal(ours, rest)

        ours["params"]["conv1"]["kernel"] = kernel
        fr.save_weights(MODEL, ours, tmp_path / "other.safetensors")
        _, ours = fr.create_model(
            "cifar_resnet8", weights=tmp_path / "other.safetensors", channels=3
        )
        back = np.asarray(ours["params"]["conv1"]["kernel"])
        assert back.shape == (3, 3, 3, 16)
        if channels == 1:
            np.testing.assert_allclose(back.sum(2), before.sum(2), rtol=1e-4, atol=1e-5)
        else:
            np.testing.assert_allclose(back, before, rtol=1e-5)

    def test_channels_of_the_other_stems(self, tmp_path):
        stage: Any = {"layers": (1,), "widths": (4,), "strides": (1,)}
        for model, first in (
            (fr.resnet18d(num_classes=2, **stage), "conv1_0"),
            (fr.vgg11_bn(num_classes=2, widths=(4,) * 5, hidden=3), "features_0"),
        ):
            shapes = jax.eval_shape(
                lambda m=model: m.init(jax.random.key(0), jnp.zeros((1, 64, 64, 3)), train=False)
            )
            ones = jax.tree.map(lambda s: jnp.ones(s.shape, s.dtype), shapes)
            fr.save_weights(model, ones, tmp_path / "net.safetensors")
            ours = pretrained(model, tmp_path / "net.safetensors", channels=1)
            kernel = ours["params"][first]["kernel"]
            assert kernel.shape[2] == 1
            np.testing.assert_array_equal(kernel, 3)

    def test_name_of_nothing(self):
        with pytest.raises(ValueError, match="net is neither a file nor the id of a Hub repo"):
            fr.create_model("cifar_resnet8", weights="net")


class TestHub:
    """The Hub itself is never asked."""

    @pytest.fixture
    def hub(self):
        return pytest.importorskip("huggingface_hub")

    @pytest.fixture
    def serve(self, hub, monkeypatch, tmp_path):
        """serve(repository, revision, folder): what is asked of the Hub lies there."""
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        def serve(repository, revision, folder):
            asked, cache = [], tmp_path / "cache"

            def download(asked_repository, file, *, revision=None, local_files_only=False):
                assert (asked_repository, revision) == expected
                if local_files_only and not (cache / file).exists():
                    raise LocalEntryNotFoundError("not in the cache")
                if not local_files_only:
                    cache.mkdir(exist_ok=True)
                    shutil.copy(folder / file, cache / file)
                return str(cache / file)

            def metadata(url):
                asked.append(url)
                if not (folder / url.rpartition("/")[2]).exists():
                    raise EntryNotFoundError("404")

            expected = repository, revision
            monkeypatch.setattr(hub, "hf_hub_download", download)
            monkeypatch.setattr(hub, "get_hf_file_metadata", metadata)
            return asked

        return serve

    def absent(self, *args, **kwargs):
        from huggingface_hub.errors import LocalEntryNotFoundError

        raise LocalEntryNotFoundError("not in the cache")

    def save(self, folder, files, arrays):
        torch = pytest.importorskip("torch")
        folder.mkdir()
        for i, file in enumerate(files):
            part = dict(list(arrays.items())[i :: len(files)])
            if file.endswith("safetensors"):
                safetensors.numpy.save_file(part, folder / file)
            else:
                torch.save({k: torch.from_numpy(v) for k, v in part.items()}, folder / file)
        if len(files) > 1:
            weight_map = {name: files[i % len(files)] for i, name in enumerate(arrays)}
            index = "pytorch_model.bin" if files[0].endswith("bin") else "model.safetensors"
            text = json.dumps({"weight_map": weight_map})
            (folder / f"{index}.index.json").write_text(text)

    @pytest.mark.parametrize(
        "files",
        [
            ["model.safetensors"],
            ["pytorch_model.bin"],
            ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
            ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ],
    )
    @pytest.mark.parametrize("revision", [None, "v1.0/a-b"])
    def test_files_are_fetched_once(self, serve, arrays, variables, tmp_path, files, revision):
        self.save(tmp_path / "hub", files, arrays)
        asked = serve("timm/resnet8.b-c_d", revision, tmp_path / "hub")
        source = "timm/resnet8.b-c_d" + (f"@{revision}" if revision else "")
        _, ours = fr.create_model("cifar_resnet8", weights=source)
        chex.assert_trees_all_equal(ours, variables)
        assert all("timm/resnet8.b-c_d" in url for url in asked)
        assert asked

        asked.clear()
        _, ours = fr.create_model("cifar_resnet8", weights=source)
        chex.assert_trees_all_equal(ours, variables)
        assert not asked

    def test_no_weights_in_it(self, serve, tmp_path):
        self.save(tmp_path / "hub", [], {})
        serve("a/b", None, tmp_path / "hub")
        with pytest.raises(ValueError, match=r"^a/b has no weights that can be read: neither"):
            fr.create_model("cifar_resnet8", weights="a/b")

    def test_without_network(self, hub, monkeypatch):
        def fail(url):
            raise ConnectionError("Name or service not known\nand more")

        monkeypatch.setattr(hub, "hf_hub_download", self.absent)
        monkeypatch.setattr(hub, "get_hf_file_metadata", fail)
        with pytest.raises(
            ValueError, match=r"no file or folder a/b, .*Hub: Name or service not known and more$"
        ):
            fr.create_model("cifar_resnet8", weights="a/b")

    def test_without_the_extra(self, monkeypatch):
        without(monkeypatch, "huggingface_hub")
        with pytest.raises(ImportError, match="needs huggingface_hub: pip install huggingface_hub"):
            fr.create_model("cifar_resnet8", weights="a/b")


class TestMistakes:
    """Each gets what came, what is expected, and the line to write."""

    def test_parameters_alone(self, tmp_path, variables):
        params = variables["params"]
        for wrong, reason in (
            (params, "not a dict of bn1, conv1, fc, layer1_0, layer2_0 and 1 more"),
            ({"params": params}, "the statistics of BatchNorm are lost: write"),
        ):
            for write in (
                lambda v: fr.save_weights(MODEL, v, tmp_path / "net.safetensors"),
                lambda v: fr.to_torch(MODEL, v),
            ):
                with pytest.raises(ValueError, match=reason):
                    write(wrong)
        assert not list(tmp_path.iterdir())

    def test_nets_without_statistics_have_parameters_alone(self, tmp_path, variables):
        model, path = MODEL.clone(norm="group"), tmp_path / "net.safetensors"
        fr.save_weights(model, {"params": variables["params"]}, path)
        chex.assert_trees_all_equal(fr.from_torch(model, path), {"params": variables["params"]})

    def test_module_instead_of_its_state_dict(self):
        torch = pytest.importorskip("torch")
        with pytest.raises(
            TypeError, match=r"not a torch\.nn.*Linear: write model\.state_dict\(\)"
        ):
            fr.from_torch(MODEL, torch.nn.Linear(1, 1))
        with pytest.raises(
            TypeError, match=r"not a Linear: write fr\.from_torch\(fr\.resnet18\(\)"
        ):
            fr.create_model("resnet18", weights=torch.nn.Linear(1, 1))

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"weights": True}, r"not True: write fr\.create_model\(\"resnet18\", weights="),
        ],
    )
    def test_weights_without_a_name(self, fields: dict[str, Any], message):
        with pytest.raises(TypeError, match=message):
            fr.create_model("resnet18", **fields)

    def test_channels_without_weights(self):
        with pytest.raises(ValueError, match="channels=1 goes with weights"):
            fr.create_model("resnet18", channels=1)
