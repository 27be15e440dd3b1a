# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.posteriordb --checkout PATH``: run the missing fits of the whole benchmark.

``reference`` samples the posteriors for which no reference draws are published, and has to run first. ``table`` writes
posteriordb.md in docs/benchmarks, and ``figures`` its figures, from the stored results. ``ablation`` removes one
ingredient of the step-size rule at a time (ablation.md), and ``compiling`` times XLA (compiling.md). Models and methods
are chosen by their names, or parts of them, separated by commas.
"""

import argparse
import itertools
import pathlib

from . import run
from .models import MODELS, named

RESULTS = pathlib.Path("benchmarks/results")
COMMANDS = ("run", "one", "reference", "table", "figures", "ablation", "compiling")


def main() -> None:
    """One command."""
    options = _parser().parse_args()
    plan = run.Plan(
        options.checkout, options.results, options.seeds, options.draws, (options.steps, options.adam_steps)
    )
    if options.command in ("table", "figures"):
        _document(options.command, options.results)
    elif options.checkout is None:
        raise SystemExit(
            "`--checkout`: expected the folder of a checkout of posteriordb. Clone https://github.com/stan-dev/posteriordb."
        )
    elif options.command in ("ablation", "compiling"):
        _study(options)
    elif options.command == "reference":
        _reference(plan, _models(options))
    elif options.command == "one":
        for job in jobs(options):
            run.run_here(plan, job)
    elif failed := run.run(plan, jobs(options)):
        raise SystemExit("\n".join(["These jobs failed:", *map(str, failed)]))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.posteriordb", description=__doc__)
    parser.add_argument("command", nargs="?", default="run", choices=COMMANDS)
    parser.add_argument("--checkout", type=pathlib.Path, help="checkout of posteriordb")
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--models", default=",".join(MODELS), help="posteriors")
    parser.add_argument("--guides", default="", help="guides; all if left out")
    parser.add_argument("--methods", default="", help="methods; all if left out")
    parser.add_argument("--precisions", default=",".join(run.PRECISIONS), help="x64, float32")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--draws", type=int, default=20_000, help="most draws to score a Gaussian on")
    parser.add_argument("--steps", type=int, default=1000, help="steps of the natural gradient")
    parser.add_argument("--adam-steps", type=int, default=5000, help="steps of Adam")
    return parser


def jobs(options: argparse.Namespace) -> list[run.Job]:
    """Every chosen model, guide and precision, with the methods that fit the guide's family."""
    from .guides import GUIDES
    from .methods import METHODS

    guides, methods = _chosen(options.guides, GUIDES), _chosen(options.methods, METHODS)
    precisions = _chosen(options.precisions, dict.fromkeys(run.PRECISIONS))
    able = {g: [m for m in methods if GUIDES[g].family in METHODS[m].families] for g in guides}
    return [
        run.Job(model, guide, precision, tuple(m for m in able[guide] if precision in METHODS[m].precisions))
        for model, guide, precision in itertools.product(_models(options), guides, precisions)
    ]


def _models(options: argparse.Namespace) -> list[str]:
    return [named(name) for name in options.models.split(",")]


def _chosen(names: str, table: dict) -> list[str]:
    chosen = [name for name in names.split(",") if name] or list(table)
    if unknown := set(chosen) - set(table):
        raise SystemExit(f"{', '.join(sorted(unknown))}: expected some of {', '.join(table)}.")
    return chosen


def _reference(plan: run.Plan, models: list[str]) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    from .reference import draw

    for model in models:
        print(draw(plan.checkout, plan.results, model), flush=True)


def _study(options: argparse.Namespace) -> None:
    import jax

    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_enable_compilation_cache", False)
    from . import ablation, compiling

    if options.command == "ablation":
        print(ablation.write(options.checkout, options.results))
    else:
        print(compiling.write(options.checkout, options.results, _models(options)))


def _document(command: str, results: pathlib.Path) -> None:
    from . import figures, table

    print((table.write if command == "table" else figures.draw)(results))


if __name__ == "__main__":
    main()
