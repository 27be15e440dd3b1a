# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Natural parameters η of an exponential-family guide site, read from NumPyro's parameters and written back.

unconstrained parameters ──bijection of the constraint──▶ arguments of the distribution ──natural──▶ η
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpyro import distributions as dist
from numpyro.distributions import biject_to, constraints, transforms

from numpyro_natgrad.distributions.exponential_family import ExponentialFamily, find_exponential_family
from numpyro_natgrad.guide.gaussian_sites import (
    CHOLESKY,
    Params,
    argument_parameter,
    elementwise,
    same_transform,
)
from numpyro_natgrad.guide.trace import GuideSite, LossTrace

#: A bijection is evaluated at ± this unconstrained value to find its range: exp and softplus are 0 or beyond 1e3 there.
_FAR = 1e3


class ExponentialFamilySite(NamedTuple):
    """A guide site of an exponential family whose arguments *are* parameters.

    :ivar arguments: the arguments that are parameters, with the ``params``, the bijections ``transforms`` from
        unconstrained to constrained values, and the ``shapes`` of the constrained values in the same order.
    :ivar eta_shape: ``(*batch, k)``, with the batch shape of the arguments.
    :ivar copies: how many draws share each natural parameter (a parameter outside of a plate).
    :ivar event_size: numbers in one draw.
    """

    name: str
    family: ExponentialFamily
    cls: type[dist.Distribution]
    arguments: tuple[str, ...]
    params: tuple[str, ...]
    transforms: tuple[transforms.Transform, ...]
    shapes: tuple[tuple[int, ...], ...]
    eta_shape: tuple[int, ...]
    copies: int
    event_size: int

    def read(self, params: Params) -> jax.Array:
        values = (t(params[p]) for t, p in zip(self.transforms, self.params, strict=True))
        return self.family.natural(**dict(zip(self.arguments, values, strict=True))).reshape(self.eta_shape)

    def write(self, params: Params, eta: jax.Array) -> Params:
        made = self.cls(**self.family.arguments(eta), validate_args=False)
        new = {}
        for argument, p, transform, shape in zip(
            self.arguments, self.params, self.transforms, self.shapes, strict=True
        ):
            value = transform.inv(getattr(made, argument).reshape(shape))
            new[p] = jnp.asarray(value, params[p].dtype).reshape(jnp.shape(params[p]))
        return {**params, **new}

    def pull(self, params: Params, gradient: Params) -> jax.Array:
        """The gradient with respect to η, for one of the copies, from that of the unconstrained parameters."""
        mine = lambda eta: {p: x for p, x in self.write(params, eta).items() if p in self.params}
        return jax.vjp(mine, self.read(params))[1]({p: gradient[p] for p in self.params})[0] / self.copies

    def is_like(self, other: "ExponentialFamilySite") -> bool:
        """Whether the two sites differ in their names only."""
        unnamed = lambda s: s._replace(name="", params=(), transforms=())
        same = self.cls is other.cls and unnamed(self) == unnamed(other)
        return same and all(map(same_transform, self.transforms, other.transforms))


class ExponentialFamilySites(NamedTuple):
    """Sites that differ in their names only, with a leading axis of their number in all arrays."""

    members: tuple[ExponentialFamilySite, ...]

    @property
    def first(self) -> ExponentialFamilySite:
        return self.members[0]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(s.name for s in self.members)

    @property
    def params(self) -> tuple[str, ...]:
        return tuple(p for s in self.members for p in s.params)

    @property
    def eta_shape(self) -> tuple[int, ...]:
        return (len(self.members), *self.first.eta_shape)

    def read(self, params: Params) -> jax.Array:
        return jax.vmap(self.first.read)(self._stacked(params))

    def write(self, params: Params, eta: jax.Array) -> Params:
        return {**params, **self._unstacked(jax.vmap(self.first.write)(self._stacked(params), eta), params)}

    def pull(self, params: Params, gradient: Params) -> jax.Array:
        return jax.vmap(self.first.pull)(self._stacked(params), self._stacked(gradient))

    def flat(self, values: Params) -> jax.Array:
        """The values of each site's parameters one after another, in the shape of η, which has as many numbers."""
        stacked = self._stacked(values)
        parts = [stacked[p].reshape(len(self.members), -1) for p in self.first.params]
        return jnp.concatenate(parts, axis=1).reshape(self.eta_shape)

    def split(self, x: jax.Array, like: Params) -> Params:
        """The inverse of :meth:`flat`."""
        shapes = {p: jnp.shape(like[p]) for p in self.first.params}
        ends = np.cumsum([math.prod(shape) for shape in shapes.values()])[:-1]
        parts = zip(shapes.items(), jnp.split(x.reshape(len(self.members), -1), ends, axis=1), strict=True)
        return self._unstacked({p: y.reshape(-1, *shape) for (p, shape), y in parts}, like)

    def _stacked(self, values: Params) -> Params:
        """Values under the names of the first site's parameters, with a leading axis for the sites."""
        names = zip(*(s.params for s in self.members), strict=True)
        return {group[0]: stacked([values[p] for p in group]) for group in names}

    def _unstacked(self, values: Params, like: Params) -> Params:
        names = zip(*(s.params for s in self.members), strict=True)
        parts = {p: x for group in names for p, x in zip(group, jnp.unstack(values[group[0]]), strict=True)}
        return {p: x if x.dtype == like[p].dtype else x.astype(like[p].dtype) for p, x in parts.items()}


