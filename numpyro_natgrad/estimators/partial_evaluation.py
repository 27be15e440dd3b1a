# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Compute what does not depend on the parameters, above all the random numbers, once a step.

A step evaluates the loss several times at the same draws: value, gradient, Hessian-vector products, and the value again
where the step leads. ``partially_evaluated(fn, x)`` traces ``fn`` once and cuts its jaxpr in two, so that equations
that do not depend on ``x`` are compiled once and run once. Random-number generators are slow to compile and to run; for
a small model they are most of the loss.

``jax.interpreters.partial_eval`` does the same cut, but is no public API; this module needs ``jax.extend.core`` only.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

Values = dict[core.Var, Any]


def partially_evaluated(fn: Callable, x: Any) -> Callable:
    """``fn`` with everything computed that does not depend on its argument.

    :param fn: a function of one tree of arrays.
    :param x: an argument of the shapes and dtypes that it will be called with.
    """
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
