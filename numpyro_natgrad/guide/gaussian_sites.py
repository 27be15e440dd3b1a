# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Mean and covariance factor (m, K), Σ = KKᵀ, of a Gaussian guide site, from NumPyro's parameters and back.

A :class:`CovarianceForm` says how one argument of a distribution encodes K; :func:`register_gaussian` adds classes.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from numpyro import distributions as dist
from numpyro.distributions import transforms

from numpyro_natgrad.distributions.exponential_family import check_registration
from numpyro_natgrad.distributions.gaussian import diagonal, inverse_lower, lower_factor
from numpyro_natgrad.guide.handlers import Params as Params
from numpyro_natgrad.guide.provenance import Origin
from numpyro_natgrad.guide.trace import GuideSite, LossTrace


class CovarianceForm(NamedTuple):
    """How one argument of a Gaussian distribution encodes its covariance factor K, Σ = KKᵀ: a bijection.

    :ivar forward: ``argument -> K``, lower triangular, ``(*batch, d, d)``; or the standard deviations, ``(*batch, d)``,
        in a diagonal form.
    :ivar inverse: ``K -> argument``.
    :ivar diagonal: whether K is a vector of standard deviations.

    .. doctest::

        >>> from numpyro_natgrad import CovarianceForm
        >>> variance = CovarianceForm(forward=lambda v: v**0.5, inverse=lambda k: k**2, diagonal=True)
        >>> variance.forward(4.0), variance.inverse(2.0)
        (2.0, 4.0)
    """

    forward: Callable[[jax.Array], jax.Array]
    inverse: Callable[[jax.Array], jax.Array]
    diagonal: bool = False


def _gram(lower: jax.Array) -> jax.Array:
    return lower @ jnp.swapaxes(lower, -1, -2)


def _inverse_gram(lower: jax.Array) -> jax.Array:
    return cho_solve((lower, True), jnp.broadcast_to(jnp.eye(lower.shape[-1], dtype=lower.dtype), lower.shape))


def _factor_of_inverse(precision: jax.Array) -> jax.Array:
    # S = CᵀC with C lower triangular, the Cholesky factor of the flipped matrix, flipped back; K = C⁻¹.
    upper = jnp.linalg.cholesky(precision[..., ::-1, ::-1])[..., ::-1, ::-1]
    return inverse_lower(jnp.swapaxes(upper, -1, -2))


SCALE = CovarianceForm(lambda x: x, lambda k: k, diagonal=True)
SCALE_TRIL = CovarianceForm(jnp.tril, lambda k: k)
COVARIANCE = CovarianceForm(jnp.linalg.cholesky, _gram)
PRECISION = CovarianceForm(_factor_of_inverse, _inverse_gram)

#: For each class its mean argument and its forms.
_REGISTRY: dict[type, tuple[str, Mapping[str, CovarianceForm]]] = {}


def register_gaussian(cls: type[dist.Distribution], *, loc: str = "loc", forms: Mapping[str, CovarianceForm]) -> None:
    """Say how a Gaussian distribution class is parameterized, so that its sites move in natural parameters.

    The step is then exact on conjugate models whatever the parameterization (Khan & Rue 2023, "The Bayesian learning
    rule").

    :param type cls: the distribution class; subclasses are not included.
    :param str loc: the name of its mean argument, of shape ``(*batch, d)`` or ``(*batch,)``.
    :param dict forms: for each argument that can hold the covariance, its :class:`CovarianceForm`. A form is used where
        the argument is a parameter with NumPyro's constraint for it (positive, lower Cholesky, positive definite);
        with other constraints the Hessian of KL is used instead.
    :return: ``None``; the class is known to every optimizer from now on.
    :raises TypeError: if ``cls`` is not a class of distributions, or a form is no :class:`CovarianceForm`.
    :raises ValueError: if a name is not an argument of ``cls``.

    .. doctest::

        >>> import jax.numpy as jnp
        >>> from numpyro import distributions as dist
        >>> from numpyro_natgrad import CovarianceForm, register_gaussian
        >>> class PrecisionNormal(dist.Normal):
        ...     arg_constraints = {"loc": dist.constraints.real, "precision": dist.constraints.positive}
        ...     def __init__(self, loc, precision, *, validate_args=None):
        ...         self.precision = precision
        ...         super().__init__(loc, precision**-0.5, validate_args=validate_args)
        >>> form = CovarianceForm(lambda w: w**-0.5, lambda k: k**-2, diagonal=True)
        >>> register_gaussian(PrecisionNormal, forms={"precision": form})
        >>> print(form.forward(jnp.array([4.0, 0.25])), form.inverse(jnp.array([0.5, 2.0])))
        [0.5 2. ] [4.   0.25]
    """
    check_registration(cls, (loc, *forms), {})
    if wrong := {name: form for name, form in forms.items() if not isinstance(form, CovarianceForm)}:
        raise TypeError(f"`forms={wrong!r}`: expected a `CovarianceForm` for each argument.")
    _REGISTRY[cls] = (loc, dict(forms))


