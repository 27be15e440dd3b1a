# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a user is warned of when a loss is partitioned: parameters and losses that take plainer steps than asked for."""

import warnings
from collections.abc import Mapping, Sequence

from numpyro_natgrad.blocks.base import Block
from numpyro_natgrad.guide.handlers import DensityMode
from numpyro_natgrad.guide.trace import LossTrace
from numpyro_natgrad.options import Options

_NO_ELBO = "NaturalGradient: the loss is not affine in the guide's log-densities, so it is no ELBO (a Rényi bound). {}"

_SCALED = (
    "NaturalGradient: the loss is {} times an ELBO, so that its second derivatives are not the precision of "
    "the best guide. {} Leave the factor out: steps do not depend on the unit of the loss. To weight the prior or "
    "the likelihood, use `numpyro.handlers.scale`."
)

_SCORE_FUNCTIONS = (
    "NaturalGradient: the loss is not affine in the guide's log-densities, because the gradients of the sites {} are "
    "score functions. {} If their values are few, sum over them with `TraceEnum_ELBO`; else use more particles."
)

_PLAIN_METRIC = (
    "Steps use the plain Fisher metric: gradients without the path estimator and without second derivatives. A step of "
    "size 1 is then not exact on conjugate models, and expect noisier steps."
)

_FIRST_ORDER = (
    "NaturalGradient: `estimator='second_order'` was requested, but the parameters {} take first-order steps: second "
    "derivatives help single Gaussian sites and losses that are an ELBO."
)


_SCANNED = (
    "NaturalGradient: the guide draws the sites {} inside of `scan`, where effect handlers run after a draw has been "
    "used. The fallback optimizer moves their parameters. Draw all steps as one site outside of the scan for "
    "natural-gradient steps."
)

_UNOWNED = (
    "NaturalGradient: no distribution that it can read owns the parameters {}, so they have no Fisher matrix and "
    "follow `optax.adam(1e-2)`.{} Choose an optimizer for them by `fallback_optimizer=`, which also ends this warning."
)

_ENUMERATED = " (A loss that sums over discrete sites hides the distributions of the model.)"


def warn_of_trace(trace: LossTrace) -> None:
    if not trace.is_elbo:
        scores = [name for name, site in trace.sites.items() if site.is_score_function]
        if trace.factor != 1:
            text = _SCALED.format(f"{trace.factor:.3g}", _PLAIN_METRIC)
        else:
            text = _SCORE_FUNCTIONS.format(scores, _PLAIN_METRIC) if scores else _NO_ELBO.format(_PLAIN_METRIC)
        warnings.warn(text, stacklevel=6)
    if trace.scanned:
        warnings.warn(_SCANNED.format(sorted(trace.scanned)), stacklevel=6)


def warn_of_unowned(unowned: Mapping[str, int], trace: LossTrace, options: Options) -> None:
    """Name the parameters that the fallback optimizer moves, unless it is the user's choice or their gradient is 0."""
    moved = [p for p in unowned if p in trace.loss_params]
    if moved and not options.has_fallback:
        warnings.warn(_UNOWNED.format(moved, "" if trace.model_sites else _ENUMERATED), stacklevel=6)


def warn_of_first_order(blocks: Sequence[Block], options: Options) -> None:
    second = [block.hessian_params or DensityMode.ANTITHETIC in block.density_modes.values() for block in blocks]
    first_order = [p for block, has in zip(blocks, second, strict=True) if not has for p in block.params]
    if options.estimator == "second_order" and first_order:
        warnings.warn(_FIRST_ORDER.format(first_order), stacklevel=6)
