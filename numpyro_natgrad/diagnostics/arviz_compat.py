# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The draws of a verdict in ArviZ's groups, with log likelihoods and predictions.

It works with ArviZ 0.x, which is one package, and with 1.x, several with other signatures. ArviZ is imported inside of
the functions, because its import takes longer than a small fit.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.handlers import seed, substitute, trace, uncondition
from numpyro.infer import Predictive, log_likelihood

from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.kept import jit_for
from numpyro_natgrad.diagnostics.importance import FittedGuide
from numpyro_natgrad.diagnostics.verdict import Source, Verdict
from numpyro_natgrad.guide.gaussian_sites import Params
from numpyro_natgrad.infer.arguments import check_count, check_key
from numpyro_natgrad.options import StructureError

#: Groups that are computed from the model.
GROUPS = ("log_likelihood", "observed_data", "posterior_predictive")
#: Entries that a chunk of draws may have, by default: 32 MB in double precision, with its intermediate values.
ENTRIES_PER_CHUNK = 2**22
#: Entries of a group above which it is left out, unless it is named: 1 GiB in single precision.
LARGEST_GROUP = 2**28


def to_arviz(
    judged: Verdict,
    rng_key: jax.Array | None = None,
    *,
    groups: Sequence[str] | None = None,
    draws_per_chunk: int | None = None,
    **labels: Any,
) -> Any:
    """Give the draws of a verdict to ArviZ, as one chain, with log likelihoods, observed data and predictions.

    ``sample_stats`` has the ``log_weight`` (smoothed and normalised), ``lp_minus_lq``, ``log_p`` and ``log_q`` of each
    draw, nats, as ``arviz_stats.loo_approximate_posterior`` needs them.

    .. doctest::

        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import lax, random
        >>> from numpyro.infer import SVI, Trace_ELBO
        >>> from numpyro.infer.autoguide import AutoNormal
        >>> from numpyro_natgrad import NaturalGradient, to_arviz, verdict
        >>> def model(y):
        ...     z = numpyro.sample("z", dist.Normal(0, 1))
        ...     numpyro.sample("y", dist.Normal(z, 1).expand([3]), obs=y)
        >>> y = jnp.array([1.0, 2.0, 3.0])
        >>> svi = SVI(model, AutoNormal(model), NaturalGradient(), Trace_ELBO())
        >>> judged = verdict(svi, svi.init(random.key(0), y), random.key(1), y, num_draws=500)
        >>> data = to_arviz(judged, random.key(2), dims={"y": ["row"]})
        >>> data["log_likelihood"]["y"].dims, data["posterior_predictive"]["y"].shape
        (('chain', 'draw', 'row'), (1, 500, 3))

    :param Verdict judged: what :func:`verdict` returned.
    :param jax.Array rng_key: key for resampling by weights the draws of the importance-weighted moments, which makes
        them posterior draws without weights, and for predictions. If the verdict recommends its short chains, their
        states are the draws, and there are no ``sample_stats``. By default the draws are those of the guide, and there
        are no predictions.
    :param groups: names of the groups to compute from the model: ``"log_likelihood"``, ``"observed_data"``,
        ``"posterior_predictive"``. By default all that can be computed, if none has more than 2²⁸ entries.
    :param int draws_per_chunk: draws that are evaluated together, which bounds the memory of the device; by default as
        many as have 2²² log likelihoods or predictions.
    :param labels: ``dims`` and ``coords``, as for ``arviz.from_dict``.
    :return: ``InferenceData`` in ArviZ 0.x, ``xarray.DataTree`` in ArviZ 1.x.
    :raises StructureError: if the model sees a minibatch, so that a group in ``groups`` cannot be computed.
    :raises TypeError: if ``judged`` is not a verdict, or ``draws_per_chunk`` not an integer.
    :raises ValueError: if ``groups`` has another name, or predictions without ``rng_key``; if ``draws_per_chunk`` is
        not positive.
    """
    if not isinstance(judged, Verdict):
        raise TypeError(
            f"`to_arviz(<{type(judged).__name__}>)`: expected a `Verdict`, whose draws have importance weights. Call "
            "`to_arviz(verdict(svi, result, rng_key, *args))`."
        )
    _check(groups, rng_key, draws_per_chunk)
    draws, log_weights, weights, source = judged.draws, judged.log_weights, judged.weights, judged.source
    chains = source.chains if source is not None and judged.answer == "short_chains" else None
    if rng_key is not None and source is not None and chains is not None:
        states = {name: z.reshape(-1, *z.shape[2:]) for name, z in chains.draws.items()}
        draws, source = {n: states[n] for n in draws}, source._replace(drawn=source.drawn._replace(values=states))
        chosen, statistics = np.arange(chains.states), {}
    else:
        if rng_key is not None and source is not None and source.mixture is not None:
            drawn, weights = source.mixture.drawn, source.mixture.weights.normalised
            draws, log_weights = {name: drawn.values[name] for name in draws}, drawn.log_weights
            source = source._replace(drawn=drawn)
        chosen, statistics = _chosen(rng_key, weights), {"lp_minus_lq": log_weights}
        if source is not None:
            statistics |= {"log_p": source.drawn.log_p, "log_q": source.drawn.log_p - log_weights}
        if rng_key is None:
            with np.errstate(divide="ignore"):
                statistics["log_weight"] = np.log(weights)
    computed = _Groups(source, chosen, rng_key, draws_per_chunk).of(groups) if source else {}
    posterior = {name: z[chosen] for name, z in draws.items()}
    data = computed.pop("observed_data", None)
    of_draws = {"posterior": posterior, "sample_stats": {name: x[chosen] for name, x in statistics.items()}, **computed}
    found: dict[str, Any] = {group: _one_chain(values) for group, values in of_draws.items() if values}
    return _from_dict(found | ({"observed_data": data} if data else {}), labels)


