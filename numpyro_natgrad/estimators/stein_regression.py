# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Slope and curvature by regression of gradients on draws: E[∇f] and E[∇²f] from gradients alone.

With x ~ N(0, I) and g(x) the gradient of f at z = m + Cx, whitened by Cᵀ, Stein's identity says

    E[g xᵀ] = E[Cᵀ∇²f C],        so that  g(x) ≈ E[g] + E[Cᵀ∇²f C] x  is the regression of g on x.

Least squares over draws (x_s, g_s) is that estimate without the noise of the draws themselves: exact for a quadratic f
as soon as the draws span the space, where the mean of g xᵀ never is. The curvature is symmetric, so that fewer draws
than dimensions say something of all of it. What is fitted is what the present Gaussian does not explain,

    e_s = g_s − P x_s,     min  Σ w_s ‖e_s − b − Δ x_s‖² + λ (‖b‖² + ‖Δ‖²)     over b and symmetric Δ,

P its precision in the same frame, so that directions that no draw has seen stay as they are. In the eigenbasis of the
centred Gram matrix G = Σ w x xᵀ − ss'/(n+λ) the normal equations ΔG + GΔ + 2λΔ = E + Eᵀ are solved entry by entry.

The sums over draws are remembered from step to step, which is what makes few draws a step suffice. They are sums over
u = (1, x), of which the frame of the next Gaussian is a linear map, so that they are moved there exactly. Draws count
less as the Gaussian moves on, as importance weights would have it, and as more come (:func:`lasting`); draws with an
influence beyond all others are pulled in (Huber 1964).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular

#: λ, in draws: what the present Gaussian is worth against them.
RIDGE = 0.2
#: A draw's influence beyond this share of all influence so far is pulled in: a mean truncated there has no heavy tail,
#: and loses its bias as draws accumulate (Catoni 2012).
OUTLIER = 0.25
#: Remembered draws with a mean square beyond this many times their dimension count less, with the square of the ratio.
SPREAD = 1.5


class Sums(NamedTuple):
    """Weighted sums over draws u = (1, x): room for n dimensions, of which the leading d are in use.

    :ivar loc: m, the origin of the frame they are written in (n,).  :ivar factor: C, its axes (n, n).
    :ivar influence: running mean of ‖e‖²(1 + ‖x‖²), pulled in; scalar.
    :ivar gram: Σ w u uᵀ (n + 1, n + 1).  :ivar cross: Σ w g uᵀ (n, n + 1).
    """

    loc: jax.Array
    factor: jax.Array
    influence: jax.Array
    gram: jax.Array
    cross: jax.Array

    @property
    def weight(self) -> jax.Array:
        """Σ w: what all draws count, in draws."""
        return self.gram[0, 0]


def nothing(n: int, dtype: jnp.dtype) -> Sums:
    """Sums over no draws."""
    shapes = (n,), (n, n), (), (n + 1, n + 1), (n, n + 1)
    return Sums(*(jnp.zeros(shape, dtype) for shape in shapes))


def moved(sums: Sums, loc: jax.Array, factor: jax.Array) -> Sums:
    """The sums in the frame x' = C'⁻¹(z − m') = R (x − δ), g' = R⁻ᵀg, with R = C'⁻¹C and δ = C⁻¹(m' − m).

    :param loc: m' (d,).  :param factor: C' (d, d), lower triangular.
    """
    old = jnp.where(sums.weight > 0, sums.factor, factor)
    ratio, inverse = _solve(factor, old), _solve(old, factor)
    shift = _solve(old, jnp.where(sums.weight > 0, loc - sums.loc, 0.0))
    affine = jnp.eye(loc.size + 1, dtype=loc.dtype).at[1:].set(jnp.column_stack([-ratio @ shift, ratio]))
    gram, cross = affine @ sums.gram @ affine.T, inverse.T @ sums.cross @ affine.T
    far = SPREAD * loc.size * sums.weight / jnp.maximum(jnp.trace(gram[1:, 1:]), jnp.finfo(gram.dtype).tiny)
    kl = 0.5 * (jnp.sum(inverse**2) - loc.size - 2 * jnp.sum(jnp.log(jnp.diagonal(inverse))) + jnp.sum(shift**2))
    share = worth(kl, far)
    # A frame so far away that the sums are no numbers there makes them forget all.
    ok = jnp.isfinite((jnp.sum(gram) + jnp.sum(cross)) * share)
    return Sums(loc, factor, sums.influence, *(jnp.where(ok, share * x, 0.0) for x in (gram, cross)))


