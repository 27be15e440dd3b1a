# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""The geometry of a guide as functions: its Fisher matrix as an operator, natural gradients, KL between two states.

    F(φ) = ∇²_φ' KL(q_φ ‖ q_φ') |_{φ'=φ},      dᵀF d ≈ 2 KL(q_φ ‖ q_{φ+d}) nats,      v = F⁻¹ ∇L

The functions work with any ``SVI`` and any optimizer. Parameters are NumPyro's unconstrained ones, a dict from names to
arrays or trees of arrays (``svi.optim.get_params(state.optim_state)``). Parameters that no distribution of the guide
owns (``param`` statements of the model, points) have the Fisher matrix of the likelihood.
"""

import copy
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro.infer import SVI
from numpyro.infer.svi import SVIState
from numpyro.optim import _NumPyroOptim

from numpyro_natgrad.blocks.fisher.metrics import fisher_sites, guide_surrogates, model_surrogates, surrogate_operator
from numpyro_natgrad.blocks.fisher.solvers import FisherOperator
from numpyro_natgrad.distributions.surrogate import FisherEstimate
from numpyro_natgrad.estimators.derivatives import derivative
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Frozen, Loss, log_ratios
from numpyro_natgrad.guide.trace import GuideSite, LossTrace, ModelSite, trace_loss
from numpyro_natgrad.infer.arguments import check_count, check_key, check_state, initialised


class Estimate(NamedTuple):
    """A Monte-Carlo mean and its standard error, scalars; the error is 0 where the value does not depend on draws."""

    value: jax.Array
    standard_error: jax.Array


def fisher(
    svi: SVI,
    state: SVIState,
    *args: Any,
    num_draws: int = 64,
    forward_mode_differentiation: bool = False,
    **kwargs: Any,
) -> FisherOperator:
    """The Fisher matrix of the guide of ``svi`` at a state, as the operator that :class:`.NaturalGradient` steps with.

    F = E_z Σ JᵀF_site J over draws z that other sites depend on. The Fisher matrix F_site of a site is in closed form
    if one is known (:func:`.register_exponential_family`), else the outer product of scores (Amari 1998, equation 3).
    The function can be used inside of ``jax.jit``.

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist, optax
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import fisher
        >>> model = lambda: numpyro.sample("z", dist.Gamma(2.0, 1.0))
        >>> svi = SVI(model, AutoNormal(model, init_scale=0.5), optax.sgd(0.1), Trace_ELBO())
        >>> F = fisher(svi, svi.init(random.key(0)))
        >>> print(F.dense().round(2))  # the mean has 1/0.5²; the scale is unconstrained
        [[4.   0.  ]
         [0.   1.24]]

    :param SVI svi: any ``SVI``, with any optimizer.
    :param SVIState state: a state of ``svi.init`` or ``svi.update``. Its key makes the draws.
    :param args: positional arguments of model and guide, as for ``svi.update``.
    :param int num_draws: draws of the loss (of all of its particles) that F is a mean over, if it depends on any. They
        also bound the rank of the part that is made of scores.
    :param bool forward_mode_differentiation: as for ``svi.update``.
    :param kwargs: keyword arguments of model and guide, as for ``svi.update``.
    :return: F at the parameters of the state, nats.
    :raises TypeError: if ``state`` is no ``SVIState``.
    :raises ValueError: if ``svi.init`` has not been called.
    """
    check_state(svi, state)
    check_count("num_draws", num_draws, "64")
    params = initialised(svi).optim.get_params(state.optim_state)
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
    """The natural gradient F⁻¹∇L of the loss of the next ``svi.update`` (Amari 1998, theorem 1).

    A step −ρF⁻¹∇L changes the guide by ½ρ² ∇LᵀF⁻¹∇L nats. Parameters without a Fisher matrix keep their gradient.

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist, optax
        >>> from jax import random
        >>> from numpyro.infer import SVI, TraceMeanField_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import natural_gradient
        >>> model = lambda: numpyro.sample("z", dist.Normal(3.0, 1.0))
        >>> svi = SVI(model, AutoNormal(model, init_scale=1.0), optax.sgd(0.1), TraceMeanField_ELBO())
        >>> state = svi.init(random.key(0), init_params={"z_auto_loc": 0.0, "z_auto_scale": 1.0})
        >>> {name: round(float(x), 2) for name, x in natural_gradient(svi, state).items()}  # from 0 to the mean 3
        {'z_auto_loc': -3.0, 'z_auto_scale': 0.0}

    :param SVI svi: any ``SVI``, with any optimizer.
    :param SVIState state: a state of ``svi.init`` or ``svi.update``.
    :param args: positional arguments of model and guide, as for ``svi.update``.
    :param int num_draws: as for :func:`fisher`.
    :param float damping: as for :meth:`.FisherOperator.solve`.
    :param bool forward_mode_differentiation: as for ``svi.update``.
    :param kwargs: keyword arguments of model and guide, as for ``svi.update``.
    :return: a tree like the unconstrained parameters.
    :raises TypeError: if ``state`` is no ``SVIState``.
    :raises ValueError: if ``svi.init`` has not been called.
    """
    check_state(svi, state)
    check_count("num_draws", num_draws, "64")
    params, forward = initialised(svi).optim.get_params(state.optim_state), forward_mode_differentiation
    gradient = derivative(_loss(svi, params, state, args, kwargs), forward)(params)[0]
    return _fisher(svi, params, state, num_draws, args, kwargs, forward=forward).solve(gradient, damping)


def kl(svi: SVI, old: SVIState, new: SVIState, *args: Any, num_draws: int = 64, **kwargs: Any) -> Estimate:
    """KL(q_old ‖ q_new) between two states of a guide, nats.

    It is the mean over draws of q_old of a sum over sites: their KL if NumPyro has a closed form, else the log-ratio of
    their densities. Points of a guide (``Delta``) are left out, because the KL between two points is infinite.

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist, optax
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import kl
        >>> model = lambda: numpyro.sample("z", dist.Normal(0.0, 1.0))
        >>> svi = SVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
        >>> old, new = (svi.init(random.key(0), init_params={"z_auto_loc": m, "z_auto_scale": 1.0}) for m in (0.0, 2.0))
        >>> kl(svi, old, new)  # ½ (2 − 0)²
        Estimate(value=Array(2., dtype=float32), standard_error=Array(0., dtype=float32))

    :param SVI svi: any ``SVI``, with any optimizer.
    :param SVIState old: the state of q_old. Its key makes the draws.
    :param SVIState new: the state of q_new, of the same ``svi``.
    :param args: positional arguments of the guide.
    :param int num_draws: draws of q_old, at least 2 for a standard error.
    :param kwargs: keyword arguments of the guide.
    :return: the mean and its standard error, nats.
    :raises TypeError: if ``old`` or ``new`` is no ``SVIState``.
    :raises ValueError: if ``svi.init`` has not been called.
    :raises StructureError: if the guide has a flow without an inverse: it has no density at the draws of q_old.
    """
    check_state(svi, old, "old")
    check_state(svi, new, "new")
    check_count("num_draws", num_draws, "1000")
    before, after = ({**initialised(svi).get_params(s), **(s.mutable_state or {})} for s in (old, new))
    keys, kwargs = random.split(old.rng_key, num_draws), {**svi.static_kwargs, **kwargs}
    nats = lax.map(lambda key: log_ratios(svi.guide, key, before, after, args, kwargs), keys)
    return Estimate(jnp.mean(nats), jnp.std(nats, ddof=1) / jnp.sqrt(num_draws))


class ScaleByFisherState(NamedTuple):
    """The number of updates so far, which is folded into the key of :func:`scale_by_fisher`."""

    calls: jax.Array


def scale_by_fisher(
    svi: SVI, rng_key: jax.Array, *args: Any, num_draws: int = 64, damping: float | None = None, **kwargs: Any
) -> optax.GradientTransformation:
    """An optax transformation of gradients to natural gradients, g ↦ F⁻¹g (Amari 1998, theorem 1).

    :class:`.NaturalGradient` does more: less noise, coordinates in which a step is exact, and a step size.

    .. doctest::

        >>> import numpyro, numpyro.distributions as dist, optax
        >>> from jax import random
        >>> from numpyro.infer import SVI, TraceMeanField_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import scale_by_fisher
        >>> model = lambda: numpyro.sample("z", dist.Normal(3.0, 0.1))
        >>> svi = SVI(model, AutoNormal(model), optax.sgd(0.1), TraceMeanField_ELBO())
        >>> _ = svi.init(random.key(0))
        >>> optimizer = optax.chain(scale_by_fisher(svi, random.key(1)), optax.scale(-0.1))
        >>> result = SVI(model, svi.guide, optimizer, TraceMeanField_ELBO()).run(random.key(2), 100, progress_bar=False)
        >>> {name: round(float(x), 2) for name, x in result.params.items()}
        {'z_auto_loc': 3.0, 'z_auto_scale': 0.1}

    :param SVI svi: an ``SVI`` of the same model, guide and loss after ``svi.init``. Its optimizer is not used.
    :param jax.Array rng_key: PRNG key of the draws that F is a mean over; the number of the update is folded in.
    :param args: positional arguments of model and guide; they may be traced arrays.
    :param int num_draws: as for :func:`fisher`.
    :param float damping: as for :meth:`.FisherOperator.solve`.
    :param kwargs: keyword arguments of model and guide.
    :return: a transformation whose ``update`` needs the parameters.
    :raises TypeError: if ``rng_key`` is no key.
    :raises ValueError: if ``svi.init`` has not been called, or ``update`` is called without parameters.
    """
    initialised(svi)
    check_key(rng_key)
    check_count("num_draws", num_draws, "64")

    def init(params: Params) -> ScaleByFisherState:
        return ScaleByFisherState(jnp.array(0))

    def update(
        updates: Params, state: ScaleByFisherState, params: Params | None = None
    ) -> tuple[Params, ScaleByFisherState]:
        if params is None:
            raise ValueError("`scale_by_fisher` needs the parameters: expected `update(gradient, state, params)`.")
        at = SVIState(None, None, random.fold_in(rng_key, state.calls))
        scaled = _fisher(svi, params, at, num_draws, args, kwargs).solve(updates, damping)
        return scaled, ScaleByFisherState(state.calls + 1)

    return optax.GradientTransformation(init, update)


def _fisher(
    svi: SVI, params: Params, state: SVIState, num_draws: int, args: Any, kwargs: Any, *, forward: bool = False
) -> FisherOperator:
    """F of the sites of guide and model together, a mean over draws of the loss if F depends on any."""
    trace = trace_loss(_loss(svi, params, state, args, kwargs), params)
    model_sites = {name: site for name, site in trace.model_sites.items() if site.params}

    def surrogate(values: Params, key: jax.Array) -> jax.Array:
        fn = _loss(svi, params, state._replace(rng_key=key), args, kwargs)
        densities = guide_surrogates(fisher_sites(trace.sites)), model_surrogates(fisher_sites(model_sites), key)
        with Frozen(*densities):
            return fn(values)[0]

    sites: list[GuideSite | ModelSite] = [*trace.sites.values(), *model_sites.values()]
    exact = _is_exact(trace, sites)
    keys = random.split(state.rng_key, 2 if exact else num_draws + 1)

    def product(d: jax.Array) -> jax.Array:
        each = lambda key: surrogate_operator(lambda x: surrogate(x, key), params, key, forward=forward).product(d)
        return jnp.mean(lax.map(each, keys[1:]), axis=0)

    owners = frozenset().union(*(site.params for site in sites))
    owned = {p: jax.tree.map(lambda leaf, p=p: jnp.full_like(leaf, p in owners), x) for p, x in params.items()}
    linear = jax.linearize(product, jnp.zeros_like(ravel_pytree(params)[0]))[1]
    return FisherOperator(params, linear, keys[0], ravel_pytree(owned)[0] > 0, exact)


def _is_exact(trace: LossTrace, sites: list[GuideSite | ModelSite]) -> bool:
    """Whether F depends on no draw, so that one draw of the loss is enough."""
    arguments = [origin for site in trace.sites.values() for origin in site.arguments.values()]
    drawn = any(origin.is_drawn for origin in arguments) or any(isinstance(s, ModelSite) and s.drawn for s in sites)
    return not drawn and all(s.fisher_estimate == FisherEstimate.CLOSED_FORM and s.weight == 1 for s in sites)


class _Catch(_NumPyroOptim):
    """Not an optimizer: it keeps the loss function that ``SVI.update`` makes, and takes no step."""

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