def _chosen(rng_key: jax.Array | None, weights: np.ndarray) -> np.ndarray:
    """Numbers of all draws, or of as many by their weights."""
    count = weights.size
    if rng_key is None:
        return np.arange(count)
    return np.asarray(random.choice(rng_key, count, (count,), p=jnp.asarray(weights)))


def _from_dict(groups: dict[str, Any], labels: dict[str, Any]) -> Any:
    import arviz

    from_dict: Any = arviz.from_dict
    if "InferenceData" in vars(arviz):  # 0.x takes groups as keywords, 1.x as a dict
        return from_dict(**groups, **labels)
    return from_dict(groups, **labels)


def _one_chain(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: np.asarray(x)[None] for name, x in values.items()}


def _check(groups: Any, rng_key: jax.Array | None, draws_per_chunk: Any) -> None:
    several = isinstance(groups, Iterable) and not isinstance(groups, str)
    wrong = [x for x in groups or () if x not in GROUPS] if several or groups is None else groups
    if wrong != []:
        raise ValueError(f"`groups` has {wrong!r}: expected a list of some of {list(GROUPS)}.")
    if groups is not None and "posterior_predictive" in groups and rng_key is None:
        raise ValueError(
            "`groups` has 'posterior_predictive', and there is no `rng_key`: expected a key, by which draws of the "
            "guide become draws of the posterior. Call `to_arviz(judged, rng_key, ...)`."
        )
    if rng_key is not None:
        check_key(rng_key)
    if draws_per_chunk is not None:
        check_count("draws_per_chunk", draws_per_chunk, "100")


