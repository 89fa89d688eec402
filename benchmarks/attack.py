"""Hostile inputs from a seed, and what the programs make of them; faults.py --attack runs it.

Each attack is a command line, a run's folder, a data set, a file of weights or a picture that a
broken script, a broken disk or a malicious friend might leave. It is run in a fork of one
process that has imported everything, in a folder of its own, which is its home too. What is sound
after all ends where the training would begin.
"""

import collections
import contextlib
import io
import json
import multiprocessing
import os
import pickle
import random
import resource
import runpy
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from PIL import Image

ROOT = Path(__file__).parents[1]
RECIPE = "--config=configs/digits_resnet8.py"
# Of the base run, which takes seconds.
SHORT = {
    "train_split": "train[:64]",
    "eval_split": "test[:32]",
    "batch_size": 32,
    "num_steps": 4,
    "warmup_epochs": 1.0,
}
_SECONDS = 10.0
_SECONDS_TO_KILL = 60.0  # of a busy machine
_BYTES = 2**35  # of address space, most of which JAX only reserves

TEXTS = (
    *("", "-1", "0", "1e999", "nan", "None", "True", "()", "(1,", "{}", "[1, 2]", "10**9", "'"),
    *("%s", "{0}", str(2**31), str(2**63), "1_0", "-0.0", "A" * 10_000, "(" * 3000, "[" * 100_000),
    *("\x1b[31m", "a\nb", "\u202eabc", "\ud83d".encode("utf-8", "surrogatepass").decode("latin-1")),
    *(
        "~",
        "~no.such/x",
        "/dev/full",
        "/dev/null/x",
        "/proc/self/mem",
        "/proc/sys/kernel",
        ".",
        "..",
        "folder:/nope",
    ),
    *(
        "folder:~no.such",
        "gs://bucket/x",
        "http://127.0.0.1:9/x",
        "huggingface:x/y",
        "x" * 300 + "/y",
    ),
    *("(0.5, nan)", "(1, 'a')", "{'layers': (1,)}", "(10**5, 1, 1)", "100000", "(100000, 1, 1)"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 10**30, 1e300, float("nan"), "", "x", "\0", "a" * 10_000, [], {}, [[]]),
    *([0, 0, 0], [-1, 32, 3], [10**6, 10**6, 3], [10**30, 1, 1], [1, 2], {"a": {"b": []}}, "{X}"),
    *("../../x", "10000000000", ["a"] * 3, [1e999] * 3, "<script>", "\x1b[31m"),
)
CONTENTS: tuple[bytes, ...] = (
    *(b"", b"{", b"[]", b"null", b"0", b'"x"', b"\0" * 99, b"\xff\xfe", b"[" * 100_000),
    *(b'{"a":' * 2000 + b"1" + b"}" * 2000, b'{"a":' * 50 + b"1" + b"}" * 50, b"1" * 10_000, b"{}"),
    *(b"%!PS-Adobe-3.0\n", b"PK\3\4" + b"\0" * 30, b"\x80\4K\1.", b"\x89PNG\r\n\x1a\n", b"GIF89a"),
)


@dataclass
class Attack:
    """A command line, the exit codes that are right, and the function that made it."""

    program: str
    arguments: list[str]
    codes: tuple[int, ...]
    maker: str = ""


@dataclass
class Outcome:
    attack: Attack
    code: int
    seconds: float
    said: str

    def faults(self) -> list[str]:
        """What of it is none of the right answers."""
        found = {
            "traceback": "Traceback" in self.said or "Fatal Python error" in self.said,
            "exit code": self.code not in self.attack.codes,
            "lines": self.code == 2 and self.said.count("\n") != 1,
            "time": self.seconds > _SECONDS,
        }
        return [name for name, bad in found.items() if bad]


# The base, all of it sound.


