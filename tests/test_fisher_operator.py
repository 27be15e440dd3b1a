# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The public operator is the Fisher matrix of the guide, and ``kl`` of two states equals dense algebra."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro import distributions as dist
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoBNAFNormal, AutoDelta, AutoMultivariateNormal, AutoNormal
from oracles import assert_close, root_eps, spd
from tables import positive

from numpyro_natgrad import NaturalGradient, StructureError, fisher, kl, natural_gradient, scale_by_fisher

D = 3
CENTRE, PRECISION = np.arange(1.0, D + 1), spd(0, D, low=1.0, high=30.0)


def model() -> None:
    z = numpyro.sample("z", dist.ImproperUniform(constraints.real, (), (D,)))
    numpyro.factor(
        "f", dist.MultivariateNormal(jnp.array(CENTRE, float), precision_matrix=jnp.array(PRECISION, float)).log_prob(z)
    )


def chain() -> None:
    """q(z₁) q(z₂ | z₁): the second Fisher depends on draws of the first."""
    z1 = numpyro.sample("z1", dist.Normal(numpyro.param("m", 0.5), 1.0))
    numpyro.sample("z2", dist.Normal(numpyro.param("slope", 0.3) * z1, positive("s", 0.7)))


def pair() -> None:
    numpyro.sample("z2", dist.Normal(numpyro.sample("z1", dist.Normal(0, 1)), 1.0))


def started(model: Any, guide: Any, optim: Any = None, **init: Any) -> tuple[SVI, Any]:
    svi = SVI(model, guide, optim or optax.sgd(0.1), Trace_ELBO(4))
    return svi, svi.init(random.key(0), **init)


def flat(tree: Any) -> np.ndarray:
    return np.asarray(ravel_pytree(tree)[0])


def test_dense_fisher_operator_of_a_full_gaussian_equals_the_textbook(x64):
    """∇² of KL(N ‖ N') by NumPyro and ``jax.hessian``, in unconstrained parameters."""
    svi, state = started(model, AutoMultivariateNormal(model, init_scale=0.5))
    params = svi.optim.get_params(state.optim_state)
    x, unravel = ravel_pytree(params)

    def gaussian(x: Any) -> dist.MultivariateNormal:
        made = svi.constrain_fn(unravel(x))
        return dist.MultivariateNormal(made["auto_loc"], scale_tril=made["auto_scale_tril"])

    expected = jax.jit(jax.hessian(lambda y: dist.kl_divergence(gaussian(x), gaussian(y))))(x)
    operator = fisher(svi, state)
    assert operator.exact
    assert_close(jax.jit(operator.dense)(), expected, 1e-10)
    assert_close(flat(operator.diagonal()), np.diag(expected), 1e-10)
    slope = jax.tree.map(jnp.ones_like, params)
    assert_close(flat(operator.matvec(slope)), expected @ np.ones(x.size), 1e-10)
    assert_close(flat(operator.solve(slope, damping=0.0)), np.linalg.solve(expected, np.ones(x.size)), 1e-8)


def test_dense_and_iterative_solves_of_the_operator_agree(x64):
    svi, state = started(model, AutoMultivariateNormal(model))
    operator = fisher(svi, state)
    slope = jax.tree.map(jnp.ones_like, operator.params)
    assert_close(flat(operator.solve(slope, dense_limit=0)), flat(operator.solve(slope)), 1e-4)


def test_fisher_operator_of_a_structured_guide_is_the_mean_over_draws(x64):
    """F_slope,slope = E[z₁²]/s²: its standard error is that of the mean of squares of 4 × 500 normals."""
    svi, state = started(pair, chain)
    operator = fisher(svi, state, num_draws=500)
    assert not operator.exact
    found, second = operator.diagonal(), 0.5**2 + 1
    error = np.sqrt((3 + 6 * 0.25 + 0.25**2 - second**2) / 2000) / 0.7**2
    assert abs(found["slope"] - second / 0.7**2) < 4 * error
    np.testing.assert_allclose(found["m"], 1.0)  # of its own score only: z₂ | z₁ does not depend on m
    np.testing.assert_allclose(found["s"], 2.0)  # of log s


