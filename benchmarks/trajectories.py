# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.trajectories record FILE``: losses and parameters of 30 steps of fits that use every block.

``python -m benchmarks.trajectories compare FILE`` takes the steps again and prints how far they are from those that
were recorded, relative to the largest entry of each array. A change of the code that is not meant to change behaviour
should show 1e-8 or less: everything is in double precision, with fixed keys.
"""

import argparse
import functools
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO, TraceGraph_ELBO
from numpyro.infer.autoguide import (
    AutoDelta,
    AutoDiagonalNormal,
    AutoIAFNormal,
    AutoLowRankMultivariateNormal,
    AutoMultivariateNormal,
    AutoNormal,
)
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient
from numpyro_natgrad.step import natural_step

from . import cases

STEPS = 30
#: Relative difference that rounding explains.
TOLERANCE = 1e-8


class Fit(NamedTuple):
    """What is fitted, and the blocks that it is there for."""

    blocks: str
    model: Callable[..., Any]
    guide: Callable[..., Any]
    args: tuple[Any, ...]
    particles: int = 8
    options: Mapping[str, Any] = MappingProxyType({})
    loss: Callable[..., Any] = Trace_ELBO


def _draw(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def _positive(name: str, value: Any) -> jax.Array:
    return numpyro.param(name, value, constraint=constraints.positive)


def poisson_regression(d: int, rows: int) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A regression of counts on d covariates: its Hessian varies."""
    x = _draw().normal(size=(rows, d)) / np.sqrt(d)
    y = _draw(1).poisson(np.exp(x @ _draw(2).normal(size=d) + 0.5))

    def model(x: Any, y: Any) -> None:
        beta = numpyro.sample("beta", dist.Normal(0, 1).expand([d]).to_event(1))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Poisson(jnp.exp(x @ beta + 0.5)), obs=y)

    return model, (jnp.array(x), jnp.array(y))


def _schools() -> tuple[Callable[..., Any], tuple[Any, ...]]:
    case = cases.eight_schools()
    return case.model, case.data


def _counts(y: Any) -> None:
    rate = numpyro.sample("rate", dist.Gamma(2.0, 1.0))
    weights = numpyro.sample("weights", dist.Dirichlet(jnp.ones(3)))
    numpyro.sample("y", dist.Poisson(rate * weights).to_event(1), obs=y)


def _counts_guide(y: Any) -> None:
    numpyro.sample("rate", dist.Gamma(_positive("alpha", 2.0), _positive("beta", 1.5)))
    numpyro.sample("weights", dist.Dirichlet(_positive("concentration", jnp.ones(3))))


def _chain(y: Any) -> None:
    a = numpyro.sample("a", dist.Normal(0, 1))
    b = numpyro.sample("b", dist.Normal(a, 1))
    numpyro.sample("y", dist.Normal(jnp.exp(0.5 * b), 0.5).expand(y.shape).to_event(1), obs=y)


def _chain_guide(y: Any) -> None:
    a = numpyro.sample("a", dist.Normal(numpyro.param("m", 0.1), _positive("s", 0.5)))
    slope, shift = numpyro.param("slope", 0.3), numpyro.param("shift", -0.2)
    numpyro.sample("b", dist.Normal(shift + slope * a, _positive("t", 0.7)))


