# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.nuts --checkout PATH``: gradients of NUTS to 400 effective draws, with and without a fit.

    default: NUTS(model), 1000 steps of warm-up        fit: 50 steps, then NUTS from ``to_nuts``

Both run four chains in double precision. A run is charged with all gradients up to the first number of draws at which
every unconstrained latent has a bulk ESS of 400 and an R-hat below 1.01: warm-up, draws, and the fit. Each posterior is
a file of its own, written after each run, so that the benchmark can be interrupted and resumed; ``--seeds`` adds runs.
"""

import argparse
import json
import pathlib
import re
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from numpyro.infer import MCMC, NUTS, SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
from tqdm.auto import tqdm

from numpyro_natgrad import NaturalGradient, to_nuts
from numpyro_natgrad.diagnostics.nuts import START
from numpyro_natgrad.options import RuleConstants

from .posteriordb.checkout import arguments
from .posteriordb.models import MODELS, named
from .starts.cases import PROBLEMS

FOLDER = pathlib.Path("benchmarks/results/nuts")
OUTPUT = pathlib.Path("docs/benchmarks/nuts.md")
HEADING = "## The table\n\n"
#: Problems of ``benchmarks.starts``, one of each kind, on which chains of NUTS agree.
STARTS = (
    *("negative_binomial", "item_response", "counts_by_region", "logistic_growth"),
    *("weibull_censored", "stochastic_volatility", "student_regression", "laplace_shrinkage"),
)
POSTERIORS = (*(name.partition("-")[2] for name in MODELS), *STARTS)
CHAINS, WARMUP, STEPS, PARTICLES = 4, 1000, 50, 8
ESS, R_HAT = 400, 1.01
#: Draws of each chain between two looks at ESS and R-hat; draws that are computed in one call, and at most.
LOOK, DRAWS, MOST = 25, 1000, 8000
#: Guides of the fits, by the names of the methods.
GUIDES = {"full": AutoMultivariateNormal, "mean-field": AutoNormal}
METHODS = ("default", *GUIDES)

Run = dict[str, Any]
#: The runs of a posterior, by method and by seed.
Stored = dict[str, dict[str, Run]]
Model = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.nuts", description=__doc__)
    parser.add_argument("--checkout", type=pathlib.Path, help="checkout of posteriordb")
    parser.add_argument("--only", nargs="*", default=list(POSTERIORS), choices=POSTERIORS, metavar="NAME")
    parser.add_argument("--methods", nargs="*", default=["default", "full"], choices=METHODS)
    parser.add_argument("--seeds", type=int, default=2, help="runs of each method; the first seed is 0")
    parser.add_argument("--cache", type=pathlib.Path, default=FOLDER, help="folder of the results")
    parser.add_argument("--table", action="store_true", help="print the table of the stored results, and run nothing")
    parser.add_argument("--document", action="store_true", help=f"write the table to {OUTPUT}")
    options = parser.parse_args()
    if not options.table:
        run(options)
    text = table({name: read(options.cache, name) for name in options.only})
    print(text)
    if options.document:
        OUTPUT.write_text(OUTPUT.read_text().partition(HEADING)[0] + HEADING + text)


def run(options: argparse.Namespace) -> None:
    """The missing runs, with a progress bar."""
    jobs = [(s, name, method) for s in range(options.seeds) for name in options.only for method in options.methods]
    for seed, name, method in (bar := tqdm(jobs, unit="run")):
        bar.set_postfix_str(f"{name}, {method}, seed {seed}")
        if str(seed) in read(options.cache, name).get(method, {}):
            continue
        begin = time.perf_counter()
        try:
            with jax.enable_x64(True):
                found = measure(method, seed, *problem(name, options.checkout))
        except Exception:
            bar.write(f"{name}, {method}, seed {seed}:\n{traceback.format_exc()}")
            continue
        finally:
            jax.clear_caches()
        write(options.cache, name, method, seed, found | {"seconds": time.perf_counter() - begin})


def problem(name: str, checkout: pathlib.Path | None) -> Model:
    """A model with its arguments.

    :raises SystemExit: if the posterior is one of posteriordb, and there is no checkout.
    """
    if name in STARTS:
        model, args = PROBLEMS[name].make()
        return model, args, {}
    if checkout is None:
        raise SystemExit(
            "`--checkout`: expected the folder of a checkout of posteriordb. Clone https://github.com/stan-dev/posteriordb."
        )
    full = named(name)
    return MODELS[full].function, (), arguments(checkout, full)


def measure(method: str, seed: int, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Run:
    """Gradients of one method, and how its chains went."""
    keys = [jax.random.key(3 * seed + i) for i in range(3)]
    if method == "default":
        return sample(NUTS(model), keys[2], WARMUP, None, args, kwargs) | {"fit": 0}
    svi = SVI(model, GUIDES[method](model), NaturalGradient(), Trace_ELBO(PARTICLES))
    result = svi.run(keys[0], STEPS, *args, progress_bar=False, **kwargs)
    start = to_nuts(svi, result, keys[1], *args, num_chains=CHAINS, **kwargs)
    size = sum(x[0].size for x in start.init_params.values())
    response = START.response_draws * 2 * 2 * size if method == "mean-field" else 0
    report = svi.optim.report(svi, result.state, *args, **kwargs)
    fit = STEPS * step_gradients(report) + START.draws / 3 + 2 * response
    return sample(start.kernel, keys[2], start.num_warmup, start.init_params, args, kwargs) | {
        "fit": round(fit),
        "k_hat": float(start.k_hat),
        "latents": size,
    }


def step_gradients(report: str) -> float:
    """Gradients of a draw's log density in a step: one, two for each Hessian-vector product, a third for each trial."""
    products = re.search(r"(\d+) Hessian-vector products", report)
    return PARTICLES * (1 + 2 * (int(products[1]) if products else 0) + RuleConstants().radius_trials / 3)


