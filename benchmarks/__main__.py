# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks``: all tables in float32 and float64, written to ``docs/benchmarks.md`` (half an hour).

``python -m benchmarks race eight`` (or ``gaussian``, ``logistic``), ``exact`` or ``cost``, with ``--x64`` for double
precision, prints one.
"""

import argparse
import os
import pathlib
import platform
import subprocess
import sys

PARTS = ("exact", "race eight", "race gaussian", "race logistic", "cost")
OUTPUT = pathlib.Path("docs/benchmarks.md")


def main() -> None:
    """Run one part, or all of them in processes of their own."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"one of: {', '.join(PARTS)}; all if left out")
    parser.add_argument("--x64", action="store_true", help="double precision")
    options = parser.parse_args()
    if options.part:
        print(run(" ".join(options.part), options.x64))
    else:
        everything()


def run(part: str, x64: bool) -> str:
    """One part's tables."""
    if part not in PARTS:
        raise SystemExit(f"`{part}`: expected one of {', '.join(PARTS)}")
    import jax

    jax.config.update("jax_enable_x64", x64)
    jax.config.update("jax_enable_compilation_cache", False)
    from . import cases, cost, exact, race

    kind, _, case = part.partition(" ")
    if kind == "race":
        return race.report(cases.RACES[case]())
    return cost.report() if kind == "cost" else exact.report()


def everything() -> None:
    """All parts in both precisions, each in a process of its own, into one document."""
    tables = []
    for flags in ([], ["--x64"]):
        for part in PARTS[:-1] if flags else PARTS:  # costs are compared in the default precision
            print(f"… {part} {' '.join(flags)}", flush=True)
            command = [sys.executable, "-m", "benchmarks", *part.split(), *flags]
            tables.append(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            OUTPUT.write_text("\n".join([header(), *tables]))  # part by part: a later one may fail
    print(f"wrote {OUTPUT}")


def header() -> str:
    """What was run, and on what."""
    import importlib.metadata as meta

    versions = ", ".join(f"{name} {meta.version(name)}" for name in ("jax", "numpyro", "optax"))
    return (
        "# Benchmarks\n\nWritten by `python -m benchmarks`; the heads of `benchmarks/*.py` say how each figure is "
        f"measured.\nPython {platform.python_version()}, {versions}, {os.cpu_count()} CPU cores. 5 seeds, 8 particles, "
        "default options.\n"
    )


if __name__ == "__main__":
    main()
