"""The command for the day a GPU is there, tried without."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import flax_resnet as fr
from benchmarks import accelerator, parity, train_step

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_each_kind_of_stage_runs_on_a_cpu(tmp_path):
    pytest.importorskip("torch")
    output = tmp_path / "output"
    command = [sys.executable, "benchmarks/accelerator.py", "--smoke", f"--output={output}"]
    # So few steps that it does not pay to optimise them.
    faster = {"JAX_NUM_CPU_DEVICES": "1", "JAX_DISABLE_MOST_OPTIMIZATIONS": "true"}
    environment = os.environ | faster
    subprocess.run(command, cwd=ROOT, env=environment, check=True)
    lines = [json.loads(line) for line in (output / "stages.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in lines] == ["parity", "signal", "step", "loop", "profile"]
    assert {line["end"] for line in lines} == {"done"}
    for stage, text in (("parity", "bfloat16"), ("signal", "| 0 |"), ("step", "cifar_resnet8")):
        assert text in (output / f"{stage}.txt").read_text()
    assert list((output / "runs" / "profile").glob("plugins/profile/*/*.xplane.pb"))


def test_stages_that_are_chosen_run_alone(tmp_path, monkeypatch, capsys):
    def main(*names):
        command = ["accelerator.py", "--smoke", f"--output={tmp_path / 'out'}", "--stages", *names]
        monkeypatch.setattr(sys, "argv", command)
        accelerator.main()

    def run(stage, *_):
        done.append(stage.name)
        return {"stage": stage.name, "end": "done"}

    done = []
    monkeypatch.setattr(accelerator, "run", run)
    monkeypatch.setattr(accelerator, "describe_device", lambda: "cpu")
    monkeypatch.setattr(accelerator.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="2"):
        main("lopp")
    assert "lopp is none of parity, signal, step, loop, profile" in capsys.readouterr().err
    monkeypatch.setenv("TFDS_DATA_DIR", "")  # which it sets
    with pytest.raises(SystemExit, match="False"):
        main("loop", "parity")
    assert done == ["parity", "loop"]


@pytest.mark.parametrize("name", ["inference", "parity", "train_step"])
def test_nets_of_a_benchmark_are_there(name, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # as for a script
    assert set(importlib.import_module(name).NETS) <= set(fr.list_models())


@pytest.mark.parametrize(
    ("code", "end"),
    [("pass", "done"), ("raise SystemExit(3)", "failed"), ("import time; time.sleep(60)", "late")],
)
def test_a_stage_ends_in_its_time_and_leaves_what_it_printed(tmp_path, code, end):
    code = f"print('a table', flush=True); {code}"
    stage = accelerator.Stage("one", 1, ("-c", code))
    line = accelerator.run(stage, tmp_path, 3 if end == "late" else 60)
    assert line["end"] == {"late": "out of time"}.get(end, end)
    assert (tmp_path / "one.txt").read_text() == "a table\n"


def test_shares_are_of_the_same_net_and_batch(tmp_path):
    row = "| h100 | cifar_resnet18 | 128 | 300 | 3 | 1 | 0 | 400 | 1 | 1.00 | 100,000 |"
    (tmp_path / "roofline.txt").write_text(row + "\n")
    rate = train_step.digits(25000)
    steps = [f"| cifar_resnet18 | {n} | default | {rate} | 9 (eager) | 2 | 1 |" for n in (128, 512)]
    (tmp_path / "step.txt").write_text("\n".join(steps))
    assert accelerator.shares(tmp_path).splitlines()[2:] == [
        "| cifar_resnet18 | 128 | 25,000 | 100,000 | 25% |"
    ]


def test_parity_tells_a_wrong_number(monkeypatch, capsys):
    results = {"float32": ([1.0], [2.0]), "bfloat16": ([1.05], [2.2])}
    monkeypatch.setattr(sys, "argv", ["parity.py", "--nets=net"])
    monkeypatch.setattr(parity, "results", lambda net, dtype, *_: results[dtype])
    with pytest.raises(SystemExit, match=r"^False$"):
        parity.main()
    assert "| net | bfloat16 | 5.0e-02 | 1.0e-01 |" in capsys.readouterr().out
    results["bfloat16"] = ([1.0], [float("nan")])
    with pytest.raises(SystemExit, match=r"^True$"):
        parity.main()
