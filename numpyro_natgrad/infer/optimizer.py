# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The seam into ``numpyro.infer.SVI``: an optimizer like any other, which only orders the calls."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from numpyro.infer.svi import SVIState
from numpyro.optim import _NumPyroOptim

from numpyro_natgrad import options
from numpyro_natgrad.blocks.partition import Partition, partition_parameters
from numpyro_natgrad.infer.report import table
from numpyro_natgrad.step import fallback
from numpyro_natgrad.step.natural_step import Context, natural_step
from numpyro_natgrad.step.state import State, StepInfo, initial


class NaturalGradient(_NumPyroOptim):
    """Natural-gradient steps for :class:`~numpyro.infer.svi.SVI`; it needs neither guide nor data nor learning rate.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoMultivariateNormal
        >>> from numpyro_natgrad import NaturalGradient
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0, 10).expand([2]).to_event(1))
        ...     numpyro.sample("y", dist.Normal(z, 1).to_event(1), obs=y)
        >>> svi = SVI(model, AutoMultivariateNormal(model), NaturalGradient(), Trace_ELBO(num_particles=4))
        >>> result = svi.run(random.key(0), 20, jnp.array([1.0, -2.0]), progress_bar=False)
        >>> [round(float(x), 2) for x in result.params["auto_loc"]]
        [0.99, -1.98]

    :param step_size: ρ, the share of the way to the minimum of the local model: a positive number, a schedule
        ``step -> number`` (any optax schedule), or ``None`` for the rule that needs no choice (:mod:`.step_size`).
    :param max_kl: KL in nats that one step may move the guide: a positive number, ``"adaptive"`` (a radius that grows
        while steps deliver what they promise), or ``None`` for no limit.
    :param estimator: where the covariance's natural gradient comes from: ``"second_order"`` (Price's identity, products
        with the Hessian of the loss), ``"first_order"`` (draws ⊗ gradients), or ``None`` to choose by the number of
        latents: where the draws of a step and a half are more than the latents, gradients are regressed on draws
        (:mod:`.stein_regression`; with products instead where ``step_size`` or ``max_kl`` is yours).
    :param path_gradient: leave out the score term of the gradient, which has zero mean, wherever that is valid. (The
        second-order estimator takes the entropy in closed form and has none.)
    :param fisher: by which route the Fisher is got: ``"closed_form"``, ``"kl_hessian"``, ``"monte_carlo"``,
        ``"empirical"`` (:func:`.resolve_fisher_method`), or ``None`` for the best one of every site.
    :param point_optimizer: an optax transformation or a NumPyro optimizer for parameters that no distribution of the
        guide owns: ``param`` statements of the model, points of ``AutoDelta``. By default they take the natural
        gradient of the likelihood, and ``optax.adam(1e-2)`` moves what has no Fisher there either.
    :raises ValueError: if an option cannot be used.

    ``get_params`` returns the average of the iterates that noise rules (with a ``step_size`` of yours, the last
    iterate); the gradient is taken at the last one, ``state.params``.

    **References:** Amari (1998), *Natural gradient works efficiently in learning*; Khan & Rue (2023), *The Bayesian
    learning rule*, JMLR 24; Kristiadi (2018), *Natural gradient descent*.
    """

    def __init__(
        self,
        step_size: float | Callable[[Any], Any] | None = None,
        *,
        max_kl: float | Literal["adaptive"] | None = "adaptive",
        estimator: options.Estimator | None = None,
        path_gradient: bool = True,
        fisher: options.Fisher | None = None,
        fallback_optimizer: Any = None,
    ) -> None:
        ordinary = fallback_optimizer is not None
        self._options = options.checked(step_size, max_kl, estimator, path_gradient, fisher, ordinary=ordinary)
        fallback.checked(fallback_optimizer)
        self._fallback_optimizer = fallback_optimizer
        self._structure: Partition | None = None

    def init(self, params: dict[str, Any]) -> tuple[jax.Array, State]:
        """The state before the first step.

        :raises ValueError: if there is no parameter, or one that has no derivatives.
        """
        if not jax.tree.leaves(params):
            raise ValueError(
                "the guide and the model have no parameters, so there is nothing to fit; expected at least one "
                "`numpyro.param` site. Use an autoguide such as `AutoMultivariateNormal(model)`, or add a `param`."
            )
        discrete = [name for name, x in params.items() if not all(map(_is_floating, jax.tree.leaves(x)))]
        if discrete:
            raise ValueError(
                f"the parameters {discrete} are not floating point numbers, so the loss has no derivative with respect "
                "to them; expected floats. Write `numpyro.param(name, 1.0)` instead of `1`, or make them constants."
            )
        return jnp.array(0), initial(params, self._point.init(params))

    def eval_and_update(
        self, fn: Callable, state: tuple[jax.Array, State], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, State]]:
        """Evaluate the loss and take one step.

        :param fn: ``params -> (loss, mutable_state)``, as ``SVI`` makes it.
        :return: ``((loss, mutable_state), state)``, the loss at the iterate before the step, in nats.
        """
        step, carried = state
        self._structure = partition_parameters(fn, carried.params, self._options, forward_mode_differentiation)
        context = Context(self._structure, self._options, self._point, forward_mode_differentiation)
        loss_info, new = natural_step(fn, context, step, carried)
        return (loss_info.loss, loss_info.aux), (step + 1, new)

    def eval_and_stable_update(
        self, fn: Callable, state: tuple[jax.Array, State], forward_mode_differentiation: bool = False
    ) -> tuple[tuple[jax.Array, Any], tuple[jax.Array, State]]:
        """The same step: it is always stable. The loss is ``nan`` where it was not finite."""
        (loss, aux), new = self.eval_and_update(fn, state, forward_mode_differentiation)
        return (jnp.where(jnp.isfinite(loss), loss, jnp.nan), aux), new

    def update(self, g: Any, state: Any, value: Any = None) -> Any:
        """Not available: a gradient alone does not say which distribution it belongs to.

        :raises TypeError: always.
        """
        raise TypeError(
            "NaturalGradient needs the loss function, not its gradient alone: expected a call of "
            "`eval_and_update(fn, state)`, as `SVI.update` makes it. Use it as the `optim` of `SVI`."
        )

    def get_params(self, state: tuple[jax.Array, State]) -> dict[str, Any]:
        """The averaged iterate, unconstrained."""
        return state[1].average

    def info(self, state: Any) -> StepInfo:
        """The last step in numbers.

        :param state: an ``SVIState`` (``svi.update``'s, or ``svi.run(...).state``) or this optimizer's own state.
        """
        optim_state = state.optim_state if isinstance(state, SVIState) else state
        return optim_state[1].info

    def report(self) -> str:
        """Which way every parameter takes: parameter → site → family → how the Fisher is got → size.

        :raises RuntimeError: if no loss has been heard yet.
        """
        if self._structure is None:
            raise RuntimeError("nothing has been fitted yet: call `svi.run` or `svi.update` first, then `report()`.")
        return table(self._structure.rows())

    @property
    def aside(self) -> tuple[str, ...]:
        """The parameters that the ordinary optimizer moves, as far as has been heard."""
        return tuple(self._structure.point) if self._structure else ()

    @property
    def _point(self) -> fallback.FallbackOptimizer:
        return fallback.checked(self._fallback_optimizer)

    def __getstate__(self) -> dict[str, Any]:
        # What was heard belongs to a loss function of this process.
        return {**self.__dict__, "_structure": None}


def _is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))