class _Groups:
    """What the model says of its observed sites, at draws number ``chosen`` of a verdict."""

    def __init__(
        self, source: Source, chosen: np.ndarray, rng_key: jax.Array | None, draws_per_chunk: int | None
    ) -> None:
        self.fitted, self.chosen, self.draws_per_chunk = source.fitted, chosen, draws_per_chunk
        self.subsampled = list(source.drawn.sites.subsampled)
        self.latent = {name: source.drawn.values[name] for name in source.drawn.sites.latent}
        self.predict = rng_key is not None
        self.keys = random.split(random.key(0) if rng_key is None else random.fold_in(rng_key, 1), chosen.size)

    def of(self, groups: Sequence[str] | None) -> dict[str, dict[str, np.ndarray]]:
        """The named groups, or all that can be computed and are not too large; a group without sites is left out."""
        if self.subsampled and groups:
            raise StructureError(
                f"the plates {self.subsampled} see a minibatch, so that {list(groups)} would be those of one "
                "minibatch: expected all of the data. Call `verdict` with it (`subsample_size=None`)."
            )
        data = {} if self.subsampled or groups == () else self._data()
        known: dict[str, Callable[..., Params]] = {"log_likelihood": _log_likelihoods}
        if self.predict:
            known["posterior_predictive"] = _predictions
        chosen = [name for name in known if data and (groups is None or name in groups)]
        found = {name: self._each(name, known[name], tuple(data), named=groups is not None) for name in chosen}
        if groups is None or "observed_data" in groups:
            found["observed_data"] = data
        return {name: values for name, values in found.items() if values}

    def _data(self) -> dict[str, np.ndarray]:
        """The observed values of the model, without those of ``numpyro.factor``, which have no entries."""
        first = {name: z[0] for name, z in self.latent.items()}
        found = fetch(jit_for(self.fitted.svi, _observed, self.fitted, first)())
        return {name: x for name, x in found.items() if x.size}

    def _each(
        self, group: str, one: Callable[..., Params], names: tuple[str, ...], named: bool
    ) -> dict[str, np.ndarray]:
        """``one`` of each draw, in chunks of one size, so that one program is compiled."""
        count, first = self.chosen.size, {name: z[0] for name, z in self.latent.items()}
        try:
            shapes = jax.eval_shape(partial(one, names, self.fitted), first, self.keys[0])
        except NotImplementedError:  # a distribution that cannot be sampled
            if named:
                raise
            return {}
        entries = max(sum(x.size for x in shapes.values()), 1)
        if entries * count > LARGEST_GROUP and not named:
            warnings.warn(
                f"`{group}` has {entries} entries for each of {count} draws, and was left out: name it in `groups` to "
                "compute it all the same, or take a smaller `num_draws` for the verdict.",
                stacklevel=4,
            )
            return {}
        size = min(self.draws_per_chunk or max(ENTRIES_PER_CHUNK // entries, 1), count)
        chunks = []
        for begin in range(0, count, size):
            at = np.minimum(np.arange(begin, begin + size), count - 1)
            latent = {name: z[self.chosen[at]] for name, z in self.latent.items()}
            chunk = jit_for(self.fitted.svi, _chunk, self.fitted, one, names, latent, self.keys[at])
            chunks.append(fetch(chunk()))
        return {name: np.concatenate([x[name] for x in chunks])[:count] for name in shapes}


def _observed(fitted: FittedGuide, latent: Params) -> Params:
    """The values of all observed sites."""
    model = substitute(seed(fitted.svi.model, random.key(0)), data={**fitted.params, **latent})
    sites = trace(model).get_trace(*fitted.args, **fitted.kwargs)
    return {n: x["value"] for n, x in sites.items() if x["type"] == "sample" and x["is_observed"]}


def _chunk(
    fitted: FittedGuide, one: Callable[..., Params], names: tuple[str, ...], latent: Params, keys: jax.Array
) -> Params:
    each = lambda inputs: one(names, fitted, *inputs)
    return (jax.vmap(each) if fitted.vectorized else partial(lax.map, each))((latent, keys))


def _log_likelihoods(names: tuple[str, ...], fitted: FittedGuide, latent: Params, key: jax.Array) -> Params:
    """Log likelihoods of the observed sites at one draw."""
    model = substitute(seed(fitted.svi.model, key), data=dict(fitted.params))
    found = log_likelihood(model, latent, *fitted.args, batch_ndims=0, **fitted.kwargs)
    return {name: found[name] for name in names}


def _predictions(names: tuple[str, ...], fitted: FittedGuide, latent: Params, key: jax.Array) -> Params:
    """New values of the observed sites for one draw."""
    model = uncondition(substitute(fitted.svi.model, data=dict(fitted.params)))
    predictive = Predictive(model, latent, return_sites=list(names), batch_ndims=0)
    return predictive(key, *fitted.args, **fitted.kwargs)
