# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
r"""Short Markov chains from the draws of an answer: they leave its moments as they are if it is the posterior.

    z⁰ ~ Σ w̄ₛ δ(z − zₛ),    zᵏ⁺¹ ~ HMC(zᵏ, ·),        E[h(zᵏ)] = E[h(z⁰)] for all h and k   ⇐   z⁰ ~ p(z | x)

Importance weights do not know where the guide has no draws, such as the neck of a funnel or a far tail; a chain goes
there by itself. What many short chains move the mean or the standard deviation of an entry by is, as long as they have
not travelled everywhere, less than what that is off by (Wang, Kasprzak & Huggins 2023, *A targeted accuracy diagnostic
for variational approximations*, AISTATS, arXiv 2302.12419). The chains are independent of each other, and standard
errors are of means over chains. All of them share a step size, which adapts while the states are discarded.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro.handlers import seed
from numpyro.infer.hmc_util import IntegratorState, euclidean_kinetic_energy, velocity_verlet
from numpyro.infer.util import constrain_fn, potential_energy
from tqdm.auto import tqdm

from numpyro_natgrad.compilation.devices import fetch
from numpyro_natgrad.compilation.kept import jit_for
from numpyro_natgrad.diagnostics.importance import PROGRESS_BAR_DELAY, Draws, FittedGuide, Moments
from numpyro_natgrad.diagnostics.linear_response import label
from numpyro_natgrad.diagnostics.recommendation import Move
from numpyro_natgrad.diagnostics.target import DENSE_LIMIT, discrete_latents, fixed_model, model_sites, usable
from numpyro_natgrad.guide.gaussian_sites import Params


class ChainConstants(NamedTuple):
    """Every number of the short chains; ``benchmarks.calibration`` measures how well they tell good from bad."""

    #: States of a chain that are recorded, and those before them, while the step size adapts.
    recorded: int = 10
    discarded: int = 5
    #: Recordings, at most: chains that have not mixed in one are recorded anew, and the states before are discarded.
    recordings: int = 3
    #: Transitions from one state to the next, and leapfrog steps of a transition.
    transitions: int = 4
    leapfrogs: int = 5
    #: The mean acceptance that the step size is adapted to, while states are discarded (Hoffman & Gelman 2014).
    acceptance: float = 0.8
    #: Change of the log step size by a transition, per unit by which the mean acceptance is off.
    gain: float = 1.0
    #: A transition of a chain divides the step size by 2ᵘ, u uniform on [0, 3], so that small ones enter narrow necks
    #: (Neal 2011, *MCMC using Hamiltonian dynamics*, section 3.2).
    halvings: float = 3.0
    #: The first step size, in standard deviations of the answer.
    first_step: float = 0.5


CHAINS = ChainConstants()
#: Draws with a weight below which there is nothing to start chains from.
MIN_STARTS = 25
#: What chains may move a mean by, in standard deviations, and a standard deviation by, as the logarithm of a ratio:
#: half of the 0.3 and of the factor 1.5 by which an answer may be off, since short chains show a part of an error. Not
#: tuned.
MEAN_MOVE, SD_MOVE = 0.15, math.log(1.5) / 2
#: Standard errors that a move must exceed as well, because it is the largest of many.
MOVE_ERRORS = 3.0
#: Correlation between the two halves of a chain above which it still knows where it started (Wang et al. 2023, 3.3).
MAX_CORRELATION = 0.5


class ShortChains(NamedTuple):
    """What N short chains found.

    :ivar dict draws: recorded states of latent and tabulated sites, constrained, ``(N, recorded, *shape)``.
    :ivar float acceptance: mean acceptance probability of the transitions between them.
    """

    draws: dict[str, np.ndarray]
    acceptance: float

    def moments(self, name: str) -> tuple[Moments, np.ndarray]:
        """Moments of a site over all states, and the standard errors of the logarithms of its standard deviations.

        Standard errors are those of N independent chains.
        """
        z = self.draws[name].astype(np.float64)
        count = len(z)
        mean, sd = z.mean((0, 1)), z.std((0, 1))
        error = lambda x: x.std(0, ddof=1) / np.sqrt(count)
        with np.errstate(divide="ignore", invalid="ignore"):
            influence = ((z - mean) ** 2).mean(1) / (2 * sd**2)
        return Moments(mean=mean, sd=sd, standard_error=error(z.mean(1))), error(influence)

    @property
    def states(self) -> int:
        """Number of all recorded states."""
        return int(np.prod(next(iter(self.draws.values())).shape[:2]))

    def largest_move(self, answer: Mapping[str, Moments]) -> Move | None:
        """What differs most from the moments of an answer, in units of :data:`MEAN_MOVE` and :data:`SD_MOVE`.

        :param answer: moments of some of the sites.
        :return: nothing if no moment differs by more than these, and by more than :data:`MOVE_ERRORS` standard errors.
        """
        found = []
        for name, said in answer.items():
            own, sd_error = self.moments(name)
            varies = ~(own.sd <= np.finfo(np.float32).eps * np.abs(own.mean))
            with np.errstate(divide="ignore", invalid="ignore"):
                shift, stretch = (own.mean - said.mean) / own.sd, np.log(own.sd / said.sd)
                errors = own.standard_error / own.sd
            for moment, by, error, limit in (
                ("mean", shift, errors, MEAN_MOVE),
                ("standard deviation", stretch, sd_error, SD_MOVE),
            ):
                far = varies & (np.abs(by) > np.maximum(limit, MOVE_ERRORS * error))
                found += [
                    (abs(by[at]) / limit, Move(moment, label(name, at), float(by[at]), float(error[at])))
                    for at in np.ndindex(far.shape)
                    if far[at]
                ]
        return max(found, key=lambda x: x[0], default=(0.0, None))[1]

    def have_mixed(self) -> bool:
        """Whether the chains have forgotten where they started, by their halves.

        No entry has means of both halves of a chain that are correlated, nor moments that differ between the halves.
        """
        for draws in self.draws.values():
            z = draws.astype(np.float64)
            halves = np.stack(np.split(z, 2, axis=1)).mean(2)
            spread = halves - halves.mean(1, keepdims=True)
            varies = ~(z.std((0, 1)) <= np.finfo(np.float32).eps * np.abs(z.mean((0, 1))))
            with np.errstate(divide="ignore", invalid="ignore"):
                correlation = np.prod(spread, axis=0).mean(0) / np.prod(spread.std(1), axis=0)
            if np.any(varies & ~(correlation < MAX_CORRELATION)):
                return False
        first, second = (
            ShortChains({name: np.split(z, 2, axis=1)[half] for name, z in self.draws.items()}, self.acceptance)
            for half in (0, 1)
        )
        return second.largest_move({name: first.moments(name)[0] for name in self.draws}) is None


def run(
    fitted: FittedGuide,
    drawn: Draws,
    weights: np.ndarray,
    key: jax.Array,
    num_chains: int,
    *,
    progress_bar: bool = False,
) -> ShortChains | str:
    """Run chains from weighted draws.

    :param drawn: draws, with unconstrained values.
    :param weights: normalised weights of the draws, ``(S,)``.
    :return: what the chains found, or why none can run.
    """
    sites, weights = model_sites(fitted), usable(drawn, weights)
    if reason := _refusal(fitted, drawn, weights, sites):
        return reason
    offset, keys = jit_for(fitted.svi, _randomness, key)()
    try:
        points, factor = _start(drawn, weights, float(fetch(offset)), num_chains)
        at: Any = (_shrunk(factor, points), np.log(np.asarray(CHAINS.first_step, points.dtype)))
    except np.linalg.LinAlgError:  # one draw has all of the weight
        return "the weighted draws have no spread, which the chains take their step sizes from"
    first = {name: z[0] for name, z in drawn.unconstrained.items()}
    names = tuple(dict.fromkeys(drawn.sites.latent + drawn.sites.tabulated))
    bar = tqdm(
        keys,
        desc="short chains",
        unit="state",
        delay=PROGRESS_BAR_DELAY,
        leave=False,
        disable=not progress_bar or jax.process_index() > 0,
    )
    states: list[tuple[Params, jax.Array]] = []
    for number, key in enumerate(bar):
        adapts = np.asarray(number < CHAINS.discarded, points.dtype)
        at, *state = fetch(jit_for(fitted.svi, _advance, fitted, factor, first, at, key, adapts, names)())
        states = [] if adapts else [*states, tuple(state)][-CHAINS.recorded :]
        recorded, begun = divmod(number + 1 - CHAINS.discarded, CHAINS.recorded)
        if recorded > 0 and begun == 0 and (found := _found(states)).have_mixed():
            break
    bar.close()
    return found


def _found(states: list[tuple[Params, jax.Array]]) -> ShortChains:
    draws = {name: np.stack([values[name] for values, _ in states], axis=1) for name in states[0][0]}
    return ShortChains(draws, acceptance=float(np.mean([acceptance for _, acceptance in states])))


def _randomness(key: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    """A uniform number, and a key for each state."""
    first, *keys = random.split(key, CHAINS.discarded + CHAINS.recordings * CHAINS.recorded + 1)
    return random.uniform(first), tuple(keys)


def _advance(
    fitted: FittedGuide,
    factor: jax.Array,
    first: Params,
    at: tuple[jax.Array, jax.Array],
    key: jax.Array,
    adapts: jax.Array,
    names: tuple[str, ...],
) -> tuple[Any, Params, jax.Array]:
    """The next state of all chains, ``(N, d)`` in coordinates y with z = C y, and the values of the named sites there.

    :param first: an unconstrained value of each latent site.
    """
    # Some models draw what is no site, and need a key.
    model = seed(fixed_model(fitted, model_sites(fitted)), random.key(0))
    density = (model, fitted.args, fitted.given)
    unravel = ravel_pytree(first)[1]
    position = lambda y: unravel(factor * y if factor.ndim == 1 else factor @ y)
    transition = _transition(lambda y: potential_energy(*density, position(y)))
    keys = random.split(key, CHAINS.transitions)
    at, acceptance = lax.scan(lambda state, key: transition(state, key, adapts), at, keys)
    values = jax.vmap(lambda y: constrain_fn(*density, position(y), return_deterministic=True))(at[0])
    return at, {name: values[name] for name in names}, jnp.mean(acceptance)


def _refusal(fitted: FittedGuide, drawn: Draws, weights: np.ndarray, sites: dict[str, dict[str, Any]]) -> str:
    """Why no chain can run, or ``""``."""
    if discrete := discrete_latents(sites):
        return f"the latent sites {discrete} are discrete"
    if drawn.sites.subsampled:
        return f"the plates {list(drawn.sites.subsampled)} see a minibatch"
    if drawn.points:
        return f"the guide gives {list(drawn.points)} a single value"
    if not fitted.vectorized:
        return "the loss has `vectorize_particles=False`, so that the model may not be vectorized"
    known = int(np.count_nonzero(weights))
    return f"{known} draws have a weight, and fewer than {MIN_STARTS} are no start" if known < MIN_STARTS else ""


def _start(drawn: Draws, weights: np.ndarray, offset: float, num_chains: int) -> tuple[np.ndarray, np.ndarray]:
    """Points by systematic resampling, ``(N, d)``, and a factor C of the covariance CCᵀ of the draws, ``(d, d)``.

    The factor is ``(d,)``, standard deviations, beyond :data:`.DENSE_LIMIT` latents. The covariance S is shrunk to
    n/(n + d) S + d/(n + d) diag S for n effective draws of d latents.
    """
    names = sorted(drawn.unconstrained)
    draws = np.concatenate([drawn.unconstrained[n].reshape(len(weights), -1) for n in names], axis=1)
    draws, weights = draws[weights > 0].astype(np.float64), weights[weights > 0] / np.sum(weights)
    levels = (offset + np.arange(num_chains)) / num_chains
    points = draws[np.minimum(np.searchsorted(np.cumsum(weights), levels), len(draws) - 1)]
    centred = draws - weights @ draws
    variances = weights @ centred**2
    if (size := draws.shape[1]) > DENSE_LIMIT:
        factor = np.sqrt(variances)
    else:
        effective = 1 / np.sum(weights**2)
        share = effective / (effective + size)
        factor = np.linalg.cholesky(share * (weights * centred.T) @ centred + (1 - share) * np.diag(variances))
    dtype = jnp.result_type(*(z.dtype for z in drawn.unconstrained.values()))
    return points.astype(dtype), factor.astype(dtype)


def _shrunk(factor: np.ndarray, points: np.ndarray) -> np.ndarray:
    """y = C⁻¹ z of all points, ``(N, d)``."""
    return points / factor if factor.ndim == 1 else np.linalg.solve(factor, points.T).T


def _transition(potential: Callable[[jax.Array], jax.Array]) -> Callable[..., Any]:
    """A transition of Hamiltonian Monte Carlo of all chains, and of the log step size that they share."""
    _, update = velocity_verlet(potential, euclidean_kinetic_energy)

    def transition(
        state: tuple[jax.Array, jax.Array], key: jax.Array, adapts: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        y, log_step = state
        keys = random.split(key, 3)
        mass = jnp.ones_like(y[0])
        energy = jax.vmap(lambda at: at.potential_energy + euclidean_kinetic_energy(mass, at.r))
        steps = jnp.exp(log_step) * jnp.exp2(-CHAINS.halvings * random.uniform(keys[0], y.shape[:1], y.dtype))

        def leapfrog(number: jax.Array, carry: tuple[IntegratorState, jax.Array]) -> tuple[IntegratorState, jax.Array]:
            # The first step has length zero and finds the gradient, so that this is compiled once.
            at, begin = carry
            at = jax.vmap(lambda step, at: update(step, mass, at))(jnp.where(number == 0, 0.0, steps), at)
            return at, jnp.where(number == 0, energy(at), begin)

        momentum, zero = random.normal(keys[1], y.shape, y.dtype), jnp.zeros_like(steps)
        begin = (IntegratorState(y, momentum, zero, jnp.zeros_like(y)), zero)
        end, energy_before = lax.fori_loop(0, CHAINS.leapfrogs + 1, leapfrog, begin)
        change = energy_before - energy(end)
        probability = jnp.exp(jnp.minimum(jnp.where(jnp.isnan(change), -jnp.inf, change), 0.0))
        accepted = random.uniform(keys[2], steps.shape, y.dtype) < probability
        acceptance = jnp.mean(probability)
        log_step += adapts * CHAINS.gain * (acceptance - CHAINS.acceptance)
        return (jnp.where(accepted[:, None], end.z, y), log_step), acceptance

    return transition
