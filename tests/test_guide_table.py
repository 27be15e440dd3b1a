# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""The table of guides and losses in ``docs/guides.md`` has all of NumPyro's, and each row is what happens."""

import pathlib
import re
import warnings

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers, infer
from numpyro.contrib import einstein
from numpyro.infer import SVI, Trace_ELBO, autoguide
from tables import DATA, lists, plated, school, tiers
from test_annealed import times
from test_score_samples import ANNEALED

from numpyro_natgrad import NaturalGradient

PAGE = (pathlib.Path(__file__).parent.parent / "docs" / "guides.md").read_text()
FOUND = re.findall(r"^\| `([\w* .]+)` \| (works|works slower|refused) \| `(.*?)` \|$", PAGE, re.MULTILINE)
ROWS = {name: (status, text) for name, status, text in FOUND}
ABSTRACT = {"AutoGuide", "AutoContinuous", "ELBO"}
GUIDES = {name for name in autoguide.__all__ if name not in ABSTRACT}
LOSSES = {name for name in dir(infer) if name.endswith("ELBO") and name not in ABSTRACT}


def made(name):
    """Model, guide and loss of a row."""
    if name in ANNEALED:
        model, make, _ = ANNEALED[name]
        return model, make(model), Trace_ELBO(8)
    if name == "AutoGuideList":
        return school, lists(school), Trace_ELBO(8)
    if name.startswith("AutoBatched"):
        return plated, getattr(autoguide, name)(plated, batch_ndim=1), Trace_ELBO(8)
    if name in GUIDES:
        return school, getattr(autoguide, name)(school), Trace_ELBO(8)
    guide = autoguide.AutoNormal(school)
    if name == "handlers.scale":
        return handlers.scale(school, 0.5), handlers.scale(guide, 0.5), Trace_ELBO(8)
    loss = times(Trace_ELBO(8), 0.5) if name == "c * ELBO" else getattr(infer, name)(num_particles=8)
    return school, guide, loss


def test_the_table_has_every_guide_and_loss():
    assert set(ROWS) == GUIDES | LOSSES | {"handlers.scale", "c * ELBO", "SteinVI"}


@pytest.mark.parametrize("name", tiers(sorted(set(ROWS) - {"SteinVI"}), "AutoNormal", "AutoDelta", "RenyiELBO"))
def test_a_row_says_what_the_report_or_the_warning_says(name):
    status, text = ROWS[name]
    model, guide, loss = made(name)
    svi = SVI(model, guide, NaturalGradient(), loss)
    args = () if name in ANNEALED else (jnp.array(DATA, float),)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = svi.optim.report(svi, svi.init(random.key(0), *args), *args)
    told = [str(one.message) for one in caught if str(one.message).startswith("NaturalGradient")]
    assert any(text in one for one in [report, *told]), (report, told)
    assert status in ("works", "works slower")
    if status == "works":
        assert not told


def test_an_algorithm_that_gives_gradients_alone_is_refused():
    def model():
        numpyro.sample("z", dist.Normal(0, 1))

    stein = einstein.SteinVI(
        model, autoguide.AutoNormal(model), NaturalGradient(), einstein.RBFKernel(), num_stein_particles=2
    )
    state = stein.init(random.key(0))
    with pytest.raises(TypeError, match=ROWS["SteinVI"][1]):
        stein.update(state)