def make_base(folder: Path) -> None:
    """Writes a run, a data set, pictures and weights; to be called in a process of its own."""
    import flax_resnet as fr

    data = fr.load_dataset("digits", "all", str(folder / "data"))
    config = fr.default_config()
    config.update(dataset="digits", data_dir=str(folder / "data"), model="cifar_resnet8", **SHORT)
    config.horizontal_flip = False
    config.crop_padding = 2
    fr.train(config, folder / "run")
    run = fr.load_run(folder / "run")
    fr.models.save_weights(run.model, run.variables, folder / "weights.safetensors")
    with contextlib.suppress(ImportError):
        import torch

        tensors = {k: torch.tensor(v) for k, v in fr.to_torch(run.model, run.variables).items()}
        torch.save(tensors, folder / "weights.pth")
    for i, image in enumerate(data.images[:16]):
        path = folder / "pictures" / ("val" if i % 4 == 3 else "train") / "ab"[i % 2]
        path.mkdir(parents=True, exist_ok=True)
        kind = ("png", "jpeg", "gif", "bmp", "webp", "tiff", "ppm")[i % 7]
        Image.fromarray(image).save(path / f"{i}.{kind}")


# Damage.


def flip_bits(rng: random.Random, content: bytes) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 3, 30)) if changed else 0):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def change_content(rng: random.Random, content: bytes) -> bytes:
    """Truncated, with bits flipped, with bytes taken out or doubled, or another."""
    at = rng.randrange(len(content) + 1)
    return rng.choice(
        (
            flip_bits(rng, content),
            flip_bits(rng, content[:200]) + content[200:],
            content[:at],
            content[:at] + content[at + rng.randrange(1, 100) :],
            content[:at] + content[max(0, at - 1000) :],
            rng.choice(CONTENTS),
            rng.randbytes(rng.choice((1, 100, 10_000))),
        )
    )


def change_json(rng: random.Random, content: bytes) -> bytes:
    """With another value at a random place."""
    before, after, tree = b"", b"", None
    with contextlib.suppress(ValueError):
        tree = json.loads(content)
    if tree is None:  # a line of several
        lines = content.splitlines(keepends=True) or [b""]
        i = rng.randrange(len(lines))
        before, after = b"".join(lines[:i]), b"\n" + b"".join(lines[i + 1 :])
        try:
            tree = json.loads(lines[i])
        except ValueError:
            return change_content(rng, content)
    place = tree
    while isinstance(place, dict | list) and place:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        inside = place[key]
        if not isinstance(inside, dict | list) or not inside or rng.random() < 0.4:
            if rng.random() < 0.15:
                del place[key]
            else:
                place[key] = rng.choice(VALUES)
            break
        place = inside
    return before + json.dumps(tree).encode() + after


def change_file(rng: random.Random, path: Path) -> None:
    """Another content, or no file at all."""
    content = path.read_bytes()
    is_json = content.lstrip().startswith((b"{", b"["))
    how = rng.random()
    if how < 0.8:
        change = change_json if is_json and rng.random() < 0.7 else change_content
        path.write_bytes(change(rng, content))
        return
    path.unlink()
    if how < 0.84:
        os.mkfifo(path)
    elif how < 0.88:
        path.mkdir()
    elif how < 0.91:
        path.symlink_to(rng.choice(("/dev/zero", "/dev/null", path.name, "/nope", "/etc")))
    elif how < 0.94:
        with path.open("wb") as file:
            file.truncate(2 ** rng.choice((20, 34, 40)))


def sign_anew(checkpoint: Path) -> None:
    """The manifest of what is there now, as who changed a file on purpose would write it."""
    from flax_resnet.training import checkpoint_files

    with contextlib.suppress(Exception):
        checkpoint_files.write_manifest(checkpoint)


# The attacks.


