# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
A Bayesian network with hidden entries
======================================

Six yes-or-no risk factors of heart disease in 1841 men. The tables of probabilities are learned, although the ratio of
lipoproteins is hidden for every third man: ``TraceEnum_ELBO`` sums over its two values, as NumPyro's NUTS does.

With uniform priors on the tables, a sum over all completions of the hidden entries gives the exact posterior, which the
fit is compared with. The parents of each factor are those of the largest marginal likelihood, among the factors before
it: family history, mental work, physical work, smoking, lipoproteins, pressure::

    mental → physical → smoking
    smoking, physical → lipids
    smoking, lipids → pressure

Run it with ``python examples/bayesian_network.py``.
"""

# sphinx_gallery_thumbnail_path = 'figures/bayesian_network.png'

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from _common import DRAWS, NATURAL, OTHERS, figure_path, khat, nuts, plain, save, summary
from jax import Array, random
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpyro import handlers
from numpyro.infer import SVI, Predictive, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal
from scipy.signal import convolve2d
from scipy.special import betaln

from numpyro_natgrad import NaturalGradient, fit

# %%
# Data
# ----
#
# Reiniš et al. (1981), *Bratislavské lekárske listy* 76, 137-150; ``reinis`` of the R package gRbase. The factors are
# smoking, strenuous mental work, strenuous physical work, a systolic pressure of 140 mm Hg or more, a ratio of beta to
# alpha lipoproteins of 3 or more, and a family history of heart disease.

# How many men; the first factor varies fastest, the last one slowest.
MEN = [
    44, 40, 112, 67, 129, 145, 12, 23, 35, 12, 80, 33, 109, 67, 7, 9, 23, 32, 70, 66, 50, 80, 7, 13, 24, 25, 73, 57,
    51, 63, 7, 16, 5, 7, 21, 9, 9, 17, 1, 4, 4, 3, 11, 8, 14, 17, 5, 2, 7, 3, 14, 14, 9, 16, 2, 3, 4, 0, 13, 11, 5, 14,
    4, 4,
]  # fmt: skip
FACTORS = ["smoking", "mental", "physical", "pressure", "lipids", "family"]
PARENTS: dict[str, tuple[str, ...]] = {
    "family": (),
    "mental": (),
    "physical": ("mental",),
    "smoking": ("physical",),
    "lipids": ("smoking", "physical"),
    "pressure": ("smoking", "lipids"),
}

Factors = dict[str, Any]  # name: values, shape (n,)


def read() -> tuple[Factors, Factors]:
    """The men whose lipoproteins are known, and those whose are hidden; every factor has shape `(n,)`, 0 or 1."""
    cells = np.indices((2,) * 6).reshape(6, -1)[::-1]
    rows = np.repeat(cells, MEN, axis=1)
    is_hidden = np.random.default_rng(0).permutation(rows.shape[1]) % 3 == 0
    known, hidden = (
        {name: jnp.asarray(row[mask]) for name, row in zip(FACTORS, rows, strict=True)}
        for mask in (~is_hidden, is_hidden)
    )
    return known, hidden


# %%
# The model
# ---------


def model(known: Factors, hidden: Factors) -> None:
    """Uniform probabilities of a yes for each combination of the parents, and men who are independent given these.

    :param known: factors of some men, each of shape `(n,)`.
    :param hidden: factors of others, without their lipoproteins.
    """
    tables = {}
    for name, parents in PARENTS.items():
        uniform = dist.Beta(1.0, 1.0).expand((2,) * len(parents)).to_event(len(parents))
        tables[name] = numpyro.sample(f"p_{name}", uniform)
    everybody = {name: jnp.append(known[name], hidden[name]) for name in hidden}
    yes = lambda name, men: dist.Bernoulli(tables[name][tuple(men[parent] for parent in PARENTS[name])])
    with numpyro.plate("man", len(everybody["family"])):
        for name in ("family", "mental", "physical", "smoking"):
            numpyro.sample(name, yes(name, everybody), obs=everybody[name])
    for kind, men in (("known", known), ("hidden", hidden)):
        with numpyro.plate(kind, len(men["family"])):
            infer = {"enumerate": "parallel"} if kind == "hidden" else {}
            lipids = numpyro.sample(f"lipids_{kind}", yes("lipids", men), obs=men.get("lipids"), infer=infer)
            numpyro.sample(f"pressure_{kind}", yes("pressure", men | {"lipids": lipids}), obs=men["pressure"])


# %%
# The exact posterior
# -------------------


class Exact(NamedTuple):
    """The posterior of the tables.

    :param mean: for each site.
    :param sd: for each site.
    :param log_evidence: nats.
    """

    mean: dict[str, np.ndarray]
    sd: dict[str, np.ndarray]
    log_evidence: float


def exact(known: Factors, hidden: Factors) -> Exact:
    """The posterior by a sum over the numbers of men in each group whose hidden entry is a yes.

    Given all entries the tables are independent Betas.

    :param known: factors of some men.
    :param hidden: factors of others, without their lipoproteins.
    """
    moments, log_evidence = {}, 0.0
    everybody = {name: np.append(known[name], hidden[name]) for name in hidden}
    for name in ("family", "mental", "physical", "smoking"):
        counts = count(everybody, (*PARENTS[name], name))
        log_evidence += betaln(1 + counts[..., 1], 1 + counts[..., 0]).sum()
        moments[f"p_{name}"] = beta_moments(counts[..., 1], counts[..., 0])
    both = []
    for smoking in (0, 1):
        own, others = ({name: x[men["smoking"] == smoking] for name, x in men.items()} for men in (known, hidden))
        lipids, pressure, logarithm = completions(
            count(own, ("physical", "lipids")),
            count(own, ("lipids", "pressure")),
            count(others, ("physical", "pressure")),
        )
        both.append((lipids, pressure))
        log_evidence += logarithm
    for place, name in enumerate(("p_lipids", "p_pressure")):
        moments[name] = np.stack([pair[place] for pair in both], axis=1)
    mean = {name: first for name, (first, _) in moments.items()}
    sd = {name: np.sqrt(second - first**2) for name, (first, second) in moments.items()}
    return Exact(mean, sd, log_evidence)


def count(men: Factors, names: tuple[str, ...]) -> np.ndarray:
    """Numbers of men for all values of some factors, shape `(2,) * len(names)`.

    :param men: their factors.
    :param names: of the factors, in the order of the axes.
    """
    table = np.zeros((2,) * len(names), int)
    np.add.at(table, tuple(np.asarray(men[name]) for name in names), 1)
    return table


def beta_moments(yes: np.ndarray, no: np.ndarray) -> np.ndarray:
    """The first and the second moment of a probability with a uniform prior; shape `(2, *yes.shape)`.

    :param yes: how often it happened.
    :param no: how often it did not.
    """
    mean = (1 + yes) / (2 + yes + no)
    return np.array([mean, mean * (2 + yes) / (3 + yes + no)])


def completions(lipids: np.ndarray, pressure: np.ndarray, hidden: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Moments of both tables at one value of smoking, shape `(2, 2)`, and the log evidence of both.

    Of the hidden men with physical work c and pressure d, k_cd have a yes. A completion has the weight::

        Π_c [B(1 + yes_c, 1 + no_c) Π_d (n_cd choose k_cd)]  Π_e B(1 + high_e, 1 + low_e)

    with the numbers of men in each row of the completed tables. The second product depends on sums of k over c alone,
    whose weights are a convolution.

    :param lipids: known men by physical work and lipoproteins, shape `(2, 2)`.
    :param pressure: known men by lipoproteins and pressure.
    :param hidden: hidden men by physical work and pressure.
    """
    ways, rows = [], []
    for (no, yes), n in zip(lipids, hidden, strict=True):
        k = np.indices(n + 1)
        binomial = np.sum([-betaln(1 + x, 1 + m - x) - np.log(m + 1) for x, m in zip(k, n, strict=True)], axis=0)
        completed = yes + k.sum(0), no + n.sum() - k.sum(0)
        ways.append(binomial + betaln(1 + completed[0], 1 + completed[1]))
        rows.append(beta_moments(*completed))
    low, high = np.indices(hidden.sum(0) + 1)
    tables = [
        (pressure[0, 1] + hidden[:, 1].sum() - high, pressure[0, 0] + hidden[:, 0].sum() - low),
        (pressure[1, 1] + high, pressure[1, 0] + low),
    ]
    last = sum(betaln(1 + yes, 1 + no) for yes, no in tables)
    offset = last.max() + sum(way.max() for way in ways)
    last, first, second = (np.exp(x - x.max()) for x in (last, *ways))
    weights = last * convolve2d(first, second)
    of_lipids = [
        [np.sum(last * convolve2d(first * moment, second)) for moment in rows[0]],
        [np.sum(last * convolve2d(first, second * moment)) for moment in rows[1]],
    ]
    of_pressure = [[np.sum(weights * moment) for moment in beta_moments(*table)] for table in tables]
    total = weights.sum()
    return np.transpose(of_lipids) / total, np.transpose(of_pressure) / total, float(offset + np.log(total))