def test_natural_gradient_points_to_the_optimum_of_a_conjugate_model(x64):
    """In unconstrained parameters the mean's part is exact: m − v_m is the posterior mean where q has its covariance."""
    guide = AutoMultivariateNormal(model)
    svi, state = started(model, guide)
    params = svi.optim.get_params(state.optim_state)
    tril = np.linalg.cholesky(np.linalg.inv(PRECISION))
    params = {**params, **svi.optim.get_params(state.optim_state)}
    transform = numpyro.distributions.biject_to(constraints.scaled_unit_lower_cholesky)
    params["auto_scale_tril"] = transform.inv(jnp.asarray(tril))
    state = state._replace(optim_state=svi.optim.init(params))
    v = natural_gradient(svi, state)
    error = np.linalg.norm(tril, axis=1) / 2  # of four draws
    assert (np.abs(params["auto_loc"] - v["auto_loc"] - CENTRE) < 4 * error).all()


def test_fisher_operator_differentiates_loops_in_forward_mode():
    """A while loop in the model has no reverse mode; what comes is what the same model without a loop has."""

    def looped(n: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0, 1))
        doubled = jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, c[1] + z), (0, 0.0))[1]
        numpyro.factor("f", -0.5 * (doubled - 3.0) ** 2)

    def plain(n: Any) -> None:
        z = numpyro.sample("z", dist.Normal(0, 1))
        numpyro.factor("f", -0.5 * (2 * z - 3.0) ** 2)

    def found(model: Any, **options: Any) -> Any:
        svi = SVI(model, AutoNormal(plain), optax.sgd(0.1), Trace_ELBO())
        return natural_gradient(svi, svi.init(random.key(0), 2), 2, **options)

    forwards = found(looped, forward_mode_differentiation=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), forwards, found(plain))


def test_kl_of_a_flow_without_inverse_raises():
    svi, state = started(model, AutoBNAFNormal(model, num_flows=1, hidden_factors=[2]))
    with pytest.raises(StructureError, match="`_auto_latent`.*without an inverse"):
        kl(svi, state, svi.init(random.key(1)))


GUIDES: dict[str, Callable] = {"AutoNormal": AutoNormal, "AutoMultivariateNormal": AutoMultivariateNormal}


@pytest.mark.parametrize("name", GUIDES)
def test_kl_between_two_states_equals_dense_algebra(name, dtype):
    """Of the Gaussians that the states stand for, by NumPyro's formula, and of a state to itself."""
    svi, state = started(model, GUIDES[name](model), optax.sgd(0.03))
    new = jax.jit(svi.update)(state)[0]
    forth = kl(svi, state, new)

    def gaussian(at: Any) -> Any:
        return (
            svi.guide.get_posterior(svi.get_params(at))
            if name != "AutoNormal"
            else dist.Normal(svi.get_params(at)["z_auto_loc"], svi.get_params(at)["z_auto_scale"]).to_event(1)
        )

    np.testing.assert_allclose(forth.value, dist.kl_divergence(gaussian(state), gaussian(new)), rtol=1e-4)
    assert forth.standard_error <= 1e-4 * forth.value
    assert abs(kl(svi, state, state).value) <= root_eps(dtype)
    # And twice that of a small change is its squared Fisher length.
    params = svi.optim.get_params(state.optim_state)
    step = jax.tree.map(lambda x: jnp.full_like(x, 3e-3), params)
    near = state._replace(optim_state=svi.optim.init(jax.tree.map(jnp.add, params, step)))
    square = flat(step) @ flat(fisher(svi, state).matvec(step))
    np.testing.assert_allclose(2 * kl(svi, state, near).value, square, rtol=0.03)


def test_kl_uses_the_static_kwargs_of_the_svi():
    """Keyword arguments of the constructor, and the mutable state of the guide."""

    def guide(shift=None):
        numpyro.sample(
            "z",
            dist.Normal(numpyro.param("loc", 0.0) + shift + numpyro.primitives.mutable("offset", jnp.array(1.0)), 1.0),
        )

    svi = SVI(lambda shift: numpyro.sample("z", dist.Normal(0, 1)), guide, optax.sgd(0.1), Trace_ELBO(), shift=1.0)
    state = svi.init(random.key(0))
    new = state._replace(mutable_state={"offset": jnp.array(3.0)})
    np.testing.assert_allclose(kl(svi, state, new).value, 2.0, rtol=1e-5)


