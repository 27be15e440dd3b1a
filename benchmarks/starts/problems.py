# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""What a problem of the benchmark is, and the table in which every problem registers itself by :func:`problem`."""

import zlib
from collections.abc import Callable
from inspect import getsource
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro.handlers import block, substitute
from numpyro.infer import ELBO, Trace_ELBO, TraceEnum_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

Model = Callable[..., Any]
#: From a generator of random numbers to the model and its arguments.
Build = Callable[[np.random.Generator], tuple[Any, ...]]

GUIDES: dict[str, Callable[[Model], Any]] = {"full": AutoMultivariateNormal, "mean-field": AutoNormal}


class Setting(NamedTuple):
    """Number of particles and precision of a fit."""

    particles: int
    x64: bool


SETTINGS = {
    "8-f32": Setting(8, False),
    "8-x64": Setting(8, True),
    "1-f32": Setting(1, False),
    "2-f32": Setting(2, False),
}
#: The setting of all problems; the others are run for problems with ``every_setting``.
COMMON = "8-f32"


class Problem(NamedTuple):
    """A model with its data.

    :ivar str kind: what makes it difficult, or the field it comes from.
    :ivar Build build: makes the model and its arguments.
    :ivar int seed: of the generator that ``build`` draws the data from.
    :ivar bool every_setting: whether it is run in all of :data:`SETTINGS`.
    :ivar bool tenth: whether it is part of the representative tenth.
    :ivar bool enumerated: whether the loss sums out discrete sites.
    :ivar tuple guides: names of :data:`GUIDES` that can fit it.
    :ivar dict training: keyword arguments of the model in training only, such as the size of minibatches.
    """

    name: str
    kind: str
    build: Build
    seed: int
    every_setting: bool
    tenth: bool
    enumerated: bool
    guides: tuple[str, ...]
    training: dict[str, Any]

    def make(self) -> tuple[Model, tuple[Any, ...]]:
        """The model and its arguments, in the current precision."""
        model, *arrays = self.build(np.random.default_rng(self.seed))
        return model, jax.tree.map(_array, tuple(arrays))

    def loss(self, particles: int) -> ELBO:
        """The loss."""
        return TraceEnum_ELBO(particles, max_plate_nesting=1) if self.enumerated else Trace_ELBO(particles)

    def guide(self, name: str, model: Model) -> Any:
        """A new guide of the continuous latents."""
        return GUIDES[name](_continuous(model) if self.enumerated else model)

    @property
    def fingerprint(self) -> str:
        """Changes whenever the problem's code or seed does."""
        return f"{zlib.crc32(f'{getsource(self.build)}{self.training}'.encode()):08x}"


PROBLEMS: dict[str, Problem] = {}


def problem(
    kind: str,
    seed: int,
    *,
    every_setting: bool = False,
    tenth: bool = False,
    enumerated: bool = False,
    guides: tuple[str, ...] = tuple(GUIDES),
    training: dict[str, Any] | None = None,
) -> Callable[[Build], Build]:
    """Register a function that makes a problem, by the function's name."""

    def register(build: Build) -> Build:
        name = build.__name__
        assert name not in PROBLEMS, name
        PROBLEMS[name] = Problem(name, kind, build, seed, every_setting, tenth, enumerated, guides, training or {})
        return build

    return register


def _continuous(model: Model) -> Model:
    """The model without its discrete latents, which autoguides refuse."""
    hidden = lambda site: site["type"] == "sample" and not site["is_observed"] and site["fn"].is_discrete
    zeros = lambda site: jnp.zeros(site["fn"].shape(), int) if hidden(site) else None
    return block(substitute(model, substitute_fn=zeros), hide_fn=hidden)


def _array(x: Any) -> jax.Array:
    """Floats in the current precision, whole numbers as integers."""
    x = np.asarray(x)
    return jnp.asarray(x, float if np.issubdtype(x.dtype, np.floating) else int)
