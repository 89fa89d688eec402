"""Eight CPU devices, a compiler in a hurry, digits that TFDS prepared, a run on them."""

import contextlib
import gc
import io
import json
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator

# Before TFDS and JAX are imported: the user's data sets and devices are not the tests' business.
os.environ.pop("TFDS_DATA_DIR", None)
os.environ.pop("JAX_NUM_CPU_DEVICES", None)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"  # on some CPUs XLA warns of programs from its cache
os.environ["OMP_NUM_THREADS"] = "1"  # PyTorch's threads would wait for each other, and busily

from pathlib import Path

import jax
import numpy as np
import platformdirs
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
# Most of a test's time would be the compiler's. Not so in whole runs, most of which are the same
# program from JAX's cache, and in programs that the tests start.
jax.config.update("jax_disable_most_optimizations", True)
# Tracing makes many objects. To look for cycles among them took a seventh of all time.
gc.freeze()
gc.set_threshold(100_000, 50, 1000)


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


@pytest.fixture(scope="session", autouse=True)
def one_device() -> Iterator[None]:
    """Runs take one device, on which our own convolutions are fast, not all that there are."""
    from flax_resnet.training import mesh

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mesh, "find_devices", lambda **_: jax.devices()[:1])
        yield


@pytest.fixture
def eight_devices(monkeypatch: pytest.MonkeyPatch, optimized: None) -> None:
    """Runs take all devices, where convolutions are XLA's, which are slow unless optimised."""
    from flax_resnet.training import mesh

    monkeypatch.setattr(mesh, "find_devices", lambda **_: jax.devices())


@contextlib.contextmanager
def optimizing() -> Iterator[None]:
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", False)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture
def optimized() -> Iterator[None]:
    """What the test compiles is optimised, as for users."""
    with optimizing():
        yield


@pytest.fixture(scope="session", autouse=True)
def optimized_runs() -> Iterator[None]:
    """What whole runs compile is."""
    from flax_resnet.training import launch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(launch, "_train", optimizing()(launch._train))
        yield


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """One place for what is compiled or cached by the tests and by programs that they start."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # whose folders are beside each other
        folder = folder.parent
    folder = Path(os.environ.get("TEST_CACHES", folder))  # that of several runs of pytest
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder / "xla")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    jax.config.update("jax_compilation_cache_dir", str(folder / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)


@pytest.fixture(scope="session", autouse=True)
def no_proxies() -> None:
    """Neither between processes that meet here, nor for JAX to warn of."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        os.environ.pop(name, None)
        os.environ.pop(name.upper(), None)


@pytest.fixture
def user_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user_cache"))
    return tmp_path / "user_cache"


@pytest.fixture
def no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a user whom the system does not know, without $HOME."""

    def nowhere(*_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(platformdirs, "user_cache_path", nowhere)


@pytest.fixture(scope="session")
def digits_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A TFDS folder with digits in it, prepared and cached; not to be written to."""
    from flax_resnet.data import load_dataset

    folder = tmp_path_factory.mktemp("digits")
    load_dataset("digits", "all", str(folder))
    return folder


@pytest.fixture
def own_digits(digits_dir: Path, tmp_path: Path) -> Path:
    """A copy of the digits folder without its cache."""
    folder = tmp_path / "tfds"
    shutil.copytree(digits_dir / "digits" / "1.0.0", folder / "digits" / "1.0.0")
    return folder


@pytest.fixture(scope="session")
def config(digits_dir: Path):
    """Of a small run on the digits."""
    import flax_resnet as fr

    config = fr.default_config()
    config.dataset = "digits"
    config.data_dir = str(digits_dir)
    config.train_split = "train[:264]"
    config.eval_split = "test[:101]"
    config.model = "cifar_resnet8"
    config.batch_size = 32
    config.eval_batch_size = 40
    config.num_epochs = 4
    config.warmup_epochs = 1.0
    config.crop_padding = 2
    config.horizontal_flip = False
    return config


