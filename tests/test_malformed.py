"""A hundred malformed command lines: each is one short line and exit code 2."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_resnet.training import default_config

ROOT = Path(__file__).parents[1]

# What a user may type, or a script that went wrong.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
VALUES = TEXT | st.sampled_from(
    ["-1", "0", "1e999", "nan", "None", "True", "()", "(1,", "{}", "[1, 2]", "10**9", "'", "%s"]
)
KEYS = st.sampled_from([*default_config(), "learnng_rate", "model_fields.depth", "a.b.c", ""])
OVERRIDES = st.lists(st.builds("--config.{}={}".format, KEYS, VALUES), min_size=1, max_size=3)
OTHERS = st.builds("--{}={}".format, st.sampled_from(["config", "workdr", "num_processes"]), VALUES)


@pytest.fixture(scope="module")
def command_line():
    """Runs train.py in a child of one process that has imported everything: (code, stderr)."""
    script = textwrap.dedent("""
        import json, os, runpy, sys, tempfile, warnings

        import flax_resnet.report
        from ml_collections import config_flags

        warnings.simplefilter("ignore")  # of JAX, for forks: the child has no thread to wait for
        for line in sys.stdin:
            with tempfile.TemporaryFile("w+") as said:
                child = os.fork()
                if not child:
                    os.dup2(said.fileno(), 2)
                    sys.argv = ["train.py", *json.loads(line)]
                    code = 0
                    try:
                        runpy.run_path("train.py", run_name="__main__")
                    except SystemExit as end:
                        code = end.code
                    sys.stderr.flush()
                    os._exit(code)  # at once: to take down all that was imported takes longer
                _, status = os.waitpid(child, 0)
                said.seek(0)
                print(json.dumps([os.waitstatus_to_exitcode(status), said.read()]), flush=True)
    """)
    environment = os.environ | {"GLIBC_TUNABLES": ""}  # so that it does not start itself again
    with subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        stdin, stdout = process.stdin, process.stdout
        assert stdin
        assert stdout

        def run(arguments):
            print(json.dumps(arguments), file=stdin, flush=True)
            return json.loads(stdout.readline())

        yield run
        stdin.close()


@given(OVERRIDES, st.lists(OTHERS, max_size=1))
@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
def test_malformed_command_line(command_line, overrides, others):
    # No such data set: what else is sound ends there.
    arguments = ["--config=configs/digits_resnet8.py", *overrides, *others]
    code, said = command_line([*arguments, "--config.dataset=nope"])
    assert code == 2, said
    assert said.startswith("train.py: ")
    assert said.count("\n") == 1
    assert len(said) < 1000
