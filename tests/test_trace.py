# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The trace of a loss function finds the arguments, particles and kind of loss that guide and loss were given."""

import jax
import jax.numpy as jnp
import numpyro
import pytest
from jax import random
from numpyro import distributions as dist
from numpyro.infer import RenyiELBO, Trace_ELBO, TraceGraph_ELBO, TraceMeanField_ELBO
from oracles import captured_loss
from tables import GUIDES, started

from numpyro_natgrad import NaturalGradient, StructureError
from numpyro_natgrad.guide import gaussian_sites
from numpyro_natgrad.guide.low_rank_sites import read_low_rank_site
from numpyro_natgrad.guide.provenance import Label, LabelKind, origins, tag
from numpyro_natgrad.guide.trace import trace_loss
from numpyro_natgrad.infer.optimizer import table

# loss, draws a step, whether it is an ELBO
LOSSES = {
    "Trace_ELBO, 1": (Trace_ELBO(), 1, True),
    "Trace_ELBO, 8": (Trace_ELBO(num_particles=8), 8, True),
    "Trace_ELBO, lax.map": (Trace_ELBO(num_particles=3, vectorize_particles=False), 3, True),
    "Trace_ELBO, callable": (Trace_ELBO(num_particles=3, vectorize_particles=lambda f, x: jax.vmap(f)(x)), 3, True),
    "TraceMeanField_ELBO, 1": (TraceMeanField_ELBO(), 1, True),
    "TraceMeanField_ELBO, 4": (TraceMeanField_ELBO(num_particles=4), 4, True),
    "TraceGraph_ELBO, 1": (TraceGraph_ELBO(), 1, True),
    "TraceGraph_ELBO, 4": (TraceGraph_ELBO(num_particles=4), 4, True),
    "RenyiELBO, 2": (RenyiELBO(alpha=0.5, num_particles=2), 2, False),
}
PAIRS = [("AutoMultivariateNormal", loss) for loss in LOSSES] + [
    (guide, loss)
    for guide in GUIDES
    for loss in ("Trace_ELBO, 1", "Trace_ELBO, 8", "TraceMeanField_ELBO, 4", "RenyiELBO, 2")
]


@pytest.mark.parametrize(("guide", "loss"), sorted(set(PAIRS)))
def test_trace_finds_parameters_particles_and_kind_of_loss(guide, loss):
    at, params = started(guide, "float32")
    objective, particles, is_elbo = LOSSES[loss]
    trace = trace_loss(at(random.key(0), objective), params)
    assert set(trace.params) == set(params)
    if trace.sites:
        assert (trace.particles, trace.is_elbo) == (particles, is_elbo)
    read = {name: gaussian_sites.read_gaussian_site(name, trace) for name in trace.sites}
    found = {name: (g.loc, g.scale) for name, g in read.items() if g is not None}
    # A parameter of two sites is found at both of them; the partition deals with its being shared.
    assert {n: p for n, p in found.items() if "both" not in p} == GUIDES[guide].gaussian
    low_rank = {name: read_low_rank_site(name, trace) for name in trace.sites}
    assert {name: site.params for name, site in low_rank.items() if site is not None} == GUIDES[guide].low_rank


METHODS = ("closed form, ", "Hessian of KL", "fallback optimizer", "Fisher of the likelihood", "Hessian of the loss")


@pytest.mark.parametrize("estimator", [None, "first_order"])
@pytest.mark.parametrize("guide", GUIDES)
def test_every_parameter_is_in_exactly_one_block(guide, estimator):
    at, params = started(guide, "float32")
    optimizer = NaturalGradient(estimator=estimator)
    fn = at(random.key(0), Trace_ELBO(num_particles=2))
    lines = table(optimizer._partition(fn, params, False).rows()).splitlines()[2:]
    method = {line.split()[0]: line for line in lines}
    assert len(lines) == len(method)
    assert set(method) == set(params)
    case, found = GUIDES[guide], {word: {p for p in method if word in method[p]} for word in METHODS}
    closed = {parameter for site in case.gaussian.values() for parameter in site} | case.natural
    products = {parameter for site in case.low_rank.values() for parameter in site} | case.local
    kl_hessian = case.kl_hessian - products
    closed, kl_hessian = (closed | products, kl_hessian) if estimator is None else (closed, kl_hessian | products)
    # With second derivatives, parameters of the model move with the latents of the guide.
    likely, beside = (set(), case.likely) if estimator is None and case.gaussian else (case.likely, set())
    assert found == dict(zip(METHODS, (closed, kl_hessian, case.point, likely, beside), strict=True))