@pytest.fixture(scope="session", autouse=True)
def plot_curves() -> Iterator[Callable[..., None]]:
    """Runs draw no curves: a third of a second each."""
    from flax_resnet.training import writers

    with pytest.MonkeyPatch.context() as patch:
        drawing = writers.plot_curves
        patch.setattr(writers, "plot_curves", lambda *_: None)
        yield drawing


@pytest.fixture(scope="session")
def finished(config, plot_curves, tmp_path_factory: pytest.TempPathFactory):
    """(workdir, state) of a run that nothing disturbed; with its curves."""
    import flax_resnet as fr
    from flax_resnet.training import writers

    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writers, "plot_curves", plot_curves)
        return folder, fr.train(config, folder)


@pytest.fixture(scope="session")
def run(finished):
    """That run as `fr.load_run` opens it, with its newest checkpoint."""
    import flax_resnet as fr

    return fr.load_run(finished[0], "newest")


@pytest.fixture(scope="session")
def evaluation(run):
    """What it says of its test split."""
    from flax_resnet.evaluate import evaluate, open_test_set

    return evaluate(run, open_test_set(run))


@pytest.fixture
def run_copy(finished, tmp_path: Path) -> Path:
    """A copy of that run's folder, for a test to change."""
    return shutil.copytree(finished[0], tmp_path / "copy")


@pytest.fixture
def set_array() -> Callable[..., None]:
    """set_array(checkpoint, name, shape, chunks): an array of nothing in it, and a manifest to it.

    Of zeros that are not written, it may have any shape.
    """
    import tensorstore

    from flax_resnet.training import checkpoint_files

    def set_array(checkpoint, name, shape, chunks):
        files = {"driver": "file", "path": f"{checkpoint}/state/"}
        place = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
        metadata = {"shape": shape, "chunks": chunks, "dtype": "<f4"}
        spec = {"driver": "zarr", "kvstore": place, "metadata": metadata}
        tensorstore.open(spec, create=True, delete_existing=True).result()
        checkpoint_files.write_manifest(checkpoint)

    return set_array


@pytest.fixture
def huge(run_copy: Path, set_array: Callable[..., None]) -> Path:
    """That copy, where every checkpoint says that it has an array of four terabytes."""
    for checkpoint in (run_copy / "checkpoints").iterdir():
        set_array(checkpoint, "params.fc.kernel", [10**6, 10**6], [1000, 1000])
    return run_copy


@pytest.fixture(scope="session")
def command_line(digits_dir: Path):
    """command_line(arguments) -> (exit code, stdout, stderr) of train.py.

    It runs in a child of one process that has imported everything.
    """
    script = textwrap.dedent("""
        import json, os, runpy, sys, tempfile, warnings

        import flax_resnet.report
        from ml_collections import config_flags

        warnings.simplefilter("ignore")  # of JAX, for forks: the child has no thread to wait for
        for line in sys.stdin:
            with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
                child = os.fork()
                if not child:
                    os.dup2(printed.fileno(), 1)
                    os.dup2(said.fileno(), 2)
                    sys.argv = ["train.py", *json.loads(line)]
                    code = 0
                    try:
                        runpy.run_path("train.py", run_name="__main__")
                    except SystemExit as end:
                        code = end.code
                    sys.stdout.flush()
                    sys.stderr.flush()
                    os._exit(code)  # at once: to take down all that was imported takes longer
                _, status = os.waitpid(child, 0)
                printed.seek(0)
                said.seek(0)
                code = os.waitstatus_to_exitcode(status)
                print(json.dumps([code, printed.read(), said.read()]), flush=True)
    """)
    # Without settings of glibc's it would start itself again.
    environment = os.environ | {"GLIBC_TUNABLES": "", "TFDS_DATA_DIR": str(digits_dir)}
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[1],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin
        assert stdout

        def run(*arguments: str) -> tuple[int, str, str]:
            print(json.dumps(arguments), file=stdin, flush=True)
            return json.loads(stdout.readline())

        yield run
        stdin.close()


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """call(module, *arguments, stdin=b"") -> (exit code, stdout, stderr) of a program."""
    from flax_resnet import cli

    def call(module, *arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            cli.run_program(module._parser(), module._main)
        return end.value.code, *capsys.readouterr()

    return call
