# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""``NaturalGradient``: the optimizer that ``numpyro.infer.SVI`` calls. The work is done in :mod:`.step`."""

from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from numpyro.infer.svi import SVI, SVIState
from numpyro.optim import _NumPyroOptim

from numpyro_natgrad import options
from numpyro_natgrad.blocks.partition import Partition, partition_parameters
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.guide.handlers import Loss
from numpyro_natgrad.infer.arguments import check_state, initialised, shown
from numpyro_natgrad.infer.fisher import _loss
from numpyro_natgrad.step import fallback
from numpyro_natgrad.step.natural_step import Context, natural_step
from numpyro_natgrad.step.state import NaturalGradientState, StepInfo, initial

OptimizerState = tuple[jax.Array, NaturalGradientState]


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

    :param float step_size: ρ, the fraction of the way to the minimum of the local model: a positive number, a schedule
        ``step -> number`` (any optax schedule), or ``None`` for the adaptive rule (:mod:`.step_size`).
    :param float max_kl: largest KL divergence, nats, by which one step may change the guide: a positive number,
        ``"adaptive"`` (a trust-region radius, :mod:`.trust_region`), or ``None`` for no limit.
    :param str estimator: where the covariance's natural gradient comes from: ``"second_order"`` (Price's identity,
        Hessian-vector products of the loss), ``"first_order"`` (draws ⊗ gradients), or ``None`` to choose by the number
        of latents: with fewer than 1.5 times the draws of a step, gradients are regressed on draws
        (:mod:`.stein_regression`), unless ``step_size`` or ``max_kl`` is given.
    :param bool path_gradient: leave out the score term of the gradient, which has zero mean, wherever that is valid.
        (The second-order estimator takes the entropy in closed form and has no score term.)
    :param str fisher: how Fisher matrices are computed: ``"closed_form"``, ``"kl_hessian"``, ``"monte_carlo"``,
        ``"empirical"`` (:func:`.resolve_fisher_method`), or ``None`` for the best method at every site.
    :param fallback_optimizer: an optax transformation or a NumPyro optimizer for parameters that no distribution of the
        guide owns: ``param`` statements of the model, points of ``AutoDelta``. By default these follow the natural
        gradient of the likelihood, or ``optax.adam(1e-2)`` if they have no Fisher matrix there either.
    :raises ValueError: if an option cannot be used.
    :raises TypeError: if an option is of the wrong type.

    ``get_params`` returns the average of the iterates over the stationary steps, or the last iterate if ``step_size``
    is given. Gradients are taken at the last iterate, ``NaturalGradientState.params``.

    **References:** Amari (1998), *Natural gradient works efficiently in learning*, Neural Computation 10; Khan & Rue
    (2023), *The Bayesian learning rule*, JMLR 24; Kristiadi (2018), *Natural gradient descent*.
    """

    def __init__(
        self,
        step_size: float | Callable[[Any], Any] | None = None,
        *,
        max_kl: float | Literal["adaptive"] | None = "adaptive",
        estimator: options.Estimator | None = None,
        path_gradient: bool = True,
        fisher: options.FisherMethod | None = None,
        fallback_optimizer: Any = None,
    ) -> None:
        has_fallback = fallback_optimizer is not None
        self._options = options.checked(step_size, max_kl, estimator, path_gradient, fisher, has_fallback=has_fallback)
        fallback.fallback_optimizer(fallback_optimizer)
        self._fallback_optimizer = fallback_optimizer

    def init(self, params: Params) -> OptimizerState:
        """The state before the first step. Without parameters steps evaluate the loss and change nothing.

        :raises ValueError: if a parameter is neither float32 nor float64.
        """
        discrete = [name for name, x in params.items() if not all(map(_is_floating, jax.tree.leaves(x)))]
        if discrete:
            raise ValueError(
                f"the parameters {discrete} are not floating point numbers, so the loss has no derivative with respect "
                "to them; expected floats. Write `numpyro.param(name, 1.0)` instead of `1`, or make them constants."
            )
        types = {name: jnp.result_type(x).name for name, tree in params.items() for x in jax.tree.leaves(tree)}
        if other := {name: dtype for name, dtype in types.items() if dtype not in ("float32", "float64")}:
            raise ValueError(
                f"the parameters {other} have a precision in which matrices cannot be factorised; expected float32 or "
                "float64. Make them float32, as by `numpyro.param(name, jnp.zeros(3, jnp.float32))`, and convert them "
                "where the model or guide uses them."
            )
        return jnp.array(0), initial(params, self._fallback.init(params), self._options.constants)

    def eval_and_update(
        self, fn: Loss, state: OptimizerState, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[jax.Array, Any], OptimizerState]:
        """Evaluate the loss and take one step.

        :param fn: ``params -> (loss, mutable_state)``, as ``SVI`` makes it.
        :return: ``((loss, mutable_state), state)``, the loss at the iterate before the step, in nats: the mean
            over the draws of the step, of which a joint Gaussian block makes at least eight.
        """
        step, carried = state
        if not jax.tree.leaves(carried.params):
            return fn(carried.params), (step + 1, carried)
        partition = self._partition(fn, carried.params, forward_mode_differentiation)
        context = Context(partition, self._options, self._fallback)
        loss_info, new = natural_step(fn, context, step, carried)
        return (loss_info.loss, loss_info.aux), (step + 1, new)

    def eval_and_stable_update(
        self, fn: Loss, state: OptimizerState, forward_mode_differentiation: bool = False
    ) -> tuple[tuple[jax.Array, Any], OptimizerState]:
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

    def get_params(self, state: OptimizerState) -> Params:
        """The averaged iterate (the last one if ``step_size`` is given), unconstrained."""
        return state[1].average

    def info(self, state: SVIState | OptimizerState) -> StepInfo:
        """The figures of the last step.

        :param state: an ``SVIState`` of ``svi.update`` or ``svi.run(...).state``, or this optimizer's own state.
        :raises TypeError: if it is neither.
        """
        optim_state = state.optim_state if isinstance(state, SVIState) else state
        if not (isinstance(optim_state, tuple) and isinstance(optim_state[-1], NaturalGradientState)):
            raise TypeError(f"`state={shown(state)}`: expected a state of an `SVI` with this optimizer.")
        return optim_state[1].info

    def report(
        self, svi: SVI, state: SVIState, *args: Any, forward_mode_differentiation: bool = False, **kwargs: Any
    ) -> str:
        """A table with one row for each parameter: site, distribution, computation of the Fisher matrix, size.

        The loss is traced, not run. :func:`.fit` returns the same table as ``FitResult.report``.

        .. doctest::

            >>> import numpyro, numpyro.distributions as dist
            >>> from jax import random
            >>> from numpyro.infer import SVI, Trace_ELBO
            >>> from numpyro.infer.autoguide import AutoNormal
            >>> from numpyro_natgrad import NaturalGradient
            >>> model = lambda: numpyro.sample("z", dist.Gamma(2.0, 1.0))
            >>> svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO())
            >>> print(svi.optim.report(svi, svi.init(random.key(0))))
            parameter     site  family          Fisher                                                       size
            ─────────────────────────────────────────────────────────────────────────────────────────────────────
            z_auto_loc    z     Normal          closed form, regression of gradients, full-covariance proxy  1
            z_auto_scale  z     Normal (scale)  closed form, regression of gradients, full-covariance proxy  1

        :param SVI svi: the ``SVI`` whose loss this optimizer minimises, after ``svi.init`` or ``svi.run``.
        :param SVIState state: a state of ``svi``.
        :param args: positional arguments of model and guide, as for ``svi.update``.
        :param bool forward_mode_differentiation: as for ``svi.update``.
        :param kwargs: keyword arguments of model and guide, as for ``svi.update``.
        :return: the table.
        :raises TypeError: if ``state`` is no ``SVIState``.
        :raises ValueError: if ``svi.init`` has not been called.
        """
        check_state(svi, state)
        params = initialised(svi).optim.get_params(state.optim_state)
        fn = _loss(svi, params, state, args, kwargs)
        return table(self._partition(fn, params, forward_mode_differentiation).rows())

    def _partition(self, fn: Loss, params: Params, forward: bool) -> Partition:
        """Find the block of every parameter of the loss ``fn``, which is traced and not run."""
        return partition_parameters(fn, params, self._options, forward)

    @property
    def _fallback(self) -> fallback.FallbackOptimizer:
        # Made anew, since optax transformations cannot be pickled.
        return fallback.fallback_optimizer(self._fallback_optimizer)


def _is_floating(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.floating))


#: Columns of :func:`table`.
HEADER = ("parameter", "site", "family", "Fisher", "size")


def table(rows: Sequence[tuple[str, ...]], header: tuple[str, ...] = HEADER) -> str:
    """Rows under a header, aligned, as one string."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    return "\n".join([text[0], "─" * len(text[0]), *text[1:]])