def test_kl_of_a_guide_without_closed_form_has_a_standard_error(x64):
    svi, state = started(pair, chain)
    params = svi.optim.get_params(state.optim_state)
    new = state._replace(optim_state=svi.optim.init({**params, "slope": jnp.array(0.6)}))
    found = kl(svi, state, new, num_draws=1000)
    expected = 0.5 * 0.3**2 * 1.25 / 0.7**2  # E ½ (Δslope z₁ / s)²
    assert 0 < found.standard_error < 0.05 * expected
    assert abs(found.value - expected) < 4 * found.standard_error


def test_scale_by_fisher_multiplies_by_the_inverse_fisher_matrix():
    """A step of ``chain(scale_by_fisher, scale(-ρ))`` is −ρ F⁻¹g, and a hundred of them reach the posterior's mean."""
    guide = AutoNormal(model)
    svi, state = started(model, guide)
    natural = optax.chain(scale_by_fisher(svi, random.key(2)), optax.scale(-0.1))
    params = svi.optim.get_params(state.optim_state)
    ones = jax.tree.map(jnp.ones_like, params)
    updates = natural.update(ones, natural.init(params), params)[0]
    assert_close(flat(updates), -0.1 * flat(fisher(svi, state).solve(ones)), 1e-5)
    result = SVI(model, guide, natural, Trace_ELBO(4)).run(random.key(1), 100, progress_bar=False)
    assert (np.abs(result.params["z_auto_loc"] - CENTRE) < 1.5 / np.sqrt(np.diag(PRECISION))).all()


def test_scale_by_fisher_draws_from_its_key_and_the_number_of_the_call(x64):
    """The Fisher matrix of the slope is a mean over draws, which follow from the key and from nothing else."""
    svi, state = started(pair, chain)
    params = svi.optim.get_params(state.optim_state)
    ones = jax.tree.map(jnp.ones_like, params)

    def first_two(key: Any) -> list[float]:
        transform = scale_by_fisher(svi, key, num_draws=4)
        first, state = transform.update(ones, transform.init(params), params)
        return [first["slope"].item(), transform.update(ones, state, params)[0]["slope"].item()]

    found = first_two(random.key(0))
    assert first_two(random.key(0)) == found
    assert len({*found, *first_two(random.key(1))}) == 4


def test_scale_by_fisher_keeps_gradients_without_a_fisher_matrix():
    """What enters by a factor belongs to no density; a normal's scale has the Fisher 2, in its logarithm."""

    def noisy() -> None:
        numpyro.factor("away", -(numpyro.param("free", 1.0) ** 2))
        numpyro.sample("y", dist.Normal(numpyro.sample("z", dist.Normal(0, 1)), positive("noise", 2.0)), obs=1.0)

    svi, state = started(noisy, AutoNormal(noisy))
    operator = fisher(svi, state)
    ones = jax.tree.map(jnp.ones_like, operator.params)
    assert operator.matvec(ones)["free"] == 0
    assert operator.solve(ones)["free"] == 1
    np.testing.assert_allclose(operator.matvec(ones)["noise"], 2, rtol=1e-6)


def test_fisher_operator_of_point_parameters_is_that_of_the_likelihood(x64):
    """AutoDelta with a normal prior: F = 1/σ₀² + N/σ²."""

    def known() -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 0.5))
        numpyro.sample("y", dist.Normal(z, 2.0).expand([7]), obs=jnp.ones(7))

    svi, state = started(known, AutoDelta(known), NaturalGradient())
    np.testing.assert_allclose(fisher(svi, state).dense(), [[4 + 7 / 4]])


def test_fisher_of_an_uninitialised_svi_raises():
    svi = SVI(model, AutoNormal(model), optax.sgd(0.1), Trace_ELBO())
    _, state = started(model, AutoNormal(model), NaturalGradient())
    calls = (lambda: scale_by_fisher(svi, random.key(0)), lambda: fisher(svi, state), lambda: kl(svi, state, state))
    for call in calls:
        with pytest.raises(ValueError, match="svi.init"):
            call()
    for call in (lambda: fisher(svi, None), lambda: kl(svi, None, None)):
        with pytest.raises(TypeError, match="svi.init"):
            call()
