# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.cold --checkout PATH``: run what is missing of the benchmark, and print its table.

Every measurement is a new process and a file of its own, so that a run can be interrupted and resumed. ``--python``
names the environment, by the version of Python if left out. ``--rivals`` measures other packages as well.
"""

import argparse
import pathlib
import platform

from . import document
from .jobs import GUIDES, LINES, NO_GUIDE, RIVALS, TENTH, TENTH_ROUNDS, Cell, cells, chosen
from .results import FOLDER, Store
from .run import Plan, run


def main() -> None:
    """Run what is missing, and print the table."""
    options = _parser().parse_args()
    store = Store(options.results, options.python)
    posteriors = chosen(options.only or (TENTH if options.tenth else []))
    failed = []
    if not options.table:
        if options.checkout is None:
            raise SystemExit(
                "`--checkout`: expected the folder of a checkout of posteriordb. Clone "
                "https://github.com/stan-dev/posteriordb."
            )
        turns = min(options.rounds, TENTH_ROUNDS) if options.tenth else options.rounds
        failed = run(
            Plan(store, options.checkout, tuple(options.lines), turns), list(cells(posteriors, options.guides))
        )
        if options.rivals:
            failed += _rivals(Plan(store, options.checkout, (), turns), posteriors)
    print(document.environment(store, options.clock))
    if options.document:
        print(document.write(options.results, options.clock))
    if failed:
        raise SystemExit("\n".join(["These measurements failed:", *failed]))


def _rivals(plan: Plan, posteriors: list[str]) -> list[str]:
    """Run each rival on the posteriors that it has a model of."""
    failed = []
    for lines, able in RIVALS.items():
        wanted = [Cell(posterior, NO_GUIDE) for posterior in chosen(able) if posterior in posteriors]
        failed += run(plan._replace(lines=lines), wanted)
    return failed


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cold", description=__doc__)
    parser.add_argument("--checkout", type=pathlib.Path, help="checkout of posteriordb")
    parser.add_argument(
        "--python", default=".".join(platform.python_version_tuple()[:2]), help="name of this environment"
    )
    parser.add_argument("--only", nargs="*", default=[], metavar="NAME", help="posteriors, or parts of their names")
    parser.add_argument("--guides", nargs="*", default=list(GUIDES), choices=GUIDES)
    parser.add_argument("--lines", nargs="*", default=list(LINES), choices=LINES, help="lines of the table")
    parser.add_argument("--rounds", type=int, default=5, help="measurements of each line")
    parser.add_argument("--tenth", action="store_true", help="a representative tenth")
    parser.add_argument("--rivals", action="store_true", help="measure PyMC, BlackJAX and glmmTMB as well")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results, and run nothing")
    parser.add_argument("--document", action="store_true", help=f"write all tables to {document.OUTPUT}")
    parser.add_argument("--clock", default="seconds", choices=("seconds", "cpu"), help="what the tables compare")
    parser.add_argument("--results", type=pathlib.Path, default=FOLDER, help="folder of the results")
    return parser


if __name__ == "__main__":
    main()