def test_only_mean_field_elbo_has_analytic_densities():
    at, params = started("Normal in a plate", "float32")
    for name, (objective, _, _) in LOSSES.items():
        site = trace_loss(at(random.key(0), objective), params).sites["z"]
        assert site.analytic == name.startswith("TraceMeanField")


def test_loss_with_score_function_terms_is_not_affine_in_log_densities():
    def model():
        numpyro.sample("k", dist.Bernoulli(0.3))

    def guide():
        numpyro.sample("k", dist.Bernoulli(logits=numpyro.param("logit", 0.2)))

    at, params = captured_loss(model, guide, TraceGraph_ELBO(num_particles=2))
    assert not trace_loss(at(random.key(0)), params).is_elbo


def test_parameter_named_like_a_site_is_refused():
    def model():
        numpyro.param("u", 1.0)
        numpyro.sample("z", dist.Normal(0, 1))

    def guide():
        u = numpyro.sample("u", dist.Normal(numpyro.param("m", 0.0), 1), infer={"is_auxiliary": True})
        numpyro.sample("z", dist.Delta(u))

    at, params = captured_loss(model, guide, Trace_ELBO())
    with pytest.raises(StructureError, match="`u`"):
        trace_loss(at(random.key(0)), params)


# --- the structure of the state ---

CELLS = [(guide, "Trace_ELBO, 8", "float32") for guide in GUIDES]
CELLS += [("AutoMultivariateNormal", loss, "float32") for loss in LOSSES if loss != "Trace_ELBO, 8"]
CELLS += [(guide, "Trace_ELBO, 8", "float64") for guide in ("MultivariateNormal in a plate", "structured", "AutoDelta")]


@pytest.mark.parametrize(("guide", "loss", "precision"), CELLS)
@pytest.mark.filterwarnings("ignore:NaturalGradient. the loss is not affine")
def test_step_keeps_tree_structure_shapes_and_dtypes(guide, loss, precision):
    with jax.enable_x64(precision == "float64"):
        at, params = started(guide, precision)
        optimizer = NaturalGradient()
        before = optimizer.init(params)
        after = jax.eval_shape(lambda: optimizer.eval_and_update(at(random.key(0), LOSSES[loss][0]), before)[1])
        assert jax.tree.structure(after) == jax.tree.structure(before)
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            assert (jnp.shape(old), jnp.result_type(old)) == (new.shape, new.dtype)
        floats = [x.dtype for x in jax.tree.leaves(after) if jnp.issubdtype(x.dtype, jnp.floating)]
        assert set(floats) == {jnp.dtype(precision)}


# --- origins of values ---


def follow(function, *args):
    """The origin of ``function``'s value when its arguments are tagged as parameters a, b, …"""

    def tagged(*xs):
        return function(*[tag(Label(LabelKind.PARAM, name), x) for name, x in zip("abc", xs, strict=False)])

    return origins(tagged, *args)[0]


A, B, C = (Label(LabelKind.PARAM, name) for name in "abc")
DENSITY, DRAW = Label(LabelKind.DENSITY, "p"), Label(LabelKind.DRAW, "z")
X = jnp.arange(6.0).reshape(2, 3)
COPIES = {
    "itself": lambda a: a,
    "reshape": lambda a: a.reshape(3, 2),
    "broadcast": lambda a: jnp.broadcast_to(a, (4, 2, 3)),
    "expand_dims": lambda a: a[None],
    "dtype": lambda a: a.astype(jnp.float16),
    "jit": lambda a: jax.jit(lambda x: x[None])(a),
    "vmap": lambda a: jax.vmap(lambda x: x)(a),
    "remat": lambda a: jax.checkpoint(lambda x: x.reshape(6))(a),
}
COMPUTED = {
    "sum": lambda a: a.sum(0),
    "scaled": lambda a: 2 * a,
    "shifted": lambda a: a + 1,
    "exp": jnp.exp,
    "mixed": lambda a: jnp.concatenate([a, -a]),
    "jit": lambda a: jax.jit(jnp.sin)(a),
    "scan": lambda a: jax.lax.scan(lambda c, x: (c + x, None), jnp.zeros(3), a)[0],
    "while": lambda a: jax.lax.while_loop(lambda x: x.sum() < 100, lambda x: x + 1, a),
    "cond": lambda a: jax.lax.cond(a[0, 0] > 0, jnp.sin, jnp.cos, a),
    "custom_jvp": lambda a: jax.nn.relu(a),
}