def sample(
    kernel: NUTS, key: jax.Array, warmup: int, init_params: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Run:
    """Run chains until all latents have enough effective draws."""
    mcmc = MCMC(
        kernel,
        num_warmup=warmup,
        num_samples=DRAWS,
        num_chains=CHAINS,
        chain_method="vectorized",
        progress_bar=False,
    )
    mcmc.warmup(key, *args, extra_fields=("num_steps",), collect_warmup=True, init_params=init_params, **kwargs)
    names = sorted(mcmc.last_state.z)
    fields = ("num_steps", *(f"z.{name}" for name in names))  # unconstrained values
    spent = int(np.sum(mcmc.get_extra_fields()["num_steps"]))
    steps, z, diverging = (np.empty((CHAINS, 0)) for _ in range(3))
    while steps.shape[1] < MOST:
        mcmc.run(mcmc.last_state.rng_key, *args, extra_fields=fields, **kwargs)
        mcmc.post_warmup_state = mcmc.last_state
        more = mcmc.get_extra_fields(group_by_chain=True)
        flat = np.concatenate([np.reshape(more[f"z.{name}"], (CHAINS, DRAWS, -1)) for name in names], axis=2)
        z = np.concatenate([z, flat], axis=1) if z.size else flat
        steps = np.concatenate([steps, more["num_steps"]], axis=1)
        diverging = np.concatenate([diverging, more["diverging"]], axis=1)
        for end in looks(steps.shape[1] - DRAWS, steps.shape[1]):
            if reached(z[:, :end]):
                return _run(end, spent, steps, z, diverging) | {"reached": True}
    return _run(steps.shape[1], spent, steps, z, diverging) | {"reached": False}


def _run(end: int, spent: int, steps: np.ndarray, z: np.ndarray, diverging: np.ndarray) -> Run:
    ess, r_hat = diagnostics(z[:, :end])
    return {
        "warmup": spent,
        "draws": int(steps[:, :end].sum()),
        "length": end,
        "ess": ess,
        "r_hat": r_hat,
        "divergences": int(diverging[:, :end].sum()),
    }


def looks(begin: int, end: int) -> Iterator[int]:
    """Numbers of draws at which chains are examined: every 25, and every 100 after the first 1000."""
    step = LOOK if begin < DRAWS else 4 * LOOK
    yield from range(begin + step, end + 1, step)


def reached(z: np.ndarray) -> bool:
    """Whether every latent has enough effective draws, and its chains agree."""
    ess, r_hat = diagnostics(z)
    return ess >= ESS and r_hat < R_HAT


def diagnostics(z: np.ndarray) -> tuple[float, float]:
    """The least bulk ESS and the largest rank-normalised R-hat of the latents, ``(chains, draws, d)``, by ArviZ."""
    try:
        from arviz_stats.base import array_stats
    except ImportError:
        import arviz

        ess = [arviz.ess(z[:, :, i], method="bulk") for i in range(z.shape[2])]
        r_hat = [arviz.rhat(z[:, :, i], method="rank") for i in range(z.shape[2])]
    else:
        ess = array_stats.ess(z, chain_axis=0, draw_axis=1, method="bulk")
        r_hat = array_stats.rhat(z, chain_axis=0, draw_axis=1, method="rank")
    return float(np.min(ess)), float(np.max(r_hat))


def total(run: Run) -> float:
    """All gradients of a run; draws that were not enough are scaled to an ESS of 400."""
    draws = run["draws"] * (1 if run["reached"] else max(1.0, ESS / run["ess"]))
    return run["fit"] + run["warmup"] + draws


def table(stored: dict[str, Stored]) -> str:
    """Gradients of each method, in the mean of the seeds that both have, and their ratio to those of the default."""
    lines, summary = [], []
    for method in GUIDES:
        both = {n: _common(x.get("default", {}), x.get(method, {})) for n, x in stored.items()}
        rows = {name: runs for name, runs in both.items() if runs}
        if not rows:
            continue
        means = [ratio(runs) for runs in rows.values()]
        single = [ratio([pair]) for runs in rows.values() for pair in runs]
        summary.append(
            f"* `{GUIDES[method].__name__}`: {len(rows)} posteriors, {len(single)} pairs of runs; median ratio "
            f"{np.median(means):.2f}, largest {max(means):.2f} ({max(single):.2f} for a single pair), "
            f"{sum(x <= 1 / 3 for x in means)} at most 1/3."
        )
        lines += ["", f"With `{GUIDES[method].__name__}`:", "", f"| {' | '.join(HEAD)} |", "|" + " --- |" * len(HEAD)]
        lines += [_line(*row) for row in rows.items()]
    return "\n".join([*summary, *lines]) + "\n"


def ratio(runs: list[tuple[Run, Run]]) -> float:
    """Gradients with a fit, of all runs together, by those of the default."""
    default, warm = zip(*runs, strict=True)
    return sum(map(total, warm)) / sum(map(total, default))


def _common(default: dict[str, Run], warm: dict[str, Run]) -> list[tuple[Run, Run]]:
    return [(default[seed], warm[seed]) for seed in sorted(default.keys() & warm.keys(), key=int)]


HEAD = (
    *("posterior", "latents", "k-hat", "default: warm-up", "draws", "fit", "warm-up", "draws", "ratio", "by seed"),
    *("draws a chain, default", "fit", "divergences, default", "fit"),
)


def _line(name: str, runs: list[tuple[Run, Run]]) -> str:
    default, warm = zip(*runs, strict=True)
    mean = lambda runs, what: float(np.mean([x[what] for x in runs]))
    count = lambda runs, what: f"{mean(runs, what):,.0f}"
    whole = ratio(runs)
    length = lambda runs: f"{'' if all(x['reached'] for x in runs) else '> '}{mean(runs, 'length'):.0f}"
    cells = [
        *(f"`{name}`", str(warm[0]["latents"]), f"{mean(warm, 'k_hat'):.2f}"),
        *(count(default, "warmup"), count(default, "draws")),
        *(count(warm, "fit"), count(warm, "warmup"), count(warm, "draws")),
        f"**{whole:.2f}**" if whole > 1 / 3 else f"{whole:.2f}",
        " ".join(f"{ratio([pair]):.2f}" for pair in runs),
        *(length(default), length(warm), count(default, "divergences"), count(warm, "divergences")),
    ]
    return f"| {' | '.join(cells)} |"


def read(cache: pathlib.Path, name: str) -> Stored:
    """What is stored of a posterior."""
    path = cache / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def write(cache: pathlib.Path, name: str, method: str, seed: int, found: Run) -> None:
    """Store a run beside the others of its posterior."""
    cache.mkdir(parents=True, exist_ok=True)
    part, stored = cache / f"{name}.part", read(cache, name)
    stored.setdefault(method, {})[str(seed)] = found
    part.write_text(json.dumps(stored, indent=1))
    part.replace(cache / f"{name}.json")


if __name__ == "__main__":
    main()
