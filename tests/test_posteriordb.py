# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The benchmark on posteriordb reads its data, computes its densities, its scores and its conclusions correctly.

No checkout is needed: the tests write small ones.
"""

import itertools
import json
import zipfile
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from scipy import special, stats

from benchmarks.posteriordb import ablation, checkout, comparison, compiling, measure, results, run
from benchmarks.posteriordb.guides import GUIDES
from benchmarks.posteriordb.models import MODELS, named
from benchmarks.posteriordb.target import Target, starts, target
from numpyro_natgrad import options

SCHOOLS = "eight_schools-eight_schools_noncentered"
RNG = np.random.default_rng(0)
DATA = {
    SCHOOLS: {"J": 3, "y": [28.0, 8.0, -3.0], "sigma": [15.0, 10.0, 16.0]},
    "dogs-dogs": {"n_dogs": 2, "n_trials": 4, "y": [[0, 0, 1, 0], [1, 0, 1, 1]]},
    "garch-garch11": {"T": 5, "y": [0.3, -1.2, 2.0, 0.1, -0.4], "sigma1": 0.5},
    "kidiq-kidscore_interaction": {
        "N": 3, "kid_score": [65, 98, 85], "mom_hs": [1, 0, 1], "mom_iq": [121.0, 89.0, 115.0]
    },
    "radon_mn-radon_hierarchical_intercept_noncentered": {
        "N": 3, "J": 2, "log_radon": [0.8, 0.1, 1.2], "log_uppm": [-0.7, -0.7, 0.3], "floor_measure": [1, 0, 0],
        "county_idx": [1, 1, 2],
    },
}  # fmt: skip


def store(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(path.stem, json.dumps(content))


@pytest.fixture
def small(tmp_path):
    """A checkout in posteriordb's layout."""
    root = tmp_path / "checkout" / "posterior_database"
    for name, data in DATA.items():
        store(root / f"data/data/{name.split('-')[0]}.json.zip", data)
        about = {"data_name": name.split("-")[0], "reference_posterior_name": name if name == SCHOOLS else None}
        (root / "posteriors").mkdir(exist_ok=True)
        (root / f"posteriors/{name}.json").write_text(json.dumps(about))
    chains = [
        {"mu": [1.0, 2.0], "tau": [0.5, 1.5], "theta[1]": [3.0, 1.0]},
        {"mu": [3.0], "tau": [1.0], "theta[1]": [2.0]},
    ]
    store(root / f"reference_posteriors/draws/draws/{SCHOOLS}.json.zip", chains)
    return root.parent


def test_posteriordb_data_become_model_arguments(small):
    dogs = checkout.arguments(small, "dogs-dogs")
    assert dogs["avoided"].tolist() == [[0, 1, 2, 2], [0, 0, 1, 1]]
    assert dogs["shocked"].tolist() == [[0, 0, 0, 1], [0, 1, 1, 2]]
    radon = checkout.arguments(small, named("radon"))
    assert (radon["county"].tolist(), radon["J"]) == ([0, 0, 1], 2)


def test_published_draws_join_chains(small):
    assert checkout.published(small, SCHOOLS)["mu"].tolist() == [1.0, 2.0, 3.0]
    assert checkout.published(small, "dogs-dogs") is None


def test_missing_posteriordb_files_are_named(small, tmp_path):
    with pytest.raises(FileNotFoundError, match="checkout of posteriordb that has .*diamonds"):
        checkout.arguments(small, "diamonds-diamonds")
    with pytest.raises(KeyError, match="part of one of"):
        named("school of one")


def kidiq(data, z):
    """Flat coefficients, half-Cauchy scale, with the Jacobian of its logarithm."""
    y, iq, hs = (np.array(data[k], float) for k in ("kid_score", "mom_iq", "mom_hs"))
    sigma = np.exp(z[4])
    mean = z[0] + z[1] * hs + z[2] * iq + z[3] * hs * iq
    return stats.norm(mean, sigma).logpdf(y).sum() + stats.halfcauchy(scale=2.5).logpdf(sigma) + z[4]


def garch(data, z):
    """Flat on alpha0 > 0, alpha1 in (0, 1), beta1 in (0, 1 − alpha1), with the Jacobians of logarithm and logits."""
    y, mu, alpha0, (alpha1, fraction) = data["y"], z[0], np.exp(z[1]), special.expit(z[2:])
    beta1, variance, log_p = fraction * (1 - alpha1), data["sigma1"] ** 2, 0.0
    for t, value in enumerate(y):
        if t:
            variance = alpha0 + alpha1 * (y[t - 1] - mu) ** 2 + beta1 * variance
        log_p += stats.norm(mu, np.sqrt(variance)).logpdf(value)
    inner = alpha1 * (1 - alpha1) * fraction * (1 - fraction)
    return log_p + np.log(alpha0) + np.log(inner) + np.log(1 - alpha1)


