# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Fresh draws of the guide, and the score of each of them: what a Monte-Carlo Fisher is made of.

    u_s = ∇_φ log q_φ(z_s),   z_s ~ q_φ,        E[uuᵀ] = F

The loss has its keys closed over and its particles averaged. Two handlers undo both: :class:`Redraw` gives the guide
other keys, so that there are as many draws as wanted, whatever the loss takes; and it gives *every particle parameters
of its own* (equal ones), so that one gradient with respect to all of them is one score for each particle.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.lax import stop_gradient
from numpyro.distributions import biject_to, constraints
from numpyro.primitives import Messenger

from .charts import Params
from .densities import Density
from .effects import Assigned, Frozen, Loss, guide_site, is_guide_site


def scores(
    fn: Loss, params: Params, mine: Params, sites: frozenset[str], particles: int, number: jax.Array
) -> dict[str, Any]:
    """∇_φ log q_φ(z_s)/particles of as many fresh draws as there are particles.

    :param fn: the loss.
    :param params: all parameters, unconstrained.  :param mine: those among them that are asked about.
    :param sites: whose densities make up q.
    :param particles: what the loss averages over.
    :param number: of the set of draws; any other one gives other draws.
    :return: like ``mine``, with ``(particles,)`` before each shape. Where the particles are not drawn in one batch
        (``lax.map``), the first row is the sum of all of them, and the other rows are zero.
    """

    def log_q(copies: dict[str, Any]) -> jax.Array:
        with Redraw(copies, number), Scored(sites):
            return fn(params)[0]

    return jax.grad(log_q)(jax.tree.map(lambda x: jnp.broadcast_to(x, (particles, *jnp.shape(x))), mine))


class Redraw(Messenger):
    """Let the guide draw again, and give every particle its own copy of the parameters.

    Every key gives way to the ``number``-th of those that follow from it. Model and minibatch stay as they are.

    :param copies: of the unconstrained parameters, one for each particle, ``(particles, *shape)``.
    :param number: which draws.
    """

    def __init__(self, copies: Mapping[str, Any], number: jax.Array) -> None:
        super().__init__()
        self.copies, self.number = copies, number

    def process_message(self, msg: Any) -> None:
        # This handler is the outermost one, so that the host has put its key there by now.
        if guide_site(msg) and msg["kwargs"].get("rng_key") is not None:
            msg["kwargs"]["rng_key"] = jax.random.fold_in(msg["kwargs"]["rng_key"], self.number)

    def postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "param" and msg["name"] in self.copies:
            key = numpyro.prng_key()
            transform = biject_to(msg["kwargs"].get("constraint", constraints.real))
            mine = jax.tree.map(lambda x: x[0] if key is None else own(x, key), self.copies[msg["name"]])
            msg["value"] = jax.tree.map(transform, mine)


class Scored(Frozen):
    """The guide's log-densities at frozen draws.

    A ``scale`` c stands for c independent copies of a site, whose Fisher is c times as large: its score counts √c.
    """

    def __init__(self, sites: frozenset[str]) -> None:
        density: Density = lambda fn, value: fn.log_prob(value)
        super().__init__(dict.fromkeys(sites, density))

    def postprocess_message(self, msg: Any) -> None:
        super().postprocess_message(msg)
        if is_guide_site(msg) and msg["scale"] is not None:
            fn, scale = msg["fn"], stop_gradient(jnp.asarray(msg["scale"]))
            root = jnp.where(scale > 0, 1 / jnp.sqrt(jnp.where(scale > 0, scale, 1.0)), 0.0)
            msg["fn"] = Assigned(fn.base, fn.density * root, drawn=True)


def own(copies: jax.Array, key: jax.Array) -> jax.Array:
    """A particle's copy: row s of ``copies`` in the s-th particle, told apart by its key; outside a batch, row 0."""
    # A primitive, because only a batching rule sees that what it is called for is a batch of particles.
    data = jax.random.key_data(key) if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else key
    return _own.bind(copies, data)


_own = core.Primitive("own")


@_own.def_impl
def _first(copies: jax.Array, key: jax.Array) -> jax.Array:
    return copies[0]


@_own.def_abstract_eval
def _abstract(copies: Any, key: Any) -> Any:
    return copies.update(shape=copies.shape[1:])


def _batch(args: tuple[jax.Array, jax.Array], dims: tuple[int | None, int | None]) -> tuple[jax.Array, int]:
    (copies, key), (along, by) = args, dims
    if along is not None:
        return jnp.moveaxis(copies, along, 0)[:, 0], 0
    size = key.shape[by or 0]
    return copies if size == copies.shape[0] else jnp.broadcast_to(copies[0], (size, *copies.shape[1:])), 0


def _transpose(slope: Any, copies: Any, key: jax.Array) -> tuple[jax.Array, None]:
    rest = jnp.zeros((copies.aval.shape[0] - 1, *slope.shape), slope.dtype)
    return jnp.concatenate([slope[None], rest]), None


ad.defjvp(_own, lambda tangent, copies, key: _own.bind(tangent, key), None)
ad.primitive_transposes[_own] = _transpose
batching.primitive_batchers[_own] = _batch
mlir.register_lowering(_own, mlir.lower_fun(_first, multiple_results=False))