@pytest.mark.parametrize("how", COPIES)
def test_reshaped_parameter_is_a_copy(how):
    assert follow(COPIES[how], X).copy_of == A


@pytest.mark.parametrize("how", COMPUTED)
def test_computed_value_depends_on_the_parameter_and_is_no_copy(how):
    origin = follow(COMPUTED[how], X)
    assert origin.copy_of is None
    assert origin.sources == {A}


def test_product_of_parameters_is_known_by_its_exponents():
    product = follow(lambda a, b: (a * b[..., None]) * b[:, None] * jnp.square(b[:, None]), X, jnp.ones(2))
    assert product.powers == {A: 1, B: 4}
    assert follow(lambda a: a**3, X).powers == {A: 3}
    assert follow(lambda a, b: a * b + 1, X, X).powers is None
    assert follow(lambda a, b: 2 * a * b, X, X).powers is None


def test_sources_are_all_parameters_a_value_depends_on():
    assert follow(lambda a, b, c: a * jnp.sin(c), X, X, X).sources == {A, C}
    gathered = follow(lambda a, b: a[b.astype(int)], X, jnp.zeros(2))
    assert gathered.sources == {A, B}
    assert gathered.copy_of is None


@pytest.mark.parametrize("name", ["a", "a:b", "outer/a", "numpyro_natgrad:a"])
@pytest.mark.parametrize("kind", LabelKind)
def test_label_is_read_back_from_its_string_whatever_the_name(kind, name):
    for label in (Label(kind, name), Label(kind, name, "scale_tril")):
        assert Label.decode(label.encode()) == label


def test_checkpoint_names_of_others_are_no_labels():
    assert Label.decode("residual") is None
    assert Label.decode("numpyro_natgrad_of_others:param::a") is None


DEGREES = {
    "constant": (lambda p, q: 1.0 + 0 * jnp.ones(()), 0),
    "sum": (lambda p, q: (2 * p - q + 1).sum(), 1),
    "weighted": (lambda p, q: jnp.dot(p, jnp.arange(3.0)), 1),
    "masked": (lambda p, q: jnp.where(jnp.array([True, False, True]), p, 0.0).sum(), 1),
    "mean": (lambda p, q: (p / 3).mean(), 1),
    "product": (lambda p, q: (p * q).sum(), 2),
    "quotient": (lambda p, q: (1 / p).sum(), 2),
    "logsumexp": (lambda p, q: jax.nn.logsumexp(p), 2),
    "scan": (lambda p, q: jax.lax.scan(lambda c, x: (c + x, None), 0.0, p)[0], 1),
    "scanned product": (lambda p, q: jax.lax.scan(lambda c, x: (c * x, None), 1.0, p)[0], 2),
}


@pytest.mark.parametrize("how", DEGREES)
def test_degree_in_log_densities(how):
    function, degree = DEGREES[how]
    p = jnp.arange(1.0, 4.0)
    origin, _ = origins(lambda p, q: function(tag(DENSITY, p), tag(DENSITY._replace(name="q"), q)), p, p)
    assert origin.degree == degree


@pytest.mark.parametrize("vectorised", [True, False])
def test_repeated_draws_are_counted(vectorised):
    def loss(x):
        one = lambda k: tag(DRAW, x * k).sum()
        ks = jnp.arange(5.0)
        return (jax.vmap(one)(ks) if vectorised else jax.lax.map(one, ks)).sum()

    _, seen = origins(loss, jnp.ones(3))
    assert seen[DRAW].size == 15
