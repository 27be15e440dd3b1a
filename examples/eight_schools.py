# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
Eight schools beside Adam
=========================

The same SVI, fitted by natural gradients and by Adam, and NUTS beside the fit.

Run it with ``python examples/eight_schools.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/eight_schools.png'

from __future__ import annotations

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from _common import (
    Problem,
    follow,
    follow_adam,
    guide_beside_nuts,
    nuts,
    options,
    picture,
    posterior,
    report,
    save,
    scoreboard,
    summary,
)
from jax import Array
from numpyro.infer.autoguide import AutoMultivariateNormal

from numpyro_natgrad import NaturalGradient

# %%
# Data
# ----
#
# Rubin (1981), *Journal of Educational Statistics* 6, 377-401: effects of coaching on a test in eight schools, and
# their standard errors, in points.

EFFECT = jnp.array([28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0])
ERROR = jnp.array([15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0])


# %%
# The model
# ---------


def model(error: Array, effect: Array) -> None:
    """Effects that differ from school to school, non-centred.

    :param error: standard errors of the estimated effects, shape `(8,)`.
    :param effect: estimated effects, in points of the test, shape `(8,)`.
    """
    mu = numpyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = numpyro.sample("tau", dist.HalfCauchy(5.0))
    with numpyro.plate("school", len(error)):
        theta_trans = numpyro.sample("theta_trans", dist.Normal(0.0, 1.0))
        theta = numpyro.deterministic("theta", mu + tau * theta_trans)
        numpyro.sample("effect", dist.Normal(theta, error), obs=effect)


# %%
# Fits and figure
# ---------------
#
# ``_common.py`` of the same folder has what the examples share: fits scored on common draws, tables and the figure.


def main() -> None:
    """Fit, tabulate, compare, draw."""
    chosen = options("Eight schools.", "eight_schools.png", steps=100, adam_steps=5000)
    problem = Problem(model, AutoMultivariateNormal(model), (ERROR, EFFECT))
    natural = NaturalGradient()
    curve = follow("NaturalGradient()", problem, natural, chosen.steps)
    print(f"\n{report(problem, natural)}\n")
    dims = {"theta": ["school"], "theta_trans": ["school"]}
    draws = posterior(problem, curve)
    print(summary(draws, dims=dims, coords={"school": list("ABCDEFGH")}))
    print(f"\n{guide_beside_nuts(draws, nuts(model, ERROR, EFFECT), ['mu', 'tau', 'theta'])}")
    curves = [curve, *follow_adam(problem, chosen.adam_steps)]
    print(f"\n{scoreboard(curves)}")
    title = "Eight schools, full-rank Gaussian guide, 8 draws a step"
    save(picture(curves, title, depth=12.0), chosen.output)


if __name__ == "__main__":
    main()
