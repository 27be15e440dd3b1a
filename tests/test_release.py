# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a release promises: one version, stated dependencies that are tested, and types for the programs of users."""

import pathlib
import re
import tomllib

import pytest

import numpyro_natgrad

ROOT = pathlib.Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _bounds(requirements: list[str]) -> dict[str, str]:
    """Lower bounds by name, without extras and environment markers."""
    return dict(re.match(r"([\w-]+) ?>=([\d.]+)", line).groups() for line in requirements if ">=" in line)


def test_the_version_is_written_once_and_the_recipe_follows():
    recipe = (ROOT / "docs" / "upstream" / "recipe.yaml").read_text()
    assert PROJECT["dynamic"] == ["version"]
    assert f'version: "{numpyro_natgrad.__version__}"' in recipe
    assert f"[{numpyro_natgrad.__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_the_recipe_needs_what_the_project_needs():
    recipe = (ROOT / "docs" / "upstream" / "recipe.yaml").read_text()
    run = re.search(r"  run:\n((?:    - .*\n)+)", recipe)[1].replace("    - ", "").splitlines()
    assert _bounds(run) == {"python": PROJECT["requires-python"].removeprefix(">="), **_bounds(PROJECT["dependencies"])}


def test_the_oldest_versions_that_are_tested_are_the_stated_lower_bounds():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "oldest.txt").read_text(), re.MULTILINE))
    extras = PROJECT["optional-dependencies"]
    stated = _bounds([*PROJECT["dependencies"], *extras["examples"], *extras["test"]])
    assert pins.keys() == stated.keys()
    for name, bound in stated.items():
        assert re.fullmatch(rf"{re.escape(bound)}(\.0)*", pins[name]), name


def test_a_source_archive_has_all_of_this():
    """These tests also run from an unpacked source archive."""
    files = "LICENSE README.md CHANGELOG.md CITATION.cff CODE_OF_CONDUCT.md CONTRIBUTING.md SECURITY.md pyproject.toml"
    folders = "numpyro_natgrad/py.typed tests/conftest.py examples/_common.py benchmarks/__main__.py docs/conf.py"
    assert [name for name in f"{files} {folders}".split() if not (ROOT / name).is_file()] == []
    assert sorted((ROOT / "numpyro_natgrad").glob("*/*/solvers.py"))


PROGRAM = """
import jax
import numpyro
import numpyro.distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoNormal

from numpyro_natgrad import FitResult, NaturalGradient, Verdict, fit, verdict


def model(y: jax.Array) -> None:
    z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    numpyro.sample("y", dist.Normal(z, 1.0), obs=y)


svi = SVI(model, AutoNormal(model), NaturalGradient(max_kl=1.0), Trace_ELBO())
result: FitResult = fit(svi, jax.random.key(0), jax.numpy.ones(3), num_starts=8)
judged: Verdict = verdict(svi, result, jax.random.key(1), jax.numpy.ones(3))
k_hat: float = judged.k_hat
arrived: bool = result.converged
NaturalGradient(learning_rate=0.1)  # call-arg
fit(svi, jax.random.key(0), num_starts="8")  # arg-type
judged.khat  # attr-defined
text: str = result.converged  # assignment
"""


@pytest.mark.slow
def test_a_users_program_is_checked_against_the_types_of_the_package(tmp_path):
    """mypy finds the four mistakes and nothing else."""
    mypy = pytest.importorskip("mypy.api")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    settings = tmp_path / "mypy.ini"
    settings.write_text("[mypy]\n[mypy-numpyro.*,optax.*]\nignore_missing_imports = True\n")
    output, errors, _ = mypy.run([str(program), "--strict", f"--config-file={settings}", f"--cache-dir={tmp_path}"])
    assert not errors
    expected = [(i, c) for i, line in enumerate(PROGRAM.split("\n"), 1) for c in re.findall(r"# ([\w-]+)$", line)]
    found = re.findall(r"program\.py:(\d+): error: .*\[([\w-]+)\]$", output, re.MULTILINE)
    assert [(int(line), code) for line, code in found] == expected, output
