# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Table of all methods, by the name that results are stored under.

A method that does not use NumPyro's ``SVI`` is a module with ``fit(f, loc, scale, key, …) -> Path``: f is −log p of the
unconstrained z, and ``loc`` (d,) and ``scale`` describe the initial Gaussian.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from . import adam_estimators, svi
from .guides import INIT_SCALE
from .svi import Attempt, Problem

Options = dict[str, Any]


class Method(NamedTuple):
    """One method: ``run`` fits the problem for every setting and seed.

    ``families`` are the families of Gaussians that it fits. Methods other than the natural gradient run in float64.
    """

    title: str
    families: tuple[str, ...]
    run: Callable[[Problem], Iterator[Attempt]]
    precisions: tuple[str, ...] = ("x64",)


def _fitted(module: str, function: str = "fit", **settings: Options) -> Callable[[Problem], Iterator[Attempt]]:
    """A baseline with its settings, imported when it runs, because some need further packages."""

    def run(problem: Problem) -> Iterator[Attempt]:
        fit = getattr(importlib.import_module(f".{module}", __package__), function)
        for setting, options in (settings or {"": {}}).items():
            for seed in range(len(problem.starts)):
                loc, key = svi.start(problem, seed)
                yield Attempt(setting, seed, fit(problem.target.potential, loc, INIT_SCALE, key, **options))

    return run


#: The rate that the package's documentation uses, and those around it.
_RATES: dict[str, Options] = {f"rate {rate:g}": {"rate": rate} for rate in (0.1, 0.01, 0.001)}

ALL = ("full", "mean field", "low rank")

METHODS = {
    "natural_gradient": Method("NaturalGradient()", ALL, svi.natural_gradient, ("x64", "float32")),
    "reference": Method("64 particles", ALL, svi.reference),
    "adam": Method("Adam", ALL, svi.adam),
    "adam_path": Method(
        "Adam, path gradient", ALL[:2], adam_estimators.runner(adam_estimators.path_gradient, products=False)
    ),
    "adam_price": Method(
        "Adam, Price's gradient", ALL[:2], adam_estimators.runner(adam_estimators.price_gradient, products=True)
    ),
    "batch_and_match": Method("batch and match", ("full",), _fitted("batch_and_match")),
    "deterministic_advi": Method("deterministic ADVI", ("full",), _fitted("deterministic_advi")),
    "deterministic_mean_field": Method(
        "deterministic ADVI", ("mean field",), _fitted("deterministic_advi", "mean_field")
    ),
    "blackjax_fullrank": Method("BlackJAX fullrank_vi", ("full",), _fitted("blackjax_vi", "fullrank_vi", **_RATES)),
    "blackjax_meanfield": Method(
        "BlackJAX meanfield_vi", ("mean field",), _fitted("blackjax_vi", "meanfield_vi", **_RATES)
    ),
    "pathfinder": Method("multi-path Pathfinder, best path", ("full",), _fitted("blackjax_vi", "pathfinder")),
    "pathfinder_resampled": Method(
        "multi-path Pathfinder, resampled", ("full",), _fitted("blackjax_vi", "pathfinder_resampled")
    ),
}