register_gaussian(dist.Normal, forms={"scale": SCALE})
register_gaussian(
    dist.MultivariateNormal,
    forms={"scale_tril": SCALE_TRIL, "covariance_matrix": COVARIANCE, "precision_matrix": PRECISION},
)


Factor = TypeVar("Factor")


class GaussianParameterization(Protocol[Factor]):
    """A Gaussian site, or several, by m and its factor: K (:class:`GaussianSite`) or (s, W) (:class:`.LowRankSite`)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Its site, or the sites that it joins."""

    @property
    def locs(self) -> tuple[str, ...]:
        """Their mean parameters."""

    @property
    def params(self) -> tuple[str, ...]:
        """All parameters of the site."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(*batch, d)``: shape of a draw."""

    @property
    def size(self) -> int:
        """Numbers in a draw."""

    @property
    def analytic(self) -> bool:
        """Whether the loss integrates the site itself."""

    @property
    def block_size(self) -> int:
        """Dimensions that vary together."""

    @property
    def full_covariance(self) -> bool:
        """Whether the family is that of all Gaussians of its dimension."""

    def report_rows(self, how: str) -> list[tuple[str, str, str, str, str]]:
        """The report's rows."""

    def read(self, params: Params) -> tuple[jax.Array, Factor]:
        """m and the factor at unconstrained parameters."""

    def covariance_factor(self, params: Params) -> Factor:
        """The factor at unconstrained parameters."""

    def write(self, params: Params, loc: jax.Array, factor: Factor) -> Params:
        """The parameters with this site's mean and covariance replaced."""

    def cholesky(self, params: Params) -> jax.Array:
        """K as lower triangular matrices, ``(batch, d, d)``."""

    def project(self, columns: jax.Array, start: Factor) -> Factor:
        """The factor by :func:`project`, from the site's columns ``(D, d)`` of P; iterations begin at ``start``."""

    def kl(self, before: Factor, after: Factor, shift: jax.Array) -> jax.Array:
        """KL(N(m, before) ‖ N(m + shift, after)), nats."""


class GaussianSite(NamedTuple):
    """A guide site whose mean and covariance arguments *are* parameters: a :class:`GaussianParameterization`.

    :ivar family: the name of the distribution's class.
    :ivar argument: the distribution's argument that is the covariance parameter ``scale``.
    :ivar shape: ``(*batch, d)``: shape of a draw; K is ``(*batch, d, d)``, or ``(*batch, d)`` in a diagonal form.
    :ivar scale_shape: the shape of the covariance argument's constrained value.
    """

    name: str
    family: str
    loc: str
    scale: str
    argument: str
    form: CovarianceForm
    transform: transforms.Transform
    shape: tuple[int, ...]
    scale_shape: tuple[int, ...]
    analytic: bool

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name,)

    @property
    def locs(self) -> tuple[str, ...]:
        return (self.loc,)

    @property
    def scales(self) -> tuple[str, ...]:
        return (self.scale,)

    @property
    def params(self) -> tuple[str, ...]:
        return (self.loc, self.scale)

    @property
    def block_size(self) -> int:
        return 1 if self.form.diagonal else self.shape[-1]

    @property
    def full_covariance(self) -> bool:
        return not self.form.diagonal and len(self.shape) == 1

    def report_rows(self, how: str) -> list[tuple[str, str, str, str, str]]:
        shape = "×".join(map(str, self.shape))
        return [
            (self.loc, self.name, self.family, how, shape),
            (self.scale, self.name, f"{self.family} ({self.argument})", how, shape),
        ]

    def read(self, params: Params) -> tuple[jax.Array, jax.Array]:
        return params[self.loc].reshape(self.shape), self.covariance_factor(params)

    def covariance_factor(self, params: Params) -> jax.Array:
        k = self.form.forward(self.transform(params[self.scale]))
        return k.reshape(self.shape if self.form.diagonal else (*self.shape, self.shape[-1]))

    def unconstrain(self, factor: jax.Array) -> jax.Array:
        value = unconstrained(self.transform, self.form.inverse(factor).reshape(self.scale_shape))
        return jnp.asarray(value, factor.dtype)

    def write(self, params: Params, loc: jax.Array, factor: jax.Array) -> Params:
        old = params[self.loc], params[self.scale]
        return {
            **params,
            self.loc: loc.reshape(old[0].shape).astype(old[0].dtype),
            self.scale: self.unconstrain(factor).reshape(old[1].shape).astype(old[1].dtype),
        }

    def cholesky(self, params: Params) -> jax.Array:
        factor = self.covariance_factor(params)
        if self.form.diagonal:
            return jnp.diag(factor.ravel())[None]
        return factor.reshape(-1, *factor.shape[-2:])

    def project(self, columns: jax.Array, start: jax.Array) -> jax.Array:
        if self.form.diagonal:
            return (1 / jnp.sqrt(jnp.sum(columns**2, axis=0))).reshape(self.shape)
        return conditional_factors(columns, self.shape[-1]).reshape(*self.shape, self.shape[-1])

    def kl(self, before: jax.Array, after: jax.Array, shift: jax.Array) -> jax.Array:
        """KL(N(m, LLᵀ) ‖ N(m + shift, L₊L₊ᵀ)) in nats: with A = L₊⁻¹L, ½(‖A‖² − d − 2 log|A| + ‖L₊⁻¹ shift‖²)."""
        if self.form.diagonal:
            ratio = before / after
            return 0.5 * jnp.sum(ratio**2 - 1 - 2 * jnp.log(ratio) + (shift / after) ** 2)
        inverse = inverse_lower(after)
        ratio, x = inverse @ before, jnp.einsum("...ij,...j->...i", inverse, shift)
        logs = jnp.log(diagonal(ratio))
        return 0.5 * (jnp.sum(ratio**2) - self.size - 2 * jnp.sum(logs) + jnp.sum(x**2))


