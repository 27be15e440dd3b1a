# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.scale``: measure what is missing, and print the tables.

Every measurement is a process and a file of its own, so that a run can be interrupted and resumed.
"""

import argparse
import importlib
import json
import pathlib
import subprocess
import sys
from types import ModuleType

from tqdm import tqdm

PARTS = ("sites", "parameters", "rows", "devices", "networks")
FOLDER = pathlib.Path("benchmarks/results/scale")


def main() -> None:
    """Run what is missing, and print the tables."""
    options = _parser().parse_args()
    if options.case:
        part, name = options.case
        print(json.dumps(_module(part).CASES[name]()))
        return
    todo = [] if options.table else [(p, name) for p in options.only for name in _module(p).CASES]
    todo = [(p, name) for p, name in todo if options.match in name and not _file(options.results, p, name).exists()]
    failed = [f"{p}, {name}" for p, name in tqdm(todo, desc="scale") if not _measure(options.results, p, name)]
    for part in options.only:
        print(f"\n### {part.capitalize()}\n\n{_module(part).table(_rows(options.results, part))}")
    if failed:
        raise SystemExit("\n".join(["These measurements failed:", *failed]))


def _module(part: str) -> ModuleType:
    return importlib.import_module(f"benchmarks.scale.{part}")


def _file(folder: pathlib.Path, part: str, name: str) -> pathlib.Path:
    return folder / part / f"{name.replace(' ', '_').replace('/', '-')}.json"


def _rows(folder: pathlib.Path, part: str) -> dict[str, dict]:
    """The stored rows of a part, in the order of its cases."""
    files = {name: _file(folder, part, name) for name in _module(part).CASES}
    return {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}


def _measure(folder: pathlib.Path, part: str, name: str) -> bool:
    """Measure one case in a new process, and keep its row; whether that succeeded."""
    command = [sys.executable, "-m", "benchmarks.scale", "--case", part, name]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        tqdm.write(f"{part}, {name}: {done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'killed'}")
        return False
    file = _file(folder, part, name)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(done.stdout.strip().splitlines()[-1] + "\n")
    return True


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--only", nargs="*", default=list(PARTS), choices=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--match", default="", help="only cases whose name contains this text")
    parser.add_argument("--table", action="store_true", help="print the tables of the stored rows, and measure nothing")
    parser.add_argument("--results", type=pathlib.Path, default=FOLDER, help="folder of the rows")
    parser.add_argument("--case", nargs=2, metavar=("PART", "NAME"), help="measure one case here, and print its row")
    return parser


if __name__ == "__main__":
    main()