# %%
# The fit
# -------


class Fitted(NamedTuple):
    """A fit of the tables.

    :param draws: of each table, shape `(DRAWS, ...)`.
    :param log_weights: log importance weights of the tables, nats; their mean is the ELBO.
    :param probability: of a yes for each hidden entry.
    """

    draws: dict[str, Array]
    log_weights: Array
    probability: np.ndarray


def run(known: Factors, hidden: Factors) -> Fitted:
    """Fit until less than 0.05 nats are to gain; draw tables from the guide, and hidden entries given the tables.

    :param known: factors of some men.
    :param hidden: factors of others, without their lipoproteins.
    """
    tables_alone = handlers.block(handlers.seed(model, random.key(0)), hide=["lipids_hidden"])
    guide = AutoMultivariateNormal(tables_alone)
    svi = SVI(model, guide, NaturalGradient(), TraceEnum_ELBO(num_particles=8))
    result = fit(svi, random.key(0), known, hidden, tolerance=0.05, progress_bar=False)
    print(f"{len(result.losses)} steps; {result.reason}")
    draws = guide.sample_posterior(random.key(1), result.params, sample_shape=(DRAWS,))
    weight = lambda key: -TraceEnum_ELBO().loss(key, result.params, model, guide, known, hidden)
    log_weights = jax.jit(lambda keys: jax.lax.map(weight, keys))(random.split(random.key(2), DRAWS))
    few = {name: table[:500] for name, table in draws.items()}
    predictive = Predictive(model, few, infer_discrete=True, return_sites=["lipids_hidden"])
    entries = predictive(random.key(3), known, hidden)["lipids_hidden"]
    return Fitted(draws, log_weights, np.asarray(entries.mean(0)))