def schools(data, z):
    tau = np.exp(z[4])
    y, sigma = np.array(data["y"]), np.array(data["sigma"])
    prior = stats.norm.logpdf(z[:3]).sum() + stats.norm(0, 5).logpdf(z[3]) + stats.halfcauchy(scale=5).logpdf(tau)
    return prior + z[4] + stats.norm(z[3] + tau * z[:3], sigma).logpdf(y).sum()


@pytest.mark.parametrize(("name", "oracle"), [("kidiq", kidiq), ("garch", garch), ("eight", schools)])
def test_model_density_equals_stans(name, oracle, small, x64):
    """Up to a constant, which Stan drops of a flat prior and NumPyro keeps."""
    name = named(name)
    posterior = target(MODELS[name].function, checkout.arguments(small, name))
    z = RNG.normal(0, 0.5, (3, posterior.size))
    mine = -np.array([posterior.potential(jnp.asarray(x)) for x in z])
    theirs = np.array([oracle(DATA[name], x) for x in z])
    np.testing.assert_allclose(mine - mine[0], theirs - theirs[0], rtol=1e-8, atol=1e-8)


def model(y):
    """Three latents in sites whose names are not in alphabetical order."""
    tau = numpyro.sample("tau", dist.HalfNormal(1.0))
    b = numpyro.sample("b", dist.Normal(0, tau).expand([2]).to_event(1))
    numpyro.sample("y", dist.Normal(b.sum(), 1.0), obs=y)


@pytest.mark.parametrize("name", GUIDES)
def test_gaussian_of_a_benchmark_guide_equals_numpyros(name, x64):
    """Median and spread in constrained space equal those of NumPyro's draws from the guide."""
    posterior, z = target(model, {"y": 0.3}), starts(model, {"y": 0.3}, 2)[1]
    guide = GUIDES[name].make(model)
    svi = SVI(model, guide, numpyro.optim.Adam(0.1), Trace_ELBO())
    state = svi.init(jax.random.key(0), init_params=GUIDES[name].place(posterior, jnp.asarray(z)), y=0.3)
    noise = np.random.default_rng(1)
    moved = {
        k: np.asarray(v + noise.normal(0, 0.3, v.shape)) for k, v in svi.optim.get_params(state.optim_state).items()
    }
    params = svi.constrain_fn(moved)
    loc, factor = GUIDES[name].gaussian(posterior, {k: np.asarray(v)[None] for k, v in params.items()})
    median = guide.median(params)
    for site, value in median.items():
        np.testing.assert_allclose(posterior.constrain(jnp.asarray(loc[0]))[site], value, rtol=1e-6)
    draws = guide.sample_posterior(jax.random.key(1), params, sample_shape=(20_000,))
    flat = np.column_stack([np.log(draws["tau"]), draws["b"]])
    root = np.diag(factor[0]) if factor.ndim == 2 else factor[0]
    sd = np.sqrt(np.diag(root @ root.T))
    np.testing.assert_allclose(
        np.cov(flat.T) / np.outer(sd, sd), root @ root.T / np.outer(sd, sd), atol=5 / np.sqrt(20_000)
    )


@pytest.fixture
def gaussian(x64):
    """A correlated Gaussian posterior with its mean and precision."""
    root = RNG.normal(size=(3, 3))
    precision, mean = root @ root.T + np.eye(3), RNG.normal(size=3)
    f = lambda z: 0.5 * (z - mean) @ precision @ (z - mean)
    return Target(f, lambda z: {"x": z, "first": z[0]}, {"x": (3,)}), mean, precision


@pytest.mark.parametrize("diagonal", [False, True])
def test_elbo_of_a_quadratic_is_exact(gaussian, diagonal):
    """log Z − KL in closed form, without noise."""
    posterior, mean, precision = gaussian
    judge = measure.Judge(posterior, measure.base_draws(3, 200))
    loc, factor = mean + 0.3, np.array([0.4, 0.7, 0.2]) if diagonal else np.tril(np.full((3, 3), 0.3)) + 0.2 * np.eye(3)
    covariance = np.diag(factor**2) if diagonal else factor @ factor.T
    entropy = 0.5 * np.linalg.slogdet(2 * np.pi * np.e * covariance)[1]
    expected = entropy - 0.5 * (np.trace(precision @ covariance) + (loc - mean) @ precision @ (loc - mean))
    many = measure.BLOCK + 2
    np.testing.assert_allclose(
        judge.elbos(np.stack([loc] * many), np.stack([factor] * many)), [expected] * many, rtol=1e-10
    )
    assert judge.score(loc, factor).elbo == pytest.approx(expected, rel=1e-10)


