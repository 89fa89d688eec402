"""Shows runs in one HTML file that needs neither a network nor anything beside it.

`page.py` gathers what a run has to show, `curves.py` the numbers that the page draws, and
`templates` have the page, its style and its script.
"""

import base64
import hashlib
import importlib.metadata
import os
import time
from collections.abc import Sequence
from pathlib import Path

import flax.linen as nn
import jax
import jinja2
from markupsafe import Markup

from flax_resnet.data import Dataset, Examples
from flax_resnet.errors import InputError, one_line
from flax_resnet.evaluate import percent, percent_range
from flax_resnet.progress import say, warn
from flax_resnet.report.curves import COLORS, MARKERS, charts
from flax_resnet.report.page import compare, describe
from flax_resnet.runs import load_run, open_run
from flax_resnet.training import hosts
from flax_resnet.training.jsonfiles import user_path, write_whole


def write_report(
    workdirs: Sequence[str | Path],
    output: str | Path | None = None,
    *,
    data_dir: str | None = None,
    model: nn.Module | None = None,
    data: Dataset | Examples | None = None,
) -> Path:
    """Writes the report of one run or several, and evaluates each once for it.

    Where the test split of a run cannot be read, or its model is its script's own and not given
    here, its part says so and lacks what needs it.

    Args:
      workdirs: folders of the runs.
      output: the file; report.html in the first of the folders by default.
      data_dir: folder of TFDS, if it is not where the runs found it.
      model, data: model and test split of the runs whose script brought their own.

    Returns:
      The file.

    Raises:
      InputError: if a folder is not a run's or has no checkpoint that can be read, or if the
        file cannot be written.
    """
    runs = [open_run(workdir, "newest") for workdir in workdirs]
    if model is not None:
        runs = [
            load_run(r.workdir, "newest", model=model) if "model" in r.brought else r for r in runs
        ]
    path = runs[0].workdir / "report.html" if output is None else user_path(output)
    if os.path.exists(path) and not os.path.isfile(path):  # a folder, or a device
        raise InputError(f"{path} is not a file: name one by --output")
    if not os.path.isdir(path.parent):
        raise InputError(f"there is no folder {path.parent}: name another --output")
    short = [run.workdir.resolve().name for run in runs]
    names = short if len(set(short)) == len(short) else [str(run.workdir) for run in runs]
    described = [describe(run, data_dir, data) for run in runs]
    looks = [
        {"name": name, "color": i % len(COLORS), "marker": i % len(MARKERS)}
        for i, name in enumerate(names)
    ]
    page = _render(
        title=", ".join(names),
        written=time.strftime("%Y-%m-%d %H:%M"),
        version=importlib.metadata.version("flax_resnet"),
        colors=COLORS,
        markers=MARKERS,
        drawn={"charts": charts(runs), "runs": looks, "markers": MARKERS},
        columns=compare(described),
        runs=[look | about for look, about in zip(looks, described, strict=True)],
    )
    try:
        write_whole(path, page)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error}; name another --output") from error
    return path


def _render(**values: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("flax_resnet.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": percent, "percent_range": percent_range}
    script = environment.get_template("report.js").render()
    # The one script that the page's policy lets run.
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page = environment.get_template("report.html")
    return page.render(script=Markup(script), script_hash=f"sha256-{digest}", **values)


def report_after_training(workdir: str | Path) -> None:
    """Writes the report of a run that is done, on the first host; says so where it cannot."""
    try:
        if jax.process_index() == 0:
            say(f"writing {Path(workdir) / 'report.html'}")
            write_report([workdir])
    except Exception as error:  # whatever it is, the run is done and on disk
        warn(f"there is no report: {one_line(error)}")
    finally:
        # The others wait for it as processes: their devices would give up.
        hosts.wait_for_all("report")
