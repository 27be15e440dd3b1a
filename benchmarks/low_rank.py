# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Low-rank Gaussian guides with 10,000 latents, r = 10: steps and seconds to the ELBO of 2000 steps of Adam.

    python -m benchmarks.low_rank [case ...]

Default options, float32, 8 particles. Adam runs at five rates, each constant and with a cosine decay, from one start.
The setting that ends best is then run from all three starts, and its final ELBO is the target. Medians over the starts.
ELBOs (nats) use 400 draws common to all fits, at checkpoints 20 % apart. Seconds are those of the compiled steps.
"""

import argparse
from typing import Any

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints
from numpyro.infer.autoguide import AutoLowRankMultivariateNormal

from numpyro_natgrad import NaturalGradient

from .flows import Case, Fit, adam_over, fits, named, settings

LATENTS, RANK = 10_000, 10
RATES = (0.1, 0.03, 0.01, 0.003, 0.001)
ADAM_STEPS, NATURAL_STEPS = 2000, 50
HEADS = (
    *("case", "Adam's rate", "Adam's ELBO", "Adam's steps", "natural-gradient steps", "ratio"),
    *("Adam's seconds", "natural-gradient seconds", "natural-gradient ELBO after 20 steps"),
    *(f"natural-gradient ELBO after {NATURAL_STEPS} steps", "natural-gradient ms per step"),
)


def gaussian() -> Any:
    """N(m, D(I + AAᵀ)D): scales over two decades, ten common directions of 3 to 300 times the variance.

    The log evidence is 0 and the family contains the target: the ELBO is −KL(q ‖ target).
    """
    rng = np.random.default_rng(0)
    scale = 10 ** rng.uniform(-1, 1, LATENTS)
    loc = 3 * scale * rng.normal(size=LATENTS)
    basis = np.linalg.qr(rng.normal(size=(LATENTS, RANK)))[0]
    variance = np.geomspace(3, 300, RANK)
    constants = -np.log(scale).sum() - 0.5 * np.log1p(variance).sum() - 0.5 * LATENTS * np.log(2 * np.pi)
    root = basis * np.sqrt(variance / (1 + variance))  # (I + AAᵀ)⁻¹ = I − root rootᵀ
    m, s, b = (jnp.asarray(x, jnp.float32) for x in (loc, scale, root))

    def model() -> None:
        z = numpyro.sample("z", dist.ImproperUniform(constraints.real_vector, (), (LATENTS,)))
        u = (z - m) / s
        numpyro.factor("target", constants - 0.5 * jnp.sum(u**2) + 0.5 * jnp.sum((u @ b) ** 2))

    return model


def ratings() -> Any:
    """A many-facet Rasch model (Linacre 1989): 9879 persons answer three of 100 items, judged by 20 raters.

    logit P(success) = ability − difficulty − severity. No answer changes if a constant is added to the abilities, their
    mean and the difficulties, or moved from the difficulties to the severities. Only the wide priors inform these two
    directions, which are common to many latents and ten times as uncertain as single latents.
    """
    persons, items, raters, answers = LATENTS - 121, 100, 20, 3
    rng = np.random.default_rng(1)
    item = np.argsort(rng.random((persons, items)), axis=1)[:, :answers]
    rater = rng.integers(0, raters, (persons, answers))
    truth = 1.5 * rng.normal(size=(persons, 1)) - rng.normal(size=items)[item] - rng.normal(size=raters)[rater]
    success = jnp.asarray(rng.random(truth.shape) < 1 / (1 + np.exp(-truth)), jnp.float32)

    def model() -> None:
        mean = numpyro.sample("mean", dist.Normal(0, 10))
        difficulty = numpyro.sample("difficulty", dist.Normal(0, 10).expand([items]).to_event(1))
        severity = numpyro.sample("severity", dist.Normal(0, 10).expand([raters]).to_event(1))
        ability = numpyro.sample("ability", dist.Normal(mean, 1.5).expand([persons]).to_event(1))
        logits = ability[:, None] - difficulty[item] - severity[rater]
        numpyro.sample("success", dist.Bernoulli(logits=logits).to_event(2), obs=success)

    return model


CASES = {"Gaussian": gaussian, "many-facet Rasch": ratings}


def row(name: str) -> str:
    """One line of the table."""
    case = Case(CASES[name](), lambda model: AutoLowRankMultivariateNormal(model, rank=RANK), draws=400)
    make, tried = adam_over(ADAM_STEPS), settings(RATES)
    best = tried[int(np.argmax([f.final for f in fits(case, make, tried, ADAM_STEPS, seeds=1)]))]
    adam = fits(case, make, (best,), ADAM_STEPS)[0]
    natural = fits(case, lambda _: NaturalGradient(), (1.0,), NATURAL_STEPS, first=1)[0]
    return line(name, named(best), adam, natural)


def line(name: str, setting: str, adam: Fit, natural: Fit) -> str:
    """One line from the fits of both optimizers."""
    ours, theirs = natural.reached(adam.final), adam.reached(adam.final)
    seconds = (theirs * adam.milliseconds / 1e3, ours * natural.milliseconds / 1e3)
    cells = [
        *(name, setting, f"{adam.final:.1f}", f"{theirs:.0f}", f"{ours:.0f}", f"{theirs / ours:.0f}"),
        *(f"{x:.1f}" for x in seconds),
        *(f"{np.median(natural.elbo[:, natural.marks >= n][:, 0]):.1f}" for n in (20, NATURAL_STEPS)),
        f"{natural.milliseconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Print the table of the named cases, or of all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.low_rank", description=__doc__)
    parser.add_argument("case", nargs="*", help=f"some of: {'; '.join(CASES)}; default: all")
    chosen = parser.parse_args().case or list(CASES)
    print(f"| {' | '.join(HEADS)} |\n{'| --- ' * len(HEADS)}|", flush=True)
    for name in chosen:
        print(row(name), flush=True)


if __name__ == "__main__":
    main()