def test_standard_error_covers_and_exact_fit_has_none(gaussian):
    posterior, mean, precision = gaussian
    exact = np.linalg.cholesky(np.linalg.inv(precision))
    judge = measure.Judge(posterior, measure.base_draws(3, 2000))
    assert judge.score(mean, exact).error == 0.0
    assert np.isnan(judge.score(mean * np.nan, exact).elbo)
    # Of log weights −|ε|²/2 with independent draws the standard error is known: sd(½χ²₃)/√pairs.
    half = np.random.default_rng(3).normal(size=(1000, 3))
    log_w = -0.5 * np.sum(half**2, 1)
    score = measure.summary(np.concatenate([log_w, log_w]))
    assert score.error == pytest.approx(np.sqrt(1.5 / 1000), rel=5 * np.sqrt(2.0 / 1000))


def test_moments_against_reference_draws(gaussian):
    posterior, mean, precision = gaussian
    exact = np.linalg.cholesky(np.linalg.inv(precision))
    judge = measure.Judge(posterior, measure.base_draws(3, 2000))
    truth = mean + np.random.default_rng(4).normal(size=(2000, 3)) @ exact.T
    reference = {"x[1]": truth[:, 0], "x[3]": truth[:, 2], "first": truth[:, 0]}
    sd = truth.std(0)
    found = judge.moments(truth.mean(0) + np.array([2.0, 9.0, 1.0]) * sd, np.diag(3 * sd), reference)
    assert (found.mean_worst, found.mean_median) == (pytest.approx(2.0), pytest.approx(2.0))
    assert (found.sd_least, found.sd_median, found.sd_most) == (pytest.approx(3.0),) * 3
    with pytest.raises(KeyError, match="y"):
        judge.moments(mean, exact, {"y": truth[:, 0]})


def entry(method, arrives, *, model="m", setting="", last=0.0, guide="AutoNormal", precision="x64"):
    """Two seeds that come within 0.01 nats after ``arrives`` steps, and end ``last`` nats short of it."""
    fits = [
        {"steps": [1.0, a, 2 * a], "gradients": [8.0, 8 * a, 16 * a], "seconds": [0.1, 0.1 * a, 0.2 * a],
         "compiling": 2.0, "elbos": [-50.0, 0.0 if np.isfinite(a) else -5.0, -last], "moments": {}}
        for a in arrives
    ]  # fmt: skip
    return results.Entry(model, guide, precision, method, setting, tuple(fits), 100, 0.0)


def test_reached_is_the_first_mark_within():
    e = entry("adam", (10.0, 30.0), last=0.3)
    assert e.reached("steps", 0.1).tolist() == [10.0, 30.0]
    assert e.reached("steps", 60.0).tolist() == [1.0, 1.0]
    assert e.median("total", 0.1) == pytest.approx(2 + 0.1 * 20)
    assert e.failures() == 0
    assert entry("adam", (np.inf, 3.0), last=5.0).failures() == 1
    assert entry("adam", (2.0, 3.0), last=np.nan).failures() == 2


def test_oracle_and_best_single_setting():
    entries = [
        entry("adam", (10.0, 10.0), setting="a"),
        entry("adam", (20.0, 20.0), setting="b"),
        entry("adam", (np.inf, np.inf), setting="a", model="n", last=5.0),
        entry("adam", (900.0, 900.0), setting="b", model="n"),
    ]
    assert results.oracle(entries[:2]).setting == "a"
    assert results.best_single(entries) == "b"


def rows(mine, adam, rival=40.0):
    entries = [entry("natural_gradient", (mine, mine)), entry("adam", (adam, adam))]
    entries.append(entry("deterministic_mean_field", (rival, rival)))
    return {c.measure: c for c in comparison.comparisons(entries)}