def stacked(arrays: list[jax.Array]) -> jax.Array:
    """Arrays of one shape along a new leading axis, which costs a single array no copy."""
    return arrays[0][None] if len(arrays) == 1 else jnp.stack(arrays)


def stack_sites(sites: Sequence[ExponentialFamilySite]) -> list[ExponentialFamilySites]:
    """The sites in groups that differ in their names only, in the order of the first of each."""
    groups: list[list[ExponentialFamilySite]] = []
    for site in sites:
        known = next((group for group in groups if site.is_like(group[0])), None)
        if known is None:
            groups.append([site])
        else:
            known.append(site)
    return [ExponentialFamilySites(tuple(group)) for group in groups]


def read_exponential_site(name: str, trace: LossTrace) -> ExponentialFamilySite | None:
    """The site in natural parameters, or ``None`` if it has none, or its arguments are not parameters."""
    site = trace.sites[name]
    family = find_exponential_family(site.base)
    if family is None or family.fixed or not site.plain:
        return None
    direct = {a: argument_parameter(a, site) for a in site.arguments}
    owned = {a: p for a, p in direct.items() if p and trace.params[p].shape is not None}
    if not owned or len(set(owned.values())) < len(owned) or not _determined(site, set(owned.values())):
        return None
    known = site.base.arg_constraints
    if not all(_covers(trace.params[p].transform, known[a], _order(site)) for a, p in owned.items()):
        return None
    return _site(name, site, family, owned, trace)


def _determined(site: GuideSite, owned: set[str]) -> bool:
    """Whether all arguments, such as a Cholesky factor made of a covariance, depend on these parameters alone."""
    origins = site.arguments.values()
    return all(o.sources and o.params <= owned and len(o.params) == len(o.sources) for o in origins)


def _site(
    name: str, site: GuideSite, family: ExponentialFamily, owned: dict[str, str], trace: LossTrace
) -> ExponentialFamilySite | None:
    shapes = tuple(trace.params[p].shape or () for p in owned.values())
    maps = tuple(trace.params[p].transform for p in owned.values())
    events = tuple(site.base.arg_constraints[a].event_dim for a in owned)
    batches = {shape[: len(shape) - n] for shape, n in zip(shapes, events, strict=True)}
    if {math.prod(b) for b in batches} != {math.prod(site.batch)}:
        return None  # some parameters are shared by several draws and others are not
    dtype = jnp.result_type(float)
    values = [jax.ShapeDtypeStruct((*site.batch, *s[len(s) - n :]), dtype) for s, n in zip(shapes, events, strict=True)]
    try:
        eta = jax.eval_shape(lambda v: family.natural(**dict(zip(owned, v, strict=True))), values)
    except TypeError:  # η needs an argument that is no parameter
        return None
    copies = site.size // max(math.prod(site.batch) * site.event_size, 1)
    if site.masked and copies > 1:
        return None  # the mask may change how many copies count, by which the base's Fisher matrix is multiplied
    return ExponentialFamilySite(
        name=name,
        family=family,
        cls=site.base,
        arguments=tuple(owned),
        params=tuple(owned.values()),
        transforms=maps,
        shapes=shapes,
        eta_shape=eta.shape,
        copies=copies,
        event_size=site.event_size,
    )


def _order(site: GuideSite) -> int:
    """d for a d × d matrix, whose degrees of freedom must exceed d − 1; else 1."""
    is_matrix = site.base.support in (constraints.positive_definite, constraints.lower_cholesky)
    return math.isqrt(site.event_size) if is_matrix else 1


def _covers(transform: transforms.Transform, constraint: constraints.Constraint, order: int) -> bool:
    """Whether the parameter's constraint admits every valid value of the argument (an interval would not)."""
    transform, constraint = elementwise(transform), _elementwise_constraint(constraint)
    if constraint in (constraints.positive_definite, constraints.lower_cholesky):
        parts = transform.parts if isinstance(transform, transforms.ComposeTransform) else [transform]
        return isinstance(parts[0], CHOLESKY)
    if constraint is constraints.simplex:
        return isinstance(transform, transforms.StickBreakingTransform)
    low, high = _range(transform)
    if isinstance(constraint, type(constraints.dependent)):
        return 0.0 <= low <= order - 1 and high >= _FAR
    wanted = _range(elementwise(biject_to(constraint)))
    return bool(low <= wanted[0] and high >= min(wanted[1], _FAR))


def _elementwise_constraint(x: Any) -> Any:
    while type(x) is type(constraints.real_vector):
        x = x.base_constraint
    return x


def _range(transform: transforms.Transform) -> tuple[float, float]:
    try:
        with jax.ensure_compile_time_eval():
            ends = transform(jnp.array([-_FAR, _FAR]))
            return float(ends[0]), float(ends[1])
    except jax.errors.ConcretizationTypeError:  # a constraint that depends on the data: unknown
        return math.nan, math.nan
