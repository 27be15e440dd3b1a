# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Several random starts take their first steps in one ``vmap``, and the best of them is fitted.

After 20, 40, 80, ... steps the ELBOs of all starts are compared at common fresh draws. The better half stays, and so
does every other start that is not behind the best by more than noise. All starts stay in the batch, so that its shape
does not change and one program is compiled; the comparison ends early once those that stay agree.
"""

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from numpyro.infer.autoguide import AutoContinuous
from numpyro.infer.svi import SVI, SVIState

from numpyro_natgrad.compilation.data import Data
from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.initial import new_guide
from numpyro_natgrad.infer.loop import STEPS_PER_CHUNK, Program, StepRecords
from numpyro_natgrad.options import StructureError


class StartsConstants(NamedTuple):
    """Every number of the choice between starts."""

    #: Steps before the first comparison; each further one comes after twice as many.
    first: int = 20
    #: Losses, each a mean over the particles of the fit, from which an ELBO is estimated.
    losses: int = 64
    #: Nats within which two starts agree, and standard errors of a difference that count as noise.
    agree: float = 0.3
    errors: float = 2.0


STARTS = StartsConstants()
#: Folded into the key of the run: for the other starts, and for the draws at which starts are compared.
START_KEY = 0x73746172
#: What NumPyro and JAX raise for a model or guide that ``vmap`` cannot run.
CANNOT_BE_MAPPED = (jax.errors.JAXTypeError, NotImplementedError, TypeError, ValueError)


def cause_of(error: Exception) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


class Starts(NamedTuple):
    """How the best of several starts was chosen.

    :ivar numpy.ndarray elbo: ELBO of each start when the best was chosen, nats, ``(num_starts,)``.
    :ivar numpy.ndarray elbo_error: its standard error, nats; starts share their draws.
    :ivar int steps: steps that each start took before.
    :ivar int chosen: index of the best start; 0 is the start of ``num_starts=1``.
    :ivar int near: how many starts, with the best, are within 0.3 nats of it.
    """

    elbo: np.ndarray
    elbo_error: np.ndarray
    steps: int
    chosen: int
    near: int

    def __str__(self) -> str:
        count, best = len(self.elbo), self.elbo[self.chosen]
        text = f"best of {count} starts after {self.steps} steps: ELBO {best:.2f} ± {self.elbo_error[self.chosen]:.2f}"
        if not np.isfinite(best):
            return text
        behind, lost = best - self.elbo[np.isfinite(self.elbo)], int(np.sum(~np.isfinite(self.elbo)))
        text += f"; {self.near} within {STARTS.agree} nats"
        if self.near + lost < count:
            text += f", others up to {behind.max():.2g} nats behind"
        return text + (f", {lost} not finite" if lost else "")


def check_num_starts(num_starts: Any, others: dict[str, Any]) -> None:
    """Refuse a number of starts that cannot be used, or arguments that already name a start."""
    expected = f"`num_starts={num_starts!r}`: expected a positive integer, such as 8; 1 fits a single start."
    if isinstance(num_starts, bool) or not isinstance(num_starts, int | np.integer):
        raise TypeError(expected)
    if num_starts < 1:
        raise ValueError(expected)
    given = [f"`{name}`" for name, x in others.items() if x is not None]
    if num_starts > 1 and given:
        raise ValueError(
            f"`num_starts={num_starts}` and {' and '.join(given)} were given: expected `num_starts=1` beside them, "
            "since several starts are random and compared on the same data. Leave one of them out."
        )


class SeveralStarts:
    """Several random starts of one fit; their programs are traced at once, and compiled in the background.

    :param key: of the run.
    :param first: the first start.
    :raises StructureError: if the starts would share mutable sites.
    :raises ValueError: if ``vmap`` cannot run model or guide.
    """

    def __init__(
        self, svi: SVI, key: jax.Array, first: SVIState, program: Program, num_starts: int, data: Data
    ) -> None:
        if first.mutable_state is not None:
            raise StructureError(
                f"`num_starts={num_starts}`: expected a model without mutable state, which the starts would share, but "
                f"it has the mutable sites {sorted(first.mutable_state)}. Use `num_starts=1`."
            )
        self._first, self._program, self._count, self._data = first, program, num_starts, data
        self._key = random.fold_in(key, START_KEY)
        self._keys = random.split(self._key, num_starts - 1)
        shared = Data((None,) * len(data.inputs), data.constants)
        begin = partial(_beside, svi, stacked_starts(svi, shared))
        draws = random.split(self._key, STARTS.losses)
        states = jax.tree.map(lambda x: jax.ShapeDtypeStruct((num_starts, *jnp.shape(x)), x.dtype), first)
        try:
            self._begin = program.kept("beside the first", begin, first, self._keys, data)
            self._losses = program.kept(("losses", shared.inputs), stacked_losses(svi, shared), states, draws, data)
            _, self._advance = program.together(states, data, shared)
        except CANNOT_BE_MAPPED as error:
            raise ValueError(
                f"`num_starts={num_starts}`: expected a model and a guide that `jax.vmap` can run for all starts at "
                f"once, but {cause_of(error)}. Use `num_starts=1`, once for each start and with a new guide."
            ) from error

    def states(self) -> SVIState:
        """The first start and the others, stacked."""
        states, same = self._begin.result()(self._first, self._keys, self._data)
        if same:
            warnings.warn(
                f"`num_starts={self._count}`: all starts have the same parameters, so that only their draws differ. "
                "Use `init_loc_fn=init_to_uniform` in an autoguide, or draw the initial values of `numpyro.param` "
                "by `lambda key: ...`.",
                stacklevel=5,
            )
        return states

    def best(self, most: int, show: Callable[[str], None]) -> tuple[SVIState, StepRecords | None, Starts]:
        """The state of the best start, the records of its steps, and how it was chosen.

        :param most: the most steps of each start.
        """
        states, everyone = self.states(), np.ones(self._count, bool)
        losses = self._compared(states, self._key)
        stay, records, steps, target = everyone, [], 0, STARTS.first
        while _undecided(losses, stay) or not steps:
            target = min(target, most // STEPS_PER_CHUNK * STEPS_PER_CHUNK)
            if steps >= target:
                break
            for _ in range(steps, target, STEPS_PER_CHUNK):
                states, part = self._advance.result()(states, STEPS_PER_CHUNK, everyone, self._data)
                records.append(fetch(part))
            steps, target = target, 2 * target
            losses = self._compared(states, random.fold_in(self._key, steps))
            stay = stay & _staying(losses, stay)
            show(f"{self._count} starts, {steps} steps, {stay.sum()} not behind")
        found = _summary(losses, stay, steps)
        records = [jax.tree.map(lambda x: x[found.chosen], part) for part in records]
        return entry(self._program, states, found.chosen), _joined(records) if records else None, found

    def _compared(self, states: SVIState, key: jax.Array) -> np.ndarray:
        return fetch(self._losses.result()(states, random.split(key, STARTS.losses), self._data))


def entry(program: Program, tree: Any, index: int) -> Any:
    """One entry of stacked arrays."""
    pick = lambda tree, i: jax.tree.map(lambda x: x[i], tree)
    return program.kept("entry", pick, tree, np.int32(index)).result()(tree, np.int32(index))


def stacked_starts(svi: SVI, axes: Data) -> Callable[[jax.Array, Data], SVIState]:
    """A function that makes a start for each key, stacked; an autoguide is set up anew for each of them."""

    def begin(key: jax.Array, data: Data) -> SVIState:
        args, kwargs = data.arguments()
        other = copy.copy(svi)
        other.guide = new_guide(svi.guide)
        return _in_order(svi, other.guide, other.init(key, *args, **kwargs))

    return jax.vmap(begin, in_axes=(0, axes))


def _beside(
    svi: SVI, others: Callable[[jax.Array, Data], SVIState], first: SVIState, keys: jax.Array, data: Data
) -> tuple[SVIState, jax.Array]:
    """The first start and the others, stacked, and whether all have the same parameters."""
    states = jax.tree.map(lambda x, xs: jnp.concatenate([x[None], xs]), first, others(keys, data))
    params = jax.tree.leaves(svi.optim.get_params(states.optim_state))
    same = [jnp.all(jnp.isclose(x, x[:1], equal_nan=True)) for x in params]
    return states, jnp.all(jnp.stack(same))


def _in_order(svi: SVI, guide: Any, state: SVIState) -> SVIState:
    """The start of another set-up of a guide, with the latents in the order of ``svi.guide``.

    ``AutoContinuous`` keeps them in the order of the model, or in that of the alphabet if it is set up inside of a
    compiled function.
    """
    name = f"{getattr(guide, 'prefix', '')}_loc"
    params = svi.optim.get_params(state.optim_state)
    if not isinstance(guide, AutoContinuous) or name not in params:
        return state
    latents = guide._unpack_latent(params[name])
    loc = jnp.concatenate([jnp.ravel(latents[site]) for site in svi.guide._init_locs])
    return state._replace(optim_state=svi.optim.init({**params, name: loc}))


def stacked_losses(svi: SVI, axes: Data) -> Callable[[SVIState, jax.Array, Data], jax.Array]:
    """A function for losses ``(states, keys)`` of stacked states at common draws."""

    def one(state: SVIState, key: jax.Array, data: Data) -> jax.Array:
        args, kwargs = data.arguments()
        return svi.evaluate(state._replace(rng_key=key), *args, **kwargs)

    each = jax.vmap(one, in_axes=(0, None, axes))
    return lambda states, keys, data: lax.map(lambda key: each(states, key, data), keys).T


def _means(losses: np.ndarray) -> np.ndarray:
    """Mean losses, infinite where any loss is not finite."""
    means = losses.astype(np.float64).mean(1)
    return np.where(np.isfinite(means), means, np.inf)


def _behind(losses: np.ndarray, best: int) -> tuple[np.ndarray, np.ndarray]:
    """By how many nats each start is behind the best one, and the standard error, at common draws."""
    if not np.isfinite(losses[best]).all():
        return np.zeros(len(losses)), np.zeros(len(losses))
    difference = losses.astype(np.float64) - losses[best]
    lost = ~np.isfinite(difference).all(1)
    difference = np.where(lost[:, None], 0.0, difference)
    error = difference.std(1, ddof=1) / np.sqrt(losses.shape[1])
    return np.where(lost, np.inf, difference.mean(1)), error


def _best(losses: np.ndarray, stay: np.ndarray) -> int:
    return int(np.argmin(np.where(stay, _means(losses), np.inf))) if np.isfinite(_means(losses)[stay]).any() else 0


def _staying(losses: np.ndarray, stay: np.ndarray) -> np.ndarray:
    """The better half of those that stayed, and those that are not behind the best by more than noise."""
    behind, error = _behind(losses, _best(losses, stay))
    order = np.argsort(np.where(stay, _means(losses), np.inf))
    half = np.isin(np.arange(len(stay)), order[: max(int(stay.sum()) // 2, 1)])
    near = behind <= STARTS.agree + STARTS.errors * error
    return stay & np.isfinite(behind) & (half | near)


def _undecided(losses: np.ndarray, stay: np.ndarray) -> bool:
    """Whether several starts stay, of which some are not within the agreed distance of the best."""
    behind, error = _behind(losses, _best(losses, stay))
    return bool(stay.sum() > 1 and (behind + STARTS.errors * error > STARTS.agree)[stay].any())


def _summary(losses: np.ndarray, stay: np.ndarray, steps: int) -> Starts:
    chosen = _best(losses, stay)
    elbo = -_means(losses)
    with np.errstate(invalid="ignore"):  # a start whose loss is not finite has no error
        error = losses.astype(np.float64).std(1, ddof=1) / np.sqrt(losses.shape[1])
    near = int(np.sum(elbo[chosen] - elbo <= STARTS.agree)) if np.isfinite(elbo[chosen]) else 0
    return Starts(elbo, error, steps, chosen, near)


def _joined(records: list[StepRecords]) -> StepRecords:
    return jax.tree.map(lambda *xs: np.concatenate(xs), *records)