def worth(kl: jax.Array, far: jax.Array) -> jax.Array:
    """What remembered draws count after the Gaussian has moved by ``kl`` nats, as importance weights would have it.

    :param far: the mean square that is nothing unusual, over theirs in the new frame.
    """
    return jnp.minimum(far, 1.0) ** 2 / (1 + kl)


def taken_in(sums: Sums, x: jax.Array, g: jax.Array, precision: jax.Array) -> Sums:
    """The sums with more draws, those of too large an influence ‖e‖²(1 + ‖x‖²) pulled in.

    The median of the new ones stands for them in the bound, which their own outliers then cannot raise.

    :param x: draws in the sums' frame (S, d).  :param g: gradients of f there (S, d).
    :param precision: P of the present Gaussian in that frame (d, d).
    """
    sums = lasting(sums, *x.shape)
    square = lambda rows: jnp.sum(rows**2, axis=1)
    influence = square(g - x @ precision) * (1 + square(x))
    seen = sums.weight * sums.influence
    bound = jnp.maximum(OUTLIER * (seen + len(x) * jnp.median(influence)), 1.0)
    weight = jnp.sqrt(jnp.minimum(1.0, bound / jnp.maximum(influence, bound)))[:, None]
    u = jnp.column_stack([jnp.ones_like(weight), x])
    return sums._replace(
        influence=(seen + jnp.sum(jnp.minimum(influence, bound))) / (sums.weight + len(x)),
        gram=sums.gram + (weight * u).T @ u,
        cross=sums.cross + (weight * g).T @ u,
    )


def lasting(sums: Sums, new: int, d: int) -> Sums:
    """What is remembered when ``new`` draws come: n − S(1 − (d + 1)/n) of n draws, so that n grows as √(2(d + 1)St).

    Steps go S/n of the way that the new draws ask for. If all draws counted for ever that would be 1/t: an average that
    settles early where the loss is flatter than the Fisher, a Poisson hierarchy by 32 particles a step 3 nats off for
    hundreds of steps. Lengths that fall as 1/√t get along, and what noise they leave the average of the iterates takes
    out (Polyak & Juditsky 1992). Fewer than d + 1 draws do not determine a fit; remembering three times as many before
    their number is held back leaves funnels twice as slowly.
    """
    n = jnp.maximum(sums.weight, 1.0)
    share = 1 - jnp.clip(new / n * (1 - (d + 1) / n), 0.0, 1.0)
    return sums._replace(gram=share * sums.gram, cross=share * sums.cross)


def fit(sums: Sums, precision: jax.Array) -> tuple[jax.Array, jax.Array]:
    """b (d,) and Δ (d, d), symmetric: what is missing of slope and precision P."""
    n, s = sums.weight + RIDGE, sums.gram[1:, 0]
    missing = sums.cross - precision @ sums.gram[1:]
    slope = missing[:, 0]
    gram = sums.gram[1:, 1:] - jnp.outer(s, s) / n
    cross = missing[:, 1:] - jnp.outer(slope, s) / n
    # A NaN would keep the eigensolver busy; the step that follows it is skipped because the slope shows it.
    values, vectors = jnp.linalg.eigh(jnp.where(jnp.all(jnp.isfinite(gram)), gram, 0.0))
    values = jnp.maximum(values, 0.0)
    rotated = vectors.T @ cross @ vectors
    entries = (rotated + rotated.T) / (values[:, None] + values + 2 * RIDGE)
    curvature = vectors @ entries @ vectors.T
    return (slope - curvature @ s) / n, curvature


def _solve(lower: jax.Array, right: jax.Array) -> jax.Array:
    return solve_triangular(lower, right, lower=True)