@pytest.mark.parametrize(
    ("mine", "adam", "values"),
    [
        (20.0, 100.0, {"gradient evaluations to": 5.0, "steps": 20.0, "seconds with ": 4 / 12, "deterministic": 1, "failures": 0}),
        (50.0, 100.0, {"gradient evaluations to": 2.0, "steps": 50.0, "seconds with ": 7 / 12, "deterministic": 0}),
        (400.0, 100.0, {"gradient evaluations to": 0.25, "steps": 400.0, "seconds with ": 42 / 12}),
        (20.0, np.inf, {"gradient evaluations to": np.inf, "steps": 20.0, "seconds with ": 0.0}),
        (np.inf, 20.0, {"gradient evaluations to": 0.0, "steps": np.inf, "seconds with ": np.inf}),
        (np.inf, np.inf, {"gradient evaluations to": 0.0, "steps": np.inf, "seconds with ": np.inf}),
    ],
)  # fmt: skip
def test_comparisons_with_infinite_costs(mine, adam, values):
    """A method that never arrives has the factor 0, and so have two that both never arrive."""
    found = rows(mine, adam)
    for word, expected in values.items():
        hits = [c for measure, c in found.items() if word in measure]
        assert hits
        assert [c.value for c in hits] == pytest.approx([expected] * len(hits)), hits


def test_the_gain_is_stated_against_the_best_estimator_of_adam():
    entries = [entry(name, (x, x)) for name, x in (("natural_gradient", 20.0), ("adam", 100.0), ("adam_path", 60.0))]
    found = {c.measure: c.value for c in comparison.comparisons(entries)}
    best = [value for measure, value in found.items() if "best estimator" in measure]
    assert best == pytest.approx([3.0] * 4)
    assert not any("best estimator" in c.measure for c in comparison.comparisons(entries[:2]))


@pytest.mark.slow
def test_second_benchmark_run_keeps_existing_results(small, tmp_path, monkeypatch):
    """The first run stores its results, the second keeps them, and a run with more seeds measures again."""
    plan = run.Plan(small, tmp_path / "results", seeds=1, draws=20, steps=(4, 4))
    job = run.Job(SCHOOLS, "AutoNormal", "float32", ("natural_gradient",))
    called = []

    def here(command, **_):
        called.append(command)
        run.run_here(plan, job)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(run.subprocess, "run", here)
    assert run.run(plan, [job]) == []
    assert run.run(plan, [job]) == []
    assert len(called) == 1
    assert plan._replace(seeds=2).missing(job) == job
    (found,) = results.load(plan.results)
    assert found.best == max(found.fits[0]["elbos"])
    assert found.fits[0]["steps"] == [1, 2, 3, 4]
    assert set(found.fits[0]["moments"]) == set(measure.Moments._fields)
    with np.load(plan.file(job, "natural_gradient").with_suffix(".npz")) as ends:
        assert ends["loc"].shape == ends["factor"].shape == (1, 5)


def test_failed_benchmark_job_is_reported(small, tmp_path, monkeypatch):
    job = run.Job(SCHOOLS, "AutoNormal", "float32", ("natural_gradient",))
    monkeypatch.setattr(run.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    assert run.run(run.Plan(small, tmp_path / "none"), [job]) == [job]


def test_every_ablated_ingredient_exists():
    constants = {name for how in ablation.ABLATIONS.values() for name in how.constants}
    assert constants
    assert constants <= set(options.RuleConstants._fields)
    assert all(hasattr(module, name) for how in ablation.ABLATIONS.values() for module, name, _ in how.functions)


def test_compile_seconds_are_those_timed_side_by_side(tmp_path):
    """Adam compiles as in ``SVI.run``, natural gradients as in ``fit``; other methods keep the seconds of their own run."""
    timed = [["m", "AutoNormal", *way, seconds, 0.01] for way, seconds in zip(WAYS, (1.0, 2.0, 3.0, 4.0), strict=True)]
    (tmp_path / results.COMPILING).write_text(json.dumps(timed))
    assert compiling.remembered(tmp_path / results.COMPILING)["m", "AutoNormal"][WAYS[2]].compiling == 3.0
    (tmp_path / "m").mkdir()
    for method in ("adam", "natural_gradient", "pathfinder"):
        fit = {"setting": "", "elbos": [0.0], "compiling": 9.0}
        about = {"model": "m", "guide": "AutoNormal", "method": method, "precision": "x64", "draws": 1, "fits": [fit]}
        (tmp_path / "m" / f"{method}.json").write_text(json.dumps(about))
    found = {e.method: e.fits[0]["compiling"] for e in results.load(tmp_path)}
    assert found == {"adam": 1.0, "natural_gradient": 4.0, "pathfinder": 9.0}


WAYS = list(itertools.product(compiling.OPTIMIZERS, compiling.COMPILERS))
