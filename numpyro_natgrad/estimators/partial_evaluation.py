# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Compute values that do not depend on the parameters, above all the random numbers, once a step.

A step evaluates the loss several times at the same draws. ``partially_evaluated(fn, x)`` traces ``fn`` and cuts its
jaxpr in two, so that equations that do not depend on ``x`` are compiled and run once. For small models random-number
generators take most of the loss's time. ``jax.interpreters.partial_eval`` could do the same, but is no public API.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from numpyro_natgrad.estimators.equation_batches import Values, batches, needed


def partially_evaluated(fn: Callable, x: Any) -> Callable:
    """``fn``, a function of trees like ``x``, with all equations evaluated that do not depend on its argument."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(x)
    jaxpr = closed.jaxpr
    known = Values(dict(zip(jaxpr.constvars, closed.consts, strict=True)))
    fixed, rest = _split(needed(jaxpr.eqns, jaxpr.outvars), set(jaxpr.constvars))
    for batch in batches(fixed):
        known.run(batch)
    order = batches(rest, jaxpr.invars)

    def remainder(y: Any) -> Any:
        values = known.copy()
        values.update(zip(jaxpr.invars, jax.tree.leaves(y), strict=True))
        for batch in order:
            values.run(batch)
        return jax.tree.unflatten(jax.tree.structure(shapes), list(map(values.read, jaxpr.outvars)))

    return remainder


def _split(eqns: list[core.JaxprEqn], known: set[core.Var]) -> tuple[list[core.JaxprEqn], list[core.JaxprEqn]]:
    """The equations whose operands are known, or made of known ones, and the others."""
    fixed, rest = [], []
    for eqn in eqns:
        if eqn.effects or not all(isinstance(v, core.Literal) or v in known for v in eqn.invars):
            rest.append(eqn)
        else:
            fixed.append(eqn)
            known.update(eqn.outvars)
    return fixed, rest
