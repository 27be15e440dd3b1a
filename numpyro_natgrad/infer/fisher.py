# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""The geometry of a guide, to compute with: its Fisher as an operator, natural gradients, KL between two states.

    F(φ) = ∇²_φ' KL(q_φ ‖ q_φ') |_{φ'=φ},      dᵀF d ≈ 2 KL(q_φ ‖ q_{φ+d}) nats,      v = F⁻¹ ∇L

For any ``SVI``, whatever its optimizer: parameters are NumPyro's unconstrained ones, as an optimizer sees them
(``svi.optim.get_params(state.optim_state)``), in a dict from names to arrays or trees of arrays. Of parameters that no
distribution of the guide owns (``param`` statements of the model, points), F is that of the likelihood.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree
from jax.scipy.linalg import cho_factor, cho_solve
from jax.scipy.sparse.linalg import cg
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.optim import _NumPyroOptim

from numpyro_natgrad.distributions.surrogate import (
    FisherEstimate,
    fisher_product,
    fisher_surrogate,
    likelihood_surrogate,
    prior_surrogate,
)
from numpyro_natgrad.estimators.derivatives import derivative
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Frozen, Loss, log_ratios
from numpyro_natgrad.guide.trace import GuideSite, LossTrace, ModelSite, trace_loss

#: Parameters up to which ``solve`` forms F.
DENSE_LIMIT = 2048
#: Above, conjugate gradients stop at this relative residual or after so many products.
CG_TOLERANCE, CG_STEPS = 1e-5, 1000


class Fisher(NamedTuple):
    """The Fisher matrix of a guide, symmetric and positive semi-definite, as an operator on trees like ``params``.

    :ivar params: the unconstrained parameters φ that it is taken at; P numbers in all.
    :ivar product: ``(P,) -> (P,)``, in the order of ``jax.flatten_util.ravel_pytree(params)``.
    :ivar owned: ``(P,)``, whether an entry's parameter belongs to a distribution. The others have zero rows.
    :ivar exact: nothing in it is a mean over draws.
    """

    params: Params
    product: Callable[[jax.Array], jax.Array]
    owned: jax.Array
    exact: bool

    def matvec(self, tangent: Params) -> Params:
        """F d. Half of dᵀF d is the KL in nats that a small change d of the parameters moves the guide."""
        flat, unravel = ravel_pytree(tangent)
        return unravel(self.product(flat))

    def solve(self, gradient: Params, damping: float | None = None) -> Params:
        """(F + damping · diag F)⁻¹ g; what has no Fisher keeps its gradient.

        F is formed up to 2048 parameters; above, conjugate gradients are used, with the mean of diag F.

        :param gradient: a tree like ``params``.
        :param damping: relative; the square root of the floating point precision by default.
        """
        flat, unravel = ravel_pytree(gradient)
        damping = float(jnp.finfo(flat.dtype).eps) ** 0.5 if damping is None else damping
        solution = self._dense_solve if flat.size <= DENSE_LIMIT else self._iterative_solve
        return unravel(jnp.where(self.owned, solution(jnp.where(self.owned, flat, 0.0), damping), flat))

    def dense(self) -> jax.Array:
        """F, shape ``(P, P)``."""
        return jax.vmap(self.product)(jnp.eye(self.owned.size, dtype=ravel_pytree(self.params)[0].dtype))

    def diagonal(self) -> Params:
        """diag F, a tree like ``params``; P products, of which one row at a time is kept."""
        flat, unravel = ravel_pytree(self.params)
        entry = lambda i: self.product(jnp.zeros_like(flat).at[i].set(1.0))[i]
        return unravel(lax.map(entry, jnp.arange(flat.size)))

    def _dense_solve(self, slope: jax.Array, damping: float) -> jax.Array:
        matrix = self.dense()
        diagonal = jnp.diagonal(matrix)
        root = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1.0))  # to a unit diagonal: parameters may be of any scale
        scaled = matrix / (root[:, None] * root) + jnp.diag(jnp.where(diagonal > 0, damping, 1.0))
        return cho_solve(cho_factor(scaled), slope / root) / root

    def _iterative_solve(self, slope: jax.Array, damping: float) -> jax.Array:
        probe = random.rademacher(random.key(0), slope.shape, slope.dtype)
        mean = jnp.maximum(probe @ self.product(probe), jnp.finfo(slope.dtype).tiny) / slope.size  # Hutchinson: trace
        damped = lambda v: self.product(v) + damping * mean * v
        return cg(damped, slope, tol=CG_TOLERANCE, maxiter=CG_STEPS)[0]