def on_command_line(rng: random.Random, base: Path, folder: Path) -> Attack:
    from flax_resnet.training import default_config

    keys = [
        *default_config(),
        "learnng_rate",
        "batch-size",
        "lr",
        "model_fields.depth",
        "a.b.c",
        "",
    ]
    keys += [f"model_fields.{name}" for name in default_config().model_fields]
    arguments = [RECIPE, f"--config.data_dir={base / 'data'}", f"--workdir={folder / 'run'}"]
    arguments += ["--quiet", *(f"--config.{key}={value}" for key, value in SHORT.items())]
    for _ in range(rng.choice((1, 1, 2, 3))):
        text = rng.choice(TEXTS).replace("\0", "")
        key = rng.choice(keys)
        flag = rng.choice(
            (
                *("workdir", "coordinator", "num_processes", "process_id", "flagfile", "config"),
                *("workdr", "verbosity", "stderrthreshold", "v", "logtostderr", "undefok"),
            )
        )
        arguments += rng.choice(
            (
                *([[f"--config.{key}={text}"]] * 8),
                [f"--config.{key}", text],
                [f"--config.{key}"],
                [f"--noconfig.{key}"],
                [f"-config.{key}={text}"],
                *([[f"--{flag}={text}"]] * 2),
                [f"--{flag}"],
                [text],
            )
        )
    if "None" not in arguments and rng.random() < 0.3:
        arguments.append("--config.dataset=nope")
    return Attack("train", [a.replace("\0", "") for a in arguments], (0, 2))


def on_run(rng: random.Random, base: Path, folder: Path) -> Attack:
    run = folder / "run"
    shutil.copytree(base / "run", run)
    paths = [path for path in sorted(run.rglob("*")) if path.is_file()]
    named = [
        path for path in paths if path.suffix in (".json", ".jsonl") or path.name == "metadata"
    ]
    for _ in range(rng.choice((1, 1, 1, 3))):
        path = rng.choice(named if rng.random() < 0.6 else paths)
        if path.is_file() and path.stat().st_size < 2**24:
            change_file(rng, path)
    if rng.random() < 0.6:
        for checkpoint in (run / "checkpoints").iterdir():
            sign_anew(checkpoint)
    picture = str(base / "pictures" / "train" / "a" / "0.png")
    arguments = {
        "train": [RECIPE, f"--workdir={run}", f"--config.data_dir={base / 'data'}", "--quiet"]
        + [f"--config.{key}={value}" for key, value in SHORT.items()],
        "predict": ["--workdir", str(run), "--quiet", picture],
        "evaluate": ["--workdir", str(run), "--quiet"],
        "report": [str(run), "--quiet"],
    }
    program = rng.choice(tuple(arguments))
    if program == "train" and rng.random() < 0.3:
        arguments["train"] += [f"--workdir={folder / 'other'}", f"--config.init_from={run}"]
    return Attack(program, arguments[program], (0, 2))


def on_data(rng: random.Random, base: Path, folder: Path) -> Attack:
    arguments = [RECIPE, f"--workdir={folder / 'run'}", "--quiet"]
    arguments += [f"--config.{key}={value}" for key, value in SHORT.items()]
    name = rng.choice(("data", "data", "pictures"))
    shutil.copytree(base / name, folder / name)
    paths = [path for path in sorted((folder / name).rglob("*")) if path.is_file()]
    for _ in range(rng.choice((1, 1, 1, 3))):
        named = [path for path in paths if path.suffix in (".json", ".txt")] or paths
        path = rng.choice(named if rng.random() < 0.6 else paths)
        if path.is_file() and path.stat().st_size < 2**24:
            change_file(rng, path)
    if name == "data":
        arguments.append(f"--config.data_dir={folder / name}")
        arguments.append(f"--config.data_feed={rng.choice(('auto', 'stream'))}")
    else:
        arguments += [f"--config.dataset=folder:{folder / name}", "--config.train_split=train"]
        arguments += ["--config.eval_split=val", "--config.image_size=32", "--config.batch_size=4"]
        arguments.append(f"--config.bad_images={rng.choice(('stop', 'skip'))}")
    arguments.append("--config.stream_workers=0")
    return Attack("train", arguments, (0, 2))


class _Call:
    """What runs a program where a pickle is trusted."""

    def __reduce__(self) -> Any:
        return os.system, ("echo Traceback: code was run >&2",)