def read_gaussian_site(name: str, trace: LossTrace) -> GaussianSite | None:
    """The site as a Gaussian in closed form, or ``None`` if it is anything else."""
    site = trace.sites[name]
    if site.base not in _REGISTRY or not site.plain or site.masked or site.leaks:
        return None
    loc_argument, forms = _REGISTRY[site.base]
    loc = argument_parameter(loc_argument, site)
    for argument, form in forms.items():
        scale = argument_parameter(argument, site)
        if loc and scale and _fits(loc, scale, form, site, trace):
            shape = site.shape or (1,)
            param = trace.params[scale]
            return GaussianSite(
                name=name,
                family=site.base.__name__,
                loc=loc,
                scale=scale,
                argument=argument,
                form=form,
                transform=param.transform,
                shape=shape,
                scale_shape=param.shape or (),
                analytic=site.analytic,
            )
    return None


def read_local_site(name: str, trace: LossTrace) -> GaussianSite | None:
    """A site of independent Normals, of which a step draws the rows of a minibatch, as a site of all rows.

    Mean and standard deviation have to be the same entries of two parameters, whose first axis is that of the rows of
    a subsampled plate.
    """
    site = trace.sites[name]
    weight = site.weight or 0.0
    unknown = site.masked or site.leaks or not site.own_parameters
    if site.base not in _REGISTRY or unknown or weight <= 1:
        return None
    loc_argument, forms = _REGISTRY[site.base]
    loc = site.arguments.get(loc_argument, Origin()).rows_of
    for argument, form in forms.items():
        scale = site.arguments.get(argument, Origin()).rows_of
        if not (loc and scale and form.diagonal):
            continue
        mean, cov = trace.params[loc], trace.params[scale]
        if not mean.shape or mean.shape != cov.shape:
            continue
        drawn = site.size / math.prod(mean.shape[1:])
        rows = drawn in site.shape and math.isclose(mean.shape[0], weight * drawn, rel_tol=0.01)
        if rows and is_identity(mean.transform) and covers(cov.transform, form):
            shape, family = mean.shape, site.base.__name__
            return GaussianSite(name, family, loc, scale, argument, form, cov.transform, shape, shape, site.analytic)
    return None


def argument_parameter(argument: str, site: GuideSite) -> str | None:
    """The parameter that an argument equals, up to its shape."""
    return site.arguments.get(argument, Origin()).param


def _fits(loc: str, scale: str, form: CovarianceForm, site: GuideSite, trace: LossTrace) -> bool:
    mean, cov = trace.params[loc], trace.params[scale]
    if mean.shape is None or cov.shape is None or not is_identity(mean.transform):
        return False
    entries = site.size if form.diagonal else site.size * (site.shape or (1,))[-1]
    return math.prod(mean.shape) == site.size and math.prod(cov.shape) == entries and covers(cov.transform, form)


