"""The programs of the documentation, and the commands of its how-tos, run as they stand."""

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import flax_resnet as fr

ROOT = Path(__file__).parents[1]


def blocks(page, language, title=None):
    """The fenced code of a page in one language, and of one title where it is given."""
    text = (ROOT / "docs" / page).read_text()
    fences = re.findall(rf'```{language}(?: title="(.*?)")?\n(.*?)```', text, re.DOTALL)
    return [code for its_title, code in fences if title is None or re.match(title, its_title)]


def test_quick_start():
    for code in blocks("index.md", "python"):
        exec(code, {})


# From PyTorch.


@pytest.fixture(scope="module")
def theirs():
    """The names that the PyTorch side of from-pytorch.md leaves, without data."""
    torch = pytest.importorskip("torch", exc_type=ImportError)
    torch.manual_seed(0)
    names = {"trainloader": [(torch.rand(4, 3, 64, 64), torch.arange(4))]}
    for code in blocks("from-pytorch.md", "python", "PyTorch"):
        if not re.search("torchvision|transform|import resnet|self.inplanes = 16", code):
            exec(code, names)
    return names


@pytest.fixture(scope="module")
def ours(theirs):
    """The names that the Flax side leaves, with noise for CIFAR-10."""

    def load_dataset(name, split):
        assert name == "cifar10"
        random = np.random.default_rng(0)
        images = random.integers(0, 256, (300, 8, 8, 3), np.uint8)
        return fr.Dataset(images, random.integers(0, 10, 300, np.int32), tuple("abcdefghij"))

    names = {"state_dict": theirs["state_dict"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fr, "load_dataset", load_dataset)
        for code in blocks("from-pytorch.md", "python", "Flax"):
            # The page ends with the library's blocks under the names of its own.
            exec(code, dict(names) if "= fr.BasicBlock" in code else names)
    return names


# One test, or two processes of pytest would run the page.
@pytest.mark.slow
def test_both_sides_compute_the_same_and_ours_trains(theirs, ours, rng):
    layers = (2, 1, 1, 1)
    images = rng.normal(size=(2, 64, 64, 3)).astype(np.float32)
    torch_images = theirs["torch"].tensor(images.transpose(0, 3, 1, 2))
    for block in ("BasicBlock", "Bottleneck"):
        torch_model = theirs["ResNet"](theirs[block], layers, num_classes=10)
        torch_model.eval()
        expected = torch_model(torch_images).detach().numpy()
        for model in (
            ours["ResNet"](ours[block], layers, num_classes=10),
            fr.ResNet(getattr(fr, block), layers, num_classes=10),
        ):
            variables = fr.from_torch(model, torch_model.state_dict())
            logits = jax.jit(partial(model.apply, train=False))(variables, images)
            np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)

    assert int(ours["state"].step) == 1
    assert np.isfinite(ours["metrics"]["loss"])
    assert ours["logits"].shape == (2, 10)


# Commands.


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder like a clone of the repository, whose runs are not the user's."""
    folder = tmp_path_factory.mktemp("clone")
    for name in ("train.py", "configs", "flax_resnet"):
        (folder / name).symlink_to(ROOT / name)
    return folder


# So little is computed that it does not pay to optimise it.
FASTER = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}


