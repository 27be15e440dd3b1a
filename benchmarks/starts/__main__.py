# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.starts``: run what is missing of the benchmark, and print its table.

Every result is a file of its own, so that a run can be interrupted and resumed. ``--label`` names our results, which
compares two versions of the package with the same results of Adam. ``--tenth`` runs a representative tenth.
"""

import argparse
import pathlib

from .cases import PROBLEMS
from .problems import GUIDES, SETTINGS
from .results import FOLDER, Store
from .run import Plan, cells, run
from .table import rows, table

OUTPUT = pathlib.Path("docs/benchmarks/starts.md")
HEADING = "## The table\n\n"


def main() -> None:
    """Run what is missing, and print the table."""
    options = _parser().parse_args()
    if unknown := sorted(set(options.only) - set(PROBLEMS)):
        raise SystemExit(f"`--only {' '.join(unknown)}`: expected names of problems: {', '.join(PROBLEMS)}.")
    wanted = list(cells(options.only, options.guides, options.settings, tenth=options.tenth))
    plan = Plan(Store(options.cache), options.label, tuple(options.methods), options.starts, options.steps)
    failed = [] if options.table else run(plan, wanted, options.jobs)
    found = table(rows(plan.store, options.label, wanted))
    print(found)
    if options.document:
        OUTPUT.write_text(OUTPUT.read_text().partition(HEADING)[0] + HEADING + found)
    if failed:
        raise SystemExit("\n".join(["These cells failed:", *failed]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.starts", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="problems; all if left out")
    parser.add_argument("--guides", nargs="*", default=list(GUIDES), choices=GUIDES)
    parser.add_argument("--settings", nargs="*", default=list(SETTINGS), choices=SETTINGS, help="particles, precision")
    parser.add_argument("--methods", nargs="*", default=["adam", "ours"], choices=["adam", "ours"])
    parser.add_argument("--tenth", action="store_true", help="a representative tenth, in a quarter of an hour")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results, and run nothing")
    parser.add_argument("--document", action="store_true", help=f"write the table to {OUTPUT}")
    parser.add_argument("--starts", type=int, default=20)
    parser.add_argument("--steps", type=int, default=300, help="steps of the natural gradient")
    parser.add_argument("--label", default="main", help="name of our results")
    parser.add_argument("--cache", type=pathlib.Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--jobs", type=int, default=2, help="processes, each on one core")
    return parser


if __name__ == "__main__":
    main()