def _rows(n: int, size: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """Two latents for each row of a subsampled plate."""
    y = _draw(3).normal(size=n)

    def model(y: Any) -> None:
        with numpyro.plate("rows", n, subsample_size=size) as i:
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("y", dist.StudentT(4.0, z.sum(-1), 1), obs=y[i])

    def guide(y: Any) -> None:
        loc, scale = numpyro.param("loc", jnp.zeros((n, 2))), _positive("scale", jnp.ones((n, 2)))
        with numpyro.plate("rows", n, subsample_size=size) as i:
            numpyro.sample("z", dist.Normal(loc[i], scale[i]).to_event(1))

    return model, guide, (jnp.array(y),)


def _network(hidden: int) -> tuple[Callable[..., Any], Callable[..., Any], tuple[Any, ...]]:
    """An encoder in the guide and a decoder in the model."""
    x = _draw(4).normal(size=(32, 10))
    first, second, third = (
        _draw(k).normal(size=s) * 0.3 for k, s in ((5, (10, hidden)), (6, (hidden, 4)), (7, (2, 300)))
    )

    def model(x: Any) -> None:
        into, out = numpyro.param("into", jnp.array(third)), numpyro.param("out", jnp.full((300, 10), 0.05))
        with numpyro.plate("rows", len(x)):
            z = numpyro.sample("z", dist.Normal(0, 1).expand([2]).to_event(1))
            numpyro.sample("x", dist.Normal(jnp.tanh(z @ into) @ out, 0.5).to_event(1), obs=x)

    def guide(x: Any) -> None:
        w, v = numpyro.param("w", jnp.array(first)), numpyro.param("v", jnp.array(second))
        loc, scale = jnp.split(jnp.tanh(x @ w) @ v, 2, axis=-1)
        with numpyro.plate("rows", len(x)):
            numpyro.sample("z", dist.Normal(loc, jax.nn.softplus(scale)).to_event(1))

    return model, guide, (jnp.array(x),)


def _noisy(y: Any) -> None:
    noise = _positive("noise", 1.0)
    z = numpyro.sample("z", dist.Normal(0, 1))
    numpyro.sample("y", dist.Normal(z, noise).expand(y.shape).to_event(1), obs=y)


def _switches(y: Any) -> None:
    with numpyro.plate("rows", len(y)):
        k = numpyro.sample("k", dist.Bernoulli(0.3))
        numpyro.sample("y", dist.Normal(2.0 * k, 1), obs=y)


def _switches_guide(y: Any) -> None:
    logits = numpyro.param("logits", jnp.zeros(len(y)))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("k", dist.Bernoulli(logits=logits))


def fits() -> dict[str, Fit]:
    """Every block at least once."""
    schools, wide, narrow, middle = (
        _schools(),
        poisson_regression(150, 200),
        poisson_regression(20, 60),
        poisson_regression(40, 80),
    )
    few, many, nets = _rows(40, 10), _rows(400, 50), _network(60)
    y = jnp.array([0.3, -1.2, 0.7, 2.0])
    guided = lambda guide: lambda model: guide
    return {
        "regression": Fit("joint Gaussian, regression", schools[0], AutoMultivariateNormal, schools[1]),
        "regression, mean field": Fit("the same, projected", schools[0], AutoNormal, schools[1]),
        "products": Fit("joint Gaussian, Hessian products", schools[0], AutoMultivariateNormal, schools[1], 1),
        "products, max_kl": Fit(
            "the same, projected, KL of the guide", schools[0], AutoDiagonalNormal, schools[1], 1, {"max_kl": 0.5}
        ),
        "antithetic": Fit("joint Gaussian, antithetic draws", narrow[0], AutoMultivariateNormal, narrow[1], 5),
        "antithetic, shared": Fit("the same, directions shared", middle[0], AutoMultivariateNormal, middle[1], 9),
        "low rank, joint": Fit(
            "joint, low-rank site", narrow[0], lambda m: AutoLowRankMultivariateNormal(m, rank=3), narrow[1]
        ),
        "full": Fit("full Gaussian beyond 128 latents", wide[0], AutoMultivariateNormal, wide[1]),
        "full, first order": Fit(
            "full Gaussian, first order", narrow[0], AutoMultivariateNormal, narrow[1], 8, {"estimator": "first_order"}
        ),
        "diagonal": Fit("diagonal Gaussian", wide[0], AutoNormal, wide[1]),
        "diagonal, second order": Fit(
            "diagonal Gaussian", wide[0], AutoDiagonalNormal, wide[1], 8, {"estimator": "second_order"}
        ),
        "low rank": Fit(
            "low-rank Gaussian", wide[0], lambda m: AutoLowRankMultivariateNormal(m, rank=3), wide[1]
        ),
        "natural": Fit("natural parameters", _counts, guided(_counts_guide), (jnp.array([3, 1, 7]),)),
        "structured": Fit("KL Hessian, dense", _chain, guided(_chain_guide), (y,)),
        "local": Fit("KL Hessian of local parameters", few[0], guided(few[1]), few[2]),
        "local, many": Fit("the same, conjugate gradients", many[0], guided(many[1]), many[2]),
        "networks": Fit("networks of guide and model", nets[0], guided(nets[1]), nets[2]),
        "scores": Fit("scores", schools[0], lambda m: AutoIAFNormal(m, num_flows=1), schools[1], 2),
        "likelihood": Fit("Fisher of the likelihood", narrow[0], AutoDelta, narrow[1], 1),
        "model parameter": Fit("likelihood beside a guide", _noisy, AutoNormal, (y,)),
        "fallback": Fit(
            "an optax optimizer", _noisy, AutoNormal, (y,), 8, {"fallback_optimizer": optax.adam(0.05)}
        ),
        "discrete": Fit("discrete sites", _switches, guided(_switches_guide), (y,), 8, {}, TraceGraph_ELBO),
    }  # fmt: skip


def trajectory(fit: Fit) -> dict[str, np.ndarray]:
    """Losses of all steps, and the parameters after the last one."""
    svi = SVI(fit.model, fit.guide(fit.model), NaturalGradient(**fit.options), fit.loss(num_particles=fit.particles))
    result = svi.run(random.key(1), STEPS, *fit.args, progress_bar=False)
    leaves = jax.tree_util.tree_leaves_with_path(jax.device_get(result.params))
    return {"losses": np.asarray(result.losses), **{jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}}


def difference(old: dict[str, np.ndarray], new: dict[str, np.ndarray]) -> float:
    """The largest difference between two trajectories, relative to the largest entry of each array."""
    assert old.keys() == new.keys(), (sorted(old), sorted(new))
    scale = lambda x: max(float(np.abs(x).max(initial=0.0)), np.finfo(float).tiny)
    return max(float(np.abs(old[k] - new[k]).max(initial=0.0)) / scale(old[k]) for k in old)


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.trajectories", description=__doc__)
    parser.add_argument("action", choices=("record", "compare"))
    parser.add_argument("file", help="of arrays, .npz")
    parser.add_argument("--seed", type=int, help="seed of the blocks' probes; by default, that of each run")
    parser.add_argument("--only", nargs="*", help="names of fits; all by default")
    options = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    if options.seed is not None:
        natural_step.run_seed = lambda *_: jnp.array(options.seed, jnp.uint32)
    chosen = {name: fit for name, fit in fits().items() if not options.only or name in options.only}
    found = {name: trajectory(fit) for name, fit in tqdm(chosen.items())}
    flat = {f"{name}|{key}": x for name, arrays in found.items() for key, x in arrays.items()}
    if options.action == "record":
        np.savez(options.file, **flat)  # type: ignore[arg-type]
        return
    old = np.load(options.file)
    worst = functools.partial(max, 0.0)
    for name, arrays in found.items():
        gap = difference({k: old[f"{name}|{k}"] for k in arrays}, arrays)
        print(f"{name:<24} {gap:.1e}{'' if gap <= TOLERANCE else '   differs'}")
    print(f"largest: {worst(*(difference({k: old[f'{n}|{k}'] for k in a}, a) for n, a in found.items())):.1e}")


if __name__ == "__main__":
    main()