def table(fitted: Fitted, by_nuts: dict[str, np.ndarray], truth: Exact) -> str:
    """One line for each probability: the exact posterior, and how far the guide and NUTS are from it.

    :param fitted: the fit.
    :param by_nuts: draws by NUTS.
    :param truth: the exact posterior.
    """
    head = f"{'':<40}{'exact':>15}{'guide: difference/sd, sd ratio':>33}{'NUTS':>14}"
    lines = [head]
    columns: list[tuple[int, dict[str, Any]]] = [(33, fitted.draws), (14, by_nuts)]
    for name, mean, sd, place in entries(truth):
        line = f"{label(name, place):<40}{f'{mean:.3f} ± {sd:.3f}':>15}"
        for width, draws in columns:
            one = np.asarray(draws[name][:, *place])
            line += f"{f'{(one.mean() - mean) / sd:.2f}, {one.std() / sd:.2f}':>{width}}"
        lines.append(line)
    return "\n".join(lines)


def entries(truth: Exact) -> Iterator[tuple[str, float, float, tuple[int, ...]]]:
    """Site, mean, standard deviation and place of each probability in its table.

    :param truth: the exact posterior.
    """
    for name, mean in truth.mean.items():
        for place in np.ndindex(mean.shape):
            yield name, float(mean[place]), float(truth.sd[name][place]), place


def label(site: str, place: tuple[int, ...]) -> str:
    """A probability as on paper.

    :param site: of the table.
    :param place: values of the parents.
    """
    name = site.removeprefix("p_")
    given = ", ".join(f"{'' if value else 'no '}{parent}" for parent, value in zip(PARENTS[name], place, strict=True))
    return f"{name} | {given}" if given else name


# %%
# The figure
# ----------

PLACES = {
    "mental": (0, 3),
    "family": (1, 3),
    "physical": (0, 2),
    "smoking": (-0.75, 1),
    "lipids": (0.75, 1),
    "pressure": (0, 0),
}


