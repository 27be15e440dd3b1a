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

Values = dict[core.Var, Any]


def partially_evaluated(fn: Callable, x: Any) -> Callable:
    """``fn``, a function of trees like ``x``, with all equations evaluated that do not depend on its argument."""
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(x)
    known, rest = _split(closed.jaxpr, dict(zip(closed.jaxpr.constvars, closed.consts, strict=True)))

    def remainder(y: Any) -> Any:
        values = {**known, **dict(zip(closed.jaxpr.invars, jax.tree.leaves(y), strict=True))}
        for eqn in rest:
            _run(eqn, values)
        return jax.tree.unflatten(jax.tree.structure(shapes), [_read(v, values) for v in closed.jaxpr.outvars])

    return remainder


def _split(jaxpr: core.Jaxpr, known: Values) -> tuple[Values, list[core.JaxprEqn]]:
    """Run the equations whose operands are known; return all known values, and the other equations."""
    rest = []
    for eqn in jaxpr.eqns:
        if eqn.effects or not all(isinstance(v, core.Literal) or v in known for v in eqn.invars):
            rest.append(eqn)
        else:
            _run(eqn, known)
    return known, rest


def _run(eqn: core.JaxprEqn, values: Values) -> None:
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*(_read(v, values) for v in eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
    values.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def _read(atom: core.Var | core.Literal, values: Values) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]
