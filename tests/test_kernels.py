# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The compiled update has few kernels: a bound for each kind of block, beside those of the loss and its gradient.

XLA compiles kernels one by one, so that their number is the time until the first step, and on a GPU that of a step.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoDelta, AutoLowRankMultivariateNormal, AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient

#: Instructions that run no kernel of their own, and copies of loop states, which differ between versions of XLA.
NO_KERNEL = {"parameter", "constant", "get-tuple-element", "tuple", "bitcast", "call", "while", "conditional", "copy"}
REDUCING = r" (?:reduce|reduce-window|scatter|sort)\(.*to_apply=%?([\w.-]+)"
#: Bounds are the larger number of jax 0.10 and 0.12, with the flags of the test suite. Other versions of XLA fuse a
#: little more or less.
SLACK = 1.03


class Case(NamedTuple):
    """``kernels`` of an update beyond those of the loss and its gradient, at most."""

    guide: Callable
    model: Callable
    kernels: int


def kernels(function: Callable, *args: jax.Array) -> int:
    """The instructions of the compiled program outside of fused computations and of reductions."""
    text = jax.jit(function).lower(*args).compile().as_text()
    inner = set(re.findall(r" fusion\(.*calls=%?([\w.-]+)", text)) | set(re.findall(REDUCING, text))
    count, computation = 0, ""
    for line in text.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.-]+) \(.*\{$", line):
            computation = start[1]
        elif instruction := re.match(r"\s+(?:ROOT )?%?[\w.-]+ = (?:\(.*?\)|\S+) ([\w-]+)\(", line):
            count += computation not in inner and instruction[1] not in NO_KERNEL
    return count


def regression(d: int) -> Callable:
    x = jnp.cos(jnp.arange(12.0 * d)).reshape(12, d)

    def model() -> None:
        w = numpyro.sample("w", dist.Normal(0.0, 1.0).expand([d]).to_event(1))
        numpyro.sample("y", dist.Normal(x @ w, 1.0).to_event(1), obs=jnp.arange(12.0))

    return model


def rate() -> None:
    numpyro.sample("y", dist.Poisson(numpyro.sample("z", dist.Gamma(2.0, 1.0))), obs=3)


def rate_guide() -> None:
    positive = dist.constraints.positive
    shape = [numpyro.param(name, 2.0, constraint=positive) for name in ("concentration", "rate")]
    numpyro.sample("z", dist.Gamma(*shape))


def chance() -> None:
    numpyro.sample("y", dist.Binomial(10, numpyro.sample("z", dist.Beta(1.0, 1.0))), obs=3)


def chance_guide() -> None:
    positive = dist.constraints.positive
    shape = [numpyro.param(name, 2.0, constraint=positive) for name in ("above", "below")]
    numpyro.sample("z", dist.Beta(*shape))


def rank_one(model: Callable) -> Callable:
    return AutoLowRankMultivariateNormal(model, rank=1)


CASES = {
    "full, regression": Case(AutoMultivariateNormal, regression(8), 279),
    "full, products": Case(AutoMultivariateNormal, regression(3), 273),
    "mean field, joint": Case(AutoNormal, regression(8), 295),
    "mean field, wide": Case(AutoNormal, regression(200), 257),
    "low rank, wide": Case(rank_one, regression(200), 440),
    "gamma": Case(lambda model: rate_guide, rate, 289),
    "beta": Case(lambda model: chance_guide, chance, 426),
    "points": Case(AutoDelta, regression(3), 120),
}


@pytest.mark.parametrize("name", CASES)
def test_update_has_few_kernels_beyond_those_of_the_gradient(name):
    case = CASES[name]
    svi = SVI(case.model, case.guide(case.model), NaturalGradient(), Trace_ELBO(num_particles=8))
    state = jax.jit(svi.init)(random.key(0))

    def loss(params: dict) -> jax.Array:
        return svi.loss.loss(random.key(1), svi.constrain_fn(params), svi.model, svi.guide)

    alone = kernels(jax.value_and_grad(loss), state.optim_state[1].params)
    beyond = kernels(lambda s: svi.update(s), state) - alone
    assert 0 < beyond <= SLACK * case.kernels, (beyond, alone)
