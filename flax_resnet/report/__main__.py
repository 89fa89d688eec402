"""Shows runs in one HTML file that needs neither a network nor anything beside it.

    python -m flax_resnet.report RUN [RUN ...] [--output FILE]

It compares the runs and draws their curves. Of the newest checkpoint of each
run it shows accuracy with its 95% interval, confusions, precision and recall
of the classes, calibration, the most confident mistakes with where the net
looked, the first layer's filters, config, versions and hardware. It is written
as report.html into the first run's folder, and train.py writes it at the end
of a run.

A run may still be training. Exits with 2 and one line on standard error where
the input cannot be used.
"""

import argparse

from flax_resnet.cli import Parser, run_program
from flax_resnet.report import write_report


def _parser() -> Parser:
    parser = Parser("report", __doc__ or "")
    parser.add_argument("workdirs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument(
        "--output", metavar="FILE", help="default: report.html in the first run's folder"
    )
    parser.add_argument(
        "--data_dir",
        metavar="DIR",
        help="folder of TFDS, or of the pictures, if it is not where the runs found it",
    )
    return parser


def _main(options: argparse.Namespace) -> int:
    path = write_report(options.workdirs, options.output, data_dir=options.data_dir)
    print(path)
    return 0


if __name__ == "__main__":
    run_program(_parser(), _main)