def is_identity(transform: transforms.Transform) -> bool:
    return isinstance(elementwise(transform), transforms.IdentityTransform)


def elementwise(transform: transforms.Transform) -> transforms.Transform:
    """The bijection of single numbers, where one of arrays applies such a one to each of them."""
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    return transform


def same_transform(a: transforms.Transform, b: transforms.Transform) -> bool:
    """Whether two bijections are known to be equal; those that depend on data are not."""
    try:
        with jax.ensure_compile_time_eval():
            return type(a) is type(b) and bool(a == b)
    except jax.errors.ConcretizationTypeError:
        return False


POSITIVE = (transforms.ExpTransform, transforms.SoftplusTransform)
CHOLESKY = (
    transforms.LowerCholeskyTransform,
    transforms.ScaledUnitLowerCholeskyTransform,
    transforms.SoftplusLowerCholeskyTransform,
)


def unconstrained(transform: transforms.Transform, value: jax.Array) -> jax.Array:
    """``transform.inv(value)``; of a Cholesky factor, with indices that are known before the program runs.

    NumPyro's own maps compute these indices inside of the program, with twenty kernels.
    """
    if type(transform) not in CHOLESKY:
        return transform.inv(value)
    d, scale = value.shape[-1], diagonal(value)
    rows = value / scale[..., None] if isinstance(transform, transforms.ScaledUnitLowerCholeskyTransform) else value
    below = np.ravel_multi_index(np.tril_indices(d, -1), (d, d))
    # The map of the diagonal is that of 1 × 1 factors.
    ends = transform.inv(scale[..., None, None])[..., 0]
    return jnp.concatenate([rows.reshape(*value.shape[:-2], d * d)[..., below], ends], axis=-1)


def covers(transform: transforms.Transform, form: CovarianceForm) -> bool:
    """Whether the parameter's constraint admits every valid value of the argument (an interval, say, would not)."""
    transform = elementwise(transform)
    parts = transform.parts if isinstance(transform, transforms.ComposeTransform) else [transform]
    # A shift after an exponential would be a bound other than zero.
    narrow = [t for t in parts[1:] if isinstance(t, transforms.AffineTransform)]
    return isinstance(parts[0], POSITIVE if form.diagonal else CHOLESKY) and not narrow


def project(
    precision_root: jax.Array, sites: Sequence[GaussianParameterization[Any]], starts: Sequence[Any]
) -> list[Any]:
    """The factor of each site in the member of the guide's family closest to a joint Gaussian, from P with PᵀP = S.

    The minimizer of KL(guide ‖ N(m, S⁻¹)) has Σ_b = (S_bb)⁻¹ in each block b, and σᵢ = Sᵢᵢ^(−1/2) in independent
    components. A projection without a closed form is iterated from ``starts``.
    """
    ends = list(accumulate(site.size for site in sites))
    columns = jnp.split(precision_root, ends[:-1], axis=1)
    return [site.project(x, start) for site, x, start in zip(sites, columns, starts, strict=True)]


def projected_square(columns: jax.Array, curvature: jax.Array, d: int) -> jax.Array:
    """‖K_bᵀ ΔS_bb K_b‖², summed over blocks b: the square of the guide's part of a change ΔS of the joint precision.

    A quarter of it is the KL, to second order, nats, between the guide's covariances.

    :param columns: the sites' columns of P with PᵀP = S, ``(D, batch · d)``.
    :param curvature: P⁻ᵀ ΔS P⁻¹, ``(D, D)``.
    """
    blocks = _blocks(columns, d)
    norms = jnp.linalg.norm(blocks, axis=1, keepdims=True)
    frame = blocks / norms if d == 1 else blocks @ conditional_factors(columns, d)
    return jnp.sum((jnp.swapaxes(frame, -1, -2) @ curvature @ frame) ** 2)


def conditional_factors(columns: jax.Array, d: int) -> jax.Array:
    """K with KKᵀ = (S_bb)⁻¹ of every block of d columns of P with PᵀP = S, ``(batch, d, d)``, lower triangular."""
    blocks = _blocks(columns, d)
    # S_bb = AᵀA = CᵀC with C lower: flip, factor, flip back.
    flipped = lower_factor(jnp.swapaxes(blocks[..., ::-1], -1, -2))
    return inverse_lower(jnp.swapaxes(flipped[..., ::-1, ::-1], -1, -2))


def _blocks(columns: jax.Array, d: int) -> jax.Array:
    """Each site's own columns, ``(batch, D, d)``."""
    return jnp.moveaxis(columns.reshape(columns.shape[0], -1, d), 1, 0)