def on_weights(rng: random.Random, base: Path, folder: Path) -> Attack:
    sources = sorted(base.glob("weights.*"))
    source = rng.choice(sources)
    path = folder / rng.choice((source.name, "w.pth", "w.safetensors", "w.bin"))
    content = source.read_bytes()
    if rng.random() < 0.4 and source.suffix == ".safetensors":
        length = int.from_bytes(content[:8], "little")
        header = change_json(rng, content[8 : 8 + length])
        content = len(header).to_bytes(8, "little") + header + content[8 + length :]
    elif rng.random() < 0.1:
        content = pickle.dumps({"a": _Call()}, protocol=rng.choice((0, 2, 4)))
    else:
        content = change_content(rng, content)
    path.write_bytes(content)
    if rng.random() < 0.1:
        change_file(rng, path)
    arguments = [RECIPE, f"--config.data_dir={base / 'data'}", f"--workdir={folder / 'run'}"]
    arguments += [f"--config.{key}={value}" for key, value in SHORT.items()]
    return Attack("train", [*arguments, f"--config.init_from={path}", "--quiet"], (0, 2))


def on_picture(rng: random.Random, base: Path, folder: Path) -> Attack:
    source = rng.choice([path for path in sorted((base / "pictures").rglob("*.*"))])
    path = folder / f"picture{rng.choice((source.suffix, '.png', '.jpg'))}"
    content = source.read_bytes()
    if rng.random() < 0.15:
        mode = rng.choice(("1", "L", "LA", "P", "RGBA", "CMYK", "I;16", "F"))
        buffer = io.BytesIO()
        sides = rng.choice(((1, 1), (1, 5000), (5000, 1), (7000, 7000)))
        Image.new(mode, sides).save(buffer, "tiff")
        content = buffer.getvalue()
    path.write_bytes(change_content(rng, content) if rng.random() < 0.9 else content)
    if rng.random() < 0.1:
        change_file(rng, path)
    options = ["--json"] * rng.randrange(2)
    given = [str(path), str(folder)][rng.random() < 0.2]
    arguments = ["--workdir", str(base / "run"), "--quiet", *options, given]
    return Attack("predict", arguments, (0, 1, 2))


KINDS: tuple[Callable[[random.Random, Path, Path], Attack], ...] = (
    *((on_command_line,) * 8),
    *((on_run,) * 5),
    *((on_data,) * 3),
    *((on_weights,) * 2),
    *((on_picture,) * 2),
)


# Running them.


def run_attack(seed: int, number: int, base: Path, folder: Path) -> Outcome:
    """Makes an attack and runs it in a fork; JAX is not to have started in this process."""
    rng = random.Random(f"{seed}/{number}")
    make = rng.choice(KINDS)
    attack = make(rng, base, folder)
    attack.maker = make.__name__
    said = folder / "stderr"
    started = time.monotonic()
    child = os.fork()
    if not child:
        _become(attack, folder, said)
    resource_usage = _wait(child)
    if resource_usage is None:
        code, seconds = 128 + signal.SIGKILL, time.monotonic() - started
    else:
        status, usage = resource_usage
        # Of the processor, as there may be others at work; where it waits, the clock counts.
        code, seconds = os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime
    return Outcome(attack, code, seconds, said.read_text(errors="replace"))


def _wait(child: int) -> tuple[int, Any] | None:
    """Status and usage of a child; None if it had to be killed."""
    descriptor = os.pidfd_open(child)
    try:
        ended, _, _ = select.select([descriptor], [], [], _SECONDS_TO_KILL)
        if not ended:
            os.kill(child, signal.SIGKILL)
        _, status, usage = os.wait4(child, 0)
        return (status, usage) if ended else None
    finally:
        os.close(descriptor)


