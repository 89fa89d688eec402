"""A hundred malformed command lines: each is one short line and exit code 2."""

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flax_resnet.training import default_config

# What a user may type, or a script that went wrong.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
VALUES = TEXT | st.sampled_from(
    ["-1", "0", "1e999", "nan", "None", "True", "()", "(1,", "{}", "[1, 2]", "10**9", "'", "%s"]
)
KEYS = st.sampled_from([*default_config(), "learnng_rate", "model_fields.depth", "a.b.c", ""])
OVERRIDES = st.lists(st.builds("--config.{}={}".format, KEYS, VALUES), min_size=1, max_size=3)
OTHERS = st.builds("--{}={}".format, st.sampled_from(["config", "workdr", "num_processes"]), VALUES)


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
    code, printed, said = command_line(*arguments, "--config.dataset=nope")
    assert (code, printed) == (2, ""), said
    assert said.startswith("train.py: ")
    assert said.count("\n") == 1
    assert len(said) < 1000