def draw_network(axis: Axes) -> None:
    """The factors, with an arrow from each parent.

    :param axis: where to draw.
    """
    box = {"boxstyle": "round", "fc": "white", "ec": "0.4"}
    for name, place in PLACES.items():
        hidden = {"ec": NATURAL, "fc": "#fbe9dd"} if name == "lipids" else {}
        axis.text(*place, name, ha="center", va="center", bbox=box | hidden, zorder=3)
        for parent in PARENTS[name]:
            shrink = 34 if place[1] == PLACES[parent][1] else 14  # boxes are wider than high
            arrow = {"arrowstyle": "-|>", "color": "0.4", "shrinkA": shrink, "shrinkB": shrink}
            axis.annotate("", place, PLACES[parent], arrowprops=arrow)
    axis.set(xlim=(-1.3, 1.5), ylim=(-0.4, 3.4), title="lipids: hidden for 1 of 3")
    axis.axis("off")


def draw_tables(axis: Axes, fitted: Fitted, truth: Exact) -> None:
    """Probabilities with 90 % intervals of the guide, and the exact ones.

    :param axis: where to draw.
    :param fitted: the fit.
    :param truth: the exact posterior.
    """
    names = []
    for number, (name, mean, sd, place) in enumerate(entries(truth)):
        draws = np.asarray(fitted.draws[name][:, *place])
        exact_look: dict[str, Any] = {"color": "black", "fmt": "|", "ms": 8, "lw": 1.2, "label": "exact"}
        axis.errorbar(mean, number + 0.18, xerr=1.645 * sd, **exact_look)
        low, high = np.quantile(draws, [0.05, 0.95])
        xerr = [[draws.mean() - low], [high - draws.mean()]]
        axis.errorbar(draws.mean(), number - 0.18, xerr=xerr, color=NATURAL, fmt="o", ms=4, label="guide")
        names.append(label(name, place))
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set(xlabel="probability of a yes", title="tables, 90 % intervals")
    handles, labels = axis.get_legend_handles_labels()
    axis.legend(handles[:2], labels[:2], frameon=False, loc="lower left")
    plain(axis)


def draw_hidden(axis: Axes, fitted: Fitted, hidden: Factors, truth: Array) -> None:
    """Probabilities of hidden entries beside the share of a yes, for groups of men who differ in a parent or a child.

    :param axis: where to draw.
    :param fitted: the fit.
    :param hidden: factors of the men.
    :param truth: what was hidden, shape `(n,)`.
    """
    groups = 4 * hidden["smoking"] + 2 * hidden["physical"] + hidden["pressure"]
    for group in range(8):
        own = np.asarray(groups == group)
        share, expected = np.asarray(truth)[own].mean(), fitted.probability[own].mean()
        error = 1.645 * np.sqrt(expected * (1 - expected) / own.sum())
        axis.errorbar(expected, share, yerr=error, color=OTHERS[0], fmt="o", ms=5)
    axis.axline((0.4, 0.4), slope=1, color="0.6", lw=1)
    axis.set(xlabel="probability by the network", ylabel="share in the hidden data", title="hidden entries, 8 groups")
    plain(axis)


def picture(fitted: Fitted, exactly: Exact, hidden: Factors, truth: Array) -> Figure:
    """The network, its tables, and its predictions of what was hidden.

    :param fitted: the fit.
    :param exactly: the exact posterior.
    :param hidden: factors of the men with a hidden entry.
    :param truth: what was hidden.
    """
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.6), width_ratios=[1, 1.4, 1.2], layout="constrained")
    draw_network(axes[0])
    draw_tables(axes[1], fitted, exactly)
    draw_hidden(axes[2], fitted, hidden, truth)
    return figure


def main() -> None:
    """Fit, compare with the exact posterior and with NUTS, draw."""
    path = figure_path("A Bayesian network.", "bayesian_network.png")
    known, hidden = read()
    truth = hidden.pop("lipids")
    fitted, exactly = run(known, hidden), exact(known, hidden)
    print(f"\n{summary(fitted.draws)}\n\n{table(fitted, nuts(model, known, hidden), exactly)}\n")
    error = fitted.log_weights.std() / DRAWS**0.5
    print(f"ELBO {fitted.log_weights.mean():.3f} ± {error:.3f}, exact log evidence {exactly.log_evidence:.3f} nats")
    print(f"k-hat {khat(fitted.log_weights):.2f}")
    save(picture(fitted, exactly, hidden, truth), path)


if __name__ == "__main__":
    main()
