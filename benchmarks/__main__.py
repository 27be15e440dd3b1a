# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks`` writes all tables, in float32 and float64, to ``docs/benchmarks/races.md`` (half an hour).

One table is printed by ``python -m benchmarks PART``, where PART is ``race eight``, ``race gaussian``,
``race logistic`` or ``exact``; ``--x64`` is double precision.
"""

import argparse
import os
import pathlib
import platform
import subprocess
import sys

PARTS = ("exact", "race eight", "race gaussian", "race logistic")
OUTPUT = pathlib.Path("docs/benchmarks/races.md")


def main() -> None:
    """Run one part, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"one of: {', '.join(PARTS)}; default: all")
    parser.add_argument("--x64", action="store_true", help="double precision")
    options = parser.parse_args()
    if options.part:
        print(run(" ".join(options.part), options.x64))
    else:
        everything()


def run(part: str, x64: bool) -> str:
    """The tables of one part."""
    if part not in PARTS:
        raise SystemExit(f"`{part}`: expected one of {', '.join(PARTS)}")
    import jax

    jax.config.update("jax_enable_x64", x64)
    jax.config.update("jax_enable_compilation_cache", False)
    from . import cases, exact, race

    kind, _, case = part.partition(" ")
    if kind == "race":
        return race.report(cases.RACES[case]())
    return exact.report()


def everything() -> None:
    """Write all parts in both precisions to the document, each in its own process."""
    tables = []
    for flags in ([], ["--x64"]):
        for part in PARTS:
            print(f"… {part} {' '.join(flags)}", flush=True)
            command = [sys.executable, "-m", "benchmarks", *part.split(), *flags]
            tables.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            OUTPUT.write_text("\n".join([header(), *tables]))  # after each part, because a later one may fail
    print(f"wrote {OUTPUT}")


def header() -> str:
    """Title, versions and settings."""
    import importlib.metadata as meta

    versions = ", ".join(f"{name} {meta.version(name)}" for name in ("jax", "numpyro", "optax"))
    return (
        "# Races against Adam\n\n"
        "Written by `python -m benchmarks`; the heads of `benchmarks/*.py` say how each figure is measured.\n"
        f"Python {platform.python_version()}, {versions}, {os.cpu_count()} CPU cores. 5 seeds, 8 particles, "
        "default options.\n"
    )


if __name__ == "__main__":
    main()