class Estimate(NamedTuple):
    """A Monte-Carlo mean and its standard error; the error is 0 where every draw says the same."""

    value: jax.Array
    standard_error: jax.Array


def fisher(
    svi: SVI,
    state: SVIState,
    *args: Any,
    num_draws: int = 64,
    forward_mode_differentiation: bool = False,
    **kwargs: Any,
) -> Fisher:
    """The Fisher matrix of the guide of ``svi`` at a state, as an operator.

    In closed form at every site where it is known, the outer product of scores elsewhere; F = E_z Σ JᵀF_site J over
    draws z that other sites depend on. It can be used inside of ``jit``.

    :param svi: any ``SVI``, with any optimizer.
    :param state: of ``svi.init`` or ``svi.update``.
    :param args: of the model and the guide, as for ``svi.update``. :param kwargs: likewise.
    :param num_draws: draws of the loss (of all of its particles) that a mean is taken over. One is enough, and one is
        used, if the Fisher depends on no draw. The Monte-Carlo part has no more rank than there are draws.
    :param forward_mode_differentiation: as for ``svi.update``.
    :raises ValueError: if ``svi.init`` has not been called.
    """
    params = _initialised(svi).optim.get_params(state.optim_state)
    return _fisher(svi, params, state, num_draws, args, kwargs, forward=forward_mode_differentiation)


def natural_gradient(
    svi: SVI,
    state: SVIState,
    *args: Any,
    num_draws: int = 64,
    damping: float | None = None,
    forward_mode_differentiation: bool = False,
    **kwargs: Any,
) -> Params:
    """F⁻¹∇L at a state: the direction of steepest ascent of the loss per nat of KL, in unconstrained parameters.

    The loss is the one that the next ``svi.update`` would see. Parameters without a Fisher keep their gradient.

    :param num_draws: see :func:`fisher`.
    :param damping: see :meth:`Fisher.solve`.
    :param forward_mode_differentiation: as for ``svi.update``.
    :return: a tree like the parameters; a step of ``-ρ`` times it moves ½ρ² gᵀF⁻¹g nats.
    """
    params = _initialised(svi).optim.get_params(state.optim_state)
    forward = forward_mode_differentiation
    gradient = derivative(_loss(svi, params, state, args, kwargs), forward)(params)[0]
    return _fisher(svi, params, state, num_draws, args, kwargs, forward=forward).solve(gradient, damping)


def kl(svi: SVI, old: SVIState, new: SVIState, *args: Any, num_draws: int = 64, **kwargs: Any) -> Estimate:
    """KL(q_old ‖ q_new) between two states of a guide, in nats.

    At every site in closed form where NumPyro knows one, else the log-ratio of densities; the mean over draws of q_old.
    Points of a guide (``Delta``) are left out: between two of them KL is infinite.

    :param old: the state whose distribution draws. :param new: another state of the same ``svi``.
    :param num_draws: draws of the guide, 2 at least for a standard error.
    """
    before, after = ({**_initialised(svi).get_params(s), **(s.mutable_state or {})} for s in (old, new))
    keys, kwargs = random.split(old.rng_key, num_draws), {**svi.static_kwargs, **kwargs}
    nats = lax.map(lambda key: log_ratios(svi.guide, key, before, after, args, kwargs), keys)
    return Estimate(jnp.mean(nats), jnp.std(nats, ddof=1) / jnp.sqrt(num_draws))


class ScaleByFisherState(NamedTuple):
    """How often :func:`scale_by_fisher` was called: the number of its key."""

    calls: jax.Array