def run(command, folder, data_dir, *, overrides=""):
    """Runs a shell command, training for less long with these overrides."""
    command = re.sub(r"(python train[.]py(?:\\\n|.)*)", rf"\1 {overrides}", command)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {"PATH": path, "PYTHONPATH": str(ROOT), "TFDS_DATA_DIR": str(data_dir)}
    result = subprocess.run(
        ["bash", "-euc", command],
        cwd=folder,
        env=os.environ | FASTER | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    return result


# One test, or two processes of pytest would run the tutorial.
@pytest.mark.slow
def test_tutorial_and_the_export_of_its_run(folder, digits_dir):
    short = (
        "--config.num_epochs=1 --config.warmup_epochs=0.5 --config.train_split=train[:64] "
        "--config.eval_split=test[:100] --config.batch_size=32"
    )
    commands = blocks("tutorial.md", "sh")
    install, first, other, look, tensorboard, second, chosen, seeds, predict = commands
    assert "pip install" in install
    assert tensorboard == "tensorboard --logdir runs\n"
    assert second == first.replace("first", "second")
    for command in (first, other, look, chosen, seeds):
        run(command, folder, digits_dir, overrides=short)
    (folder / "tutorial.py").write_text("\n".join(blocks("tutorial.md", "python")))
    printed = run("python tutorial.py", folder, digits_dir).stdout
    printed += run(predict, folder, digits_dir).stdout
    assert {"curves.png", "metrics.jsonl", "checkpoints", "config.json", "dataset.json"} <= {
        path.name for path in (folder / "runs" / "first").iterdir()
    }
    expected = (
        r"\d+[.]\d+% of the test images\n"
        r"It is a \d\nthe net says \[.*\] and it is \[.*\]\ntrained for 33 steps\n"
        r"digit[.]png\n( +[\d.]+%  \d\n)+"
    )
    assert re.fullmatch(expected, printed), printed

    pytest.importorskip("flatbuffers")
    for i, code in enumerate(blocks("how-to/export.md", "python", "$")):
        (folder / f"export{i}.py").write_text(code)
        run(f"python export{i}.py", folder, digits_dir)
    (server,) = blocks("how-to/export.md", "python", "serve.py")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "serve.py").write_text(server.replace("8000", str(port)))
    environment = os.environ | FASTER
    with subprocess.Popen([sys.executable, "serve.py"], cwd=folder, env=environment) as serving:
        picture = (folder / "digit.png").read_bytes()
        answer = ""
        for _ in range(60):
            with contextlib.suppress(OSError):
                answer = urllib.request.urlopen(f"http://127.0.0.1:{port}", picture).read()
                break
            time.sleep(1)
        serving.terminate()
    probabilities = json.loads(answer)
    assert len(probabilities) == 10
    assert sum(probabilities) == pytest.approx(1)


@pytest.mark.slow
def test_onnx(folder, digits_dir):
    for name in ("onnx", "onnxscript", "onnxruntime", "torchvision"):
        pytest.importorskip(name)
    (code,) = blocks("how-to/export.md", "python", "onnx")
    (folder / "to_onnx.py").write_text(code)
    small = "--config.model=resnet18 --config.image_size=64 --config.train_split=train[:64]"
    short = "--config.num_epochs=1 --config.eval_split=test[:64] --config.warmup_epochs=0.5"
    command = "python train.py --config configs/digits_resnet8.py --workdir runs/pictures"
    run(command, folder, digits_dir, overrides=f"{small} {short}")
    run("python to_onnx.py", folder, digits_dir)


@pytest.mark.slow
def test_own_pictures(folder, digits_dir, rng):
    for split, count in (("train", 20), ("val", 5)):
        for name in ("cat", "dog"):
            place = folder / "pictures" / split / name
            place.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (*rng.integers(40, 90, 2), 3), np.uint8)
                Image.fromarray(pixels).save(place / f"{i}.{'jpg' if i % 2 else 'png'}")
    clear = Image.new("RGBA", (70, 70), (0, 0, 0, 0))
    clear.save(folder / "pictures" / "val" / "dog" / "0.png")
    clear.save(folder / "new.jpg", "png")
    (folder / "pictures.py").write_text(*blocks("how-to/own-data.md", "python"))
    of_folder, predict, prepare, prepared = blocks("how-to/own-data.md", "sh")
    small = "--config.model=cifar_resnet8 --config.batch_size=8 --config.num_epochs=1"
    smaller = "--config.image_size=32 --config.warmup_epochs=0.5 --config.stream_workers=1"
    result = run(of_folder, folder, digits_dir, overrides=f"{small} {smaller}")
    assert "40 training and 10 test images" in result.stderr
    assert re.match(r"new.jpg\n +\d+\.\d+%  (cat|dog)\n", run(predict, folder, digits_dir).stdout)
    run(prepare, folder, digits_dir)
    result = run(prepared, folder, digits_dir, overrides=f"{small}")
    assert "40 training and 10 test images" in result.stderr
    test = fr.load_dataset("pictures", "val", str(folder / "data"))
    assert test.image_shape == (64, 64, 3)
    assert (test.images == 255).all((1, 2, 3)).sum() == 1  # what is transparent
