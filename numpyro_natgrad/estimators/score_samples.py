# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Score samples: the scores of fresh draws of the guide, for a Monte-Carlo Fisher matrix.

    u_s = ∇_φ log q_φ(z_s),   z_s ~ q_φ,        E[uuᵀ] = F

The loss closes over its keys and averages over its particles. :class:`Resample` gives the guide other keys, for any
number of draws, and *every particle a copy of the parameters*, so that the gradient with respect to all copies contains
the score of each particle.
"""

import jax
import jax.numpy as jnp
import numpyro
from jax.lax import stop_gradient
from numpyro.distributions import biject_to, constraints
from numpyro.primitives import Messenger

from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Assigned, Frozen, Loss, Message, is_guide_site, mark_guide_site, per_particle


def sample_scores(
    fn: Loss, params: Params, mine: Params, sites: frozenset[str], particles: int, number: jax.Array
) -> Params:
    """∇_φ log q_φ(z_s)/particles of as many fresh draws as there are particles.

    :param mine: those of ``params``, unconstrained, whose scores are computed.
    :param sites: the sites whose densities make up q.
    :param particles: the particles over which the loss averages.
    :param number: of the set of draws; another number gives other draws.
    :return: like ``mine``, with ``(particles,)`` before each shape. Where the particles are not drawn in one batch
        (``lax.map``), the first row is the sum of all scores, and the other rows are zero.
    """

    def log_q(copies: Params) -> jax.Array:
        with Resample(copies, number), ScoreDensities(sites):
            return fn(params)[0]

    return jax.grad(log_q)(jax.tree.map(lambda x: jnp.broadcast_to(x, (particles, *jnp.shape(x))), mine))


class Resample(Messenger):
    """Let the guide draw again, and give every particle its own copy of the parameters.

    Draws of the model do not change. (A plate that the guide opens after a ``param`` has other rows than in the loss,
    because the copy uses a key.)

    :param copies: of the unconstrained parameters, one for each particle, ``(particles, *shape)``.
    :param number: of the set of draws, folded into every key.
    """

    def __init__(self, copies: Params, number: jax.Array) -> None:
        super().__init__()
        self.copies, self.number = copies, number

    def process_message(self, msg: Message) -> None:
        # This handler is the outermost one: NumPyro has set the key by now.
        if mark_guide_site(msg) and msg["kwargs"].get("rng_key") is not None:
            msg["kwargs"]["rng_key"] = jax.random.fold_in(msg["kwargs"]["rng_key"], self.number)

    def postprocess_message(self, msg: Message) -> None:
        if msg["type"] == "param" and msg["name"] in self.copies:
            key = numpyro.prng_key()
            transform = biject_to(msg["kwargs"].get("constraint", constraints.real))
            mine = jax.tree.map(lambda x: x[0] if key is None else per_particle(x, key), self.copies[msg["name"]])
            msg["value"] = jax.tree.map(transform, mine)


class ScoreDensities(Frozen):
    """The guide's log-densities at frozen draws. A ``scale`` c multiplies F by c, and hence scores by √c."""

    def __init__(self, sites: frozenset[str]) -> None:
        super().__init__(dict.fromkeys(sites, lambda fn, value: fn.log_prob(value)))

    def postprocess_message(self, msg: Message) -> None:
        super().postprocess_message(msg)
        if is_guide_site(msg) and msg["scale"] is not None:
            fn, scale = msg["fn"], stop_gradient(jnp.asarray(msg["scale"]))
            root = jnp.where(scale > 0, 1 / jnp.sqrt(jnp.where(scale > 0, scale, 1.0)), 0.0)
            msg["fn"] = Assigned(fn.base, fn.density * root, drawn=True)
