# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Compute once what does not depend on the parameters: the random numbers above all.

A step looks at the loss several times at the same draws: value, gradient, Hessian products, and the value again where
the step leads. ``hoisted(fn, x)`` traces ``fn`` once and cuts its jaxpr in two, so that the equations which do not
depend on ``x`` run once a step and are compiled once. Random-number generators are slow to compile and to run; for a
small model they are most of the loss.
"""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def partially_evaluated(fn: Callable, x: Any) -> Callable:
    """``fn`` with everything that does not depend on its argument computed already.

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


def _split(jaxpr: Any, known: dict[Any, Any]) -> tuple[dict[Any, Any], list[Any]]:
    """Run the equations that can be run; return all values found, and the equations left."""
    rest = []
    for eqn in jaxpr.eqns:
        if eqn.effects or not all(isinstance(v, core.Literal) or v in known for v in eqn.invars):
            rest.append(eqn)
        else:
            _run(eqn, known)
    return known, rest


def _run(eqn: Any, values: dict[Any, Any]) -> None:
    with eqn.ctx.manager:
        out = eqn.primitive.bind(*(_read(v, values) for v in eqn.invars), **eqn.primitive.get_bind_params(eqn.params))
    values.update(zip(eqn.outvars, out if eqn.primitive.multiple_results else [out], strict=True))


def _read(atom: Any, values: dict[Any, Any]) -> Any:
    return atom.val if isinstance(atom, core.Literal) else values[atom]