def scale_by_fisher(
    svi: SVI, *args: Any, num_draws: int = 64, damping: float | None = None, **kwargs: Any
) -> optax.GradientTransformation:
    """Gradients to natural gradients, g → F⁻¹g, for those who chain optax transformations.

    ``optax.chain(scale_by_fisher(svi, data), optax.scale(-0.1))`` is an optimizer for an ``SVI`` of the same model,
    guide and loss. :class:`.NaturalGradient` does more: better estimators, coordinates in which a step is exact, and
    a step length.

    :param svi: an ``SVI`` after ``svi.init``, with any optimizer; it is asked for the Fisher only.
    :param args: of the model and the guide. Traced arrays will do. :param kwargs: likewise.
    :param num_draws: see :func:`fisher`.
    :param damping: see :meth:`Fisher.solve`.
    :raises ValueError: if ``svi.init`` has not been called.
    """
    _initialised(svi)

    def init(params: Params) -> ScaleByFisherState:
        return ScaleByFisherState(jnp.array(0))

    def update(updates: Params, state: ScaleByFisherState, params: Params | None = None) -> Any:
        if params is None:
            raise ValueError("`scale_by_fisher` needs the parameters: expected `update(gradient, state, params)`.")
        start = SVIState(None, None, random.fold_in(random.key(0), state.calls))
        scaled = _fisher(svi, params, start, num_draws, args, kwargs).solve(updates, damping)
        return scaled, ScaleByFisherState(state.calls + 1)

    return optax.GradientTransformation(init, update)


def _fisher(
    svi: SVI, params: Params, state: SVIState, num_draws: int, args: Any, kwargs: Any, *, forward: bool = False
) -> Fisher:
    trace = trace_loss(_loss(svi, params, state, args, kwargs), params)
    exact = _is_exact(trace)
    keys = random.split(state.rng_key, 1 if exact else num_draws)
    flat, unravel = ravel_pytree(params)

    def length(x: jax.Array, key: jax.Array) -> jax.Array:
        fn = _loss(svi, params, state._replace(rng_key=key), args, kwargs)
        with _frozen(trace, key):
            return fn(unravel(x))[0]

    def product(d: jax.Array) -> jax.Array:
        each = lambda key: fisher_product(lambda x: length(x, key), flat, forward=forward)(d)
        return jnp.mean(lax.map(each, keys), axis=0)

    owners = _owners(trace)
    owned = {p: jax.tree.map(lambda leaf, p=p: jnp.full_like(leaf, p in owners), x) for p, x in params.items()}
    linear = jax.linearize(product, jnp.zeros_like(flat))[1]
    return Fisher(params, linear, ravel_pytree(owned)[0] > 0, exact)


def _frozen(trace: LossTrace, key: jax.Array) -> Frozen:
    guided = {name: fisher_surrogate(site.fisher_estimate) for name, site in trace.sites.items()}
    model_sites = {
        name: (prior_surrogate if site.point else likelihood_surrogate)(site.fisher_estimate, random.fold_in(key, k))
        for k, (name, site) in enumerate(trace.model_sites.items())
        if site.params
    }
    return Frozen(guided, model_sites)


def _is_exact(trace: LossTrace) -> bool:
    model_sites = [site for site in trace.model_sites.values() if site.params]
    sites: list[GuideSite | ModelSite] = [*trace.sites.values(), *model_sites]
    arguments = [origin for site in trace.sites.values() for origin in site.arguments.values()]
    drawn = any(origin.is_drawn for origin in arguments) or any(site.drawn for site in model_sites)
    return not drawn and all(s.fisher_estimate == FisherEstimate.CLOSED_FORM and s.weight == 1 for s in sites)


def _owners(trace: LossTrace) -> set[str]:
    guided = (site.params for site in trace.sites.values())
    return set().union(*guided, *(site.params for site in trace.model_sites.values()))


def _initialised(svi: SVI) -> SVI:
    if svi.constrain_fn is None:
        raise ValueError(
            "`svi.constrain_fn` is None: expected an initialised SVI; call `svi.init(rng_key, ...)` first."
        )
    return svi


class _Catch(_NumPyroOptim):
    """Not an optimizer: it takes the loss function that ``SVI.update`` makes, and no step."""

    def __init__(self) -> None:
        self.fn: Any = None

    def eval_and_update(self, fn: Any, state: Any, forward_mode_differentiation: bool = False) -> Any:
        self.fn = fn
        return (jnp.zeros(()), None), state


def _loss(svi: SVI, params: Params, state: SVIState, args: Any, kwargs: Any) -> Loss:
    """The loss that ``svi.update`` would hand to its optimizer at a state."""
    probe, catch = copy.copy(svi), _Catch()
    probe.optim = catch
    probe.update(SVIState(params, state.mutable_state, state.rng_key), *args, **kwargs)
    return catch.fn