def _become(attack: Attack, folder: Path, said: Path) -> None:
    """Turns this process into the program; it does not return."""
    code = 70
    try:
        os.setsid()
        with said.open("w") as error, (folder / "stdout").open("w") as output:
            os.dup2(error.fileno(), 2)
            os.dup2(output.fileno(), 1)
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        resource.setrlimit(resource.RLIMIT_AS, (_BYTES, _BYTES))
        here = folder / "here"
        here.mkdir()
        (here / "configs").symlink_to(ROOT / "configs")
        os.chdir(here)
        os.environ["HOME"] = str(here)
        code = _run(attack)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def _run(attack: Attack) -> int:
    from flax_resnet import evaluate, predict, report
    from flax_resnet.cli import run_program
    from flax_resnet.report import __main__ as report_program
    from flax_resnet.training import hosts, launch

    hosts._SECONDS_TO_MEET = 1
    launch._train = _go_on  # pyright: ignore[reportAttributeAccessIssue]
    report.report_after_training = lambda workdir: None
    sys.argv = [f"{attack.program}.py", *attack.arguments]
    try:
        if attack.program == "train":
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
        else:
            modules = {"predict": predict, "evaluate": evaluate, "report": report_program}
            module = modules[attack.program]
            run_program(module._parser(), module._main)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    return 0


def _go_on(plan: Any, checkpoints: Any) -> None:
    """In place of training, what comes before its first step."""
    from flax_resnet.training import launch, writers
    from flax_resnet.training.history import History

    step, history = 0, History()
    if checkpoints.newest is not None:
        state, history = launch._newest(plan, checkpoints)
        step = int(state.step)
    writers.take_up_files(plan, history, step, has_checkpoint=checkpoints.newest is not None)


def _start_worker(caches: str) -> None:
    """Imports what the programs import, and says where what they compile is kept."""
    os.environ["GLIBC_TUNABLES"] = ""  # or train.py would start itself again
    os.environ["JAX_PLATFORMS"] = "cpu"  # for what it starts; JAX itself is imported already
    os.environ["XDG_CACHE_HOME"] = caches
    os.environ.pop("TFDS_DATA_DIR", None)
    # Of semaphores with names, as a spawned process makes them, the forks would leave theirs.
    multiprocessing.set_start_method("fork", force=True)
    warnings.simplefilter("ignore")  # of JAX, for forks: it has not started here

    import jax

    jax.config.update("jax_platforms", "cpu")

    from flax_resnet import evaluate, predict, report  # noqa: F401

    jax.config.update("jax_compilation_cache_dir", f"{caches}/xla")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    with contextlib.suppress(ImportError):
        import torch  # noqa: F401


def _run_numbered(seed: int, base: Path, number: int) -> Outcome:
    with tempfile.TemporaryDirectory(dir=base.parent) as folder:
        return run_attack(seed, number, base, Path(folder))


def main(count: int, seed: int) -> NoReturn:
    """Runs the attacks on all cores, and prints a table; exits with 1 if there is any fault."""
    spawn = multiprocessing.get_context("spawn")
    names = ("traceback", "exit code", "lines", "time")
    table = {make.__name__: collections.Counter() for make in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        base, caches = Path(folder) / "base", f"{folder}/caches"
        with ProcessPoolExecutor(
            1, mp_context=spawn, initializer=_start_worker, initargs=(caches,)
        ) as one:
            one.submit(make_base, base).result()
        with ProcessPoolExecutor(
            mp_context=spawn, initializer=_start_worker, initargs=(caches,)
        ) as pool:
            outcomes = pool.map(partial(_run_numbered, seed, base), range(count))
            for number, outcome in enumerate(outcomes):
                faults = outcome.faults()
                row = table[outcome.attack.maker]
                row.update(["attacks", *faults])
                if faults:
                    said = outcome.said[-1000:]
                    print(
                        f"{number}: {', '.join(faults)}: exit code {outcome.code} in "
                        f"{outcome.seconds:.1f} s of {outcome.attack.program} "
                        f"{outcome.attack.arguments}\n{said}",
                        file=sys.stderr,
                    )
    print("| input | attacks | tracebacks | exit codes | more than a line | more than 10 s |")
    print("|---|---|---|---|---|---|")
    for kind, row in table.items():
        counts = " | ".join(str(row[name]) for name in ("attacks", *names))
        print(f"| {kind.removeprefix('on_').replace('_', ' ')} | {counts} |")
    sys.exit(any(row[name] for row in table.values() for name in names))
