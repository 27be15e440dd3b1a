# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""
A variational autoencoder of digits
===================================

A variational autoencoder of handwritten digits: networks in the guide and in the model, by minibatches.
The model and its guide are::

    z ~ N(0, I),   x | z ~ Bernoulli(decoder(z)),        q(z | x) = N(encoder(x))        (Kingma & Welling 2014)

Both networks take natural-gradient steps: the Fisher matrix of q for the encoder, and that of the likelihood for the
decoder, pulled back through the network over the minibatch. ``NaturalGradient`` has default options; Adam's rate is one
of five, constant and with a cosine decay. The digits are scikit-learn's, 8 × 8 pixels, black from 8 of 16 grey levels
on; a sixth of them is held out. For one of these the latents by the encoder are compared with those by NUTS.

Run it with ``python examples/vae.py``; ``--help`` lists what can be changed.
"""

# sphinx_gallery_thumbnail_path = 'figures/vae.png'

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from _common import NATURAL, OTHERS, nuts, options, plain, save, summary
from flax import nnx
from jax import Array, lax, random
from matplotlib.axes import Axes
from numpyro.contrib.module import nnx_module
from numpyro.infer import SVI, Trace_ELBO
from numpyro.optim import optax_to_numpyro
from sklearn.datasets import load_digits
from tqdm import tqdm

from numpyro_natgrad import NaturalGradient

PIXELS, LATENTS, HIDDEN, BATCH = 64, 8, 128, 128
RATES = (0.03, 0.01, 0.003, 0.001, 0.0003)
DRAWS = 8  # of each image's latents, where the ELBO is looked at


# %%
# Networks, model and guide
# -------------------------


class Encoder(nnx.Module):
    """From an image to the location and scale of its latents."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden = nnx.Linear(PIXELS, HIDDEN, rngs=rngs)
        self.loc, self.scale = nnx.Linear(HIDDEN, LATENTS, rngs=rngs), nnx.Linear(HIDDEN, LATENTS, rngs=rngs)

    def __call__(self, x: Array) -> tuple[Array, Array]:
        h = jnp.tanh(self.hidden(x))
        return self.loc(h), jax.nn.softplus(self.scale(h))


class Decoder(nnx.Module):
    """From latents to the logits of the pixels."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.hidden, self.logits = nnx.Linear(LATENTS, HIDDEN, rngs=rngs), nnx.Linear(HIDDEN, PIXELS, rngs=rngs)

    def __call__(self, z: Array) -> Array:
        return self.logits(jnp.tanh(self.hidden(z)))


class Autoencoder(NamedTuple):
    """Model and guide of `size` images, in minibatches."""

    encoder: Encoder
    decoder: Decoder
    size: int

    def model(self, x: Array) -> None:
        """Images from latents.

        :param x: a batch of images, shape `(batch, PIXELS)`.
        """
        decoder = nnx_module("decoder", self.decoder)
        with numpyro.plate("images", self.size, subsample_size=len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENTS]).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(self, x: Array) -> None:
        """Latents from images.

        :param x: as for the model.
        """
        encoder = nnx_module("encoder", self.encoder)
        with numpyro.plate("images", self.size, subsample_size=len(x)):
            numpyro.sample("z", dist.Normal(*encoder(x)).to_event(1))


# %%
# Data and fits
# -------------


class Digits(NamedTuple):
    """Images of zeros and ones, shape `(n, PIXELS)`: those to fit, and those held out."""

    train: Array
    test: Array


class Curve(NamedTuple):
    """One fit: ELBO in nats an image at each checkpoint, on the images that are fitted and on those held out.

    :param params: the parameters at the end.
    :param milliseconds: of a step, compiled.
    """

    label: str
    steps: np.ndarray
    train: np.ndarray
    test: np.ndarray
    params: dict[str, Any]
    milliseconds: float

    def reached(self, elbo: float) -> float:
        """Steps to the first checkpoint with that ELBO on the fitted images; infinite if there is none.

        :param elbo: nats an image.
        """
        return float(np.min(self.steps[self.train >= elbo].astype(float), initial=np.inf))


def digits() -> Digits:
    """Scikit-learn's digits, in black and white."""
    images = jnp.asarray(load_digits().data >= 8, jnp.float32)
    order = random.permutation(random.key(0), len(images))
    return Digits(images[order[300:]], images[order[:300]])


def autoencoder(data: Digits, seed: int) -> Autoencoder:
    """Networks as flax starts them.

    :param data: what is fitted.
    :param seed: of the networks.
    """
    return Autoencoder(Encoder(nnx.Rngs(seed)), Decoder(nnx.Rngs(seed + 1000)), len(data.train))


def elbo(vae: Autoencoder, params: dict[str, Any], images: Array) -> Array:
    """Nats an image, on draws that are common to all fits.

    :param vae: model and guide.
    :param params: the networks'.
    :param images: shape `(n, PIXELS)`.
    """
    whole = vae._replace(size=len(images))
    loss = lambda key: Trace_ELBO().loss(key, params, whole.model, whole.guide, images)
    return -jnp.mean(jax.vmap(loss)(random.split(random.key(99), DRAWS))) / len(images)


def fits(
    data: Digits, make: Callable[[Any], Any], rates: dict[str, Any], steps: int, *, every: int, seed: int = 0
) -> list[Curve]:
    """One fit for every rate, all by the same compiled program.

    :param data: what to fit.
    :param make: an optimizer, from its rate.
    :param rates: label and rate of every fit.
    :param steps: how many.
    :param every: steps between checkpoints.
    :param seed: of networks, draws and batches.
    """
    vae = autoencoder(data, seed)
    first = next(iter(rates.values()))
    base = SVI(vae.model, vae.guide, make(first), Trace_ELBO())
    start = base.init(random.key(seed), data.train[:BATCH])

    @jax.jit
    def advance(rate: Any, state: Any, keys: Array) -> Any:
        svi = copy.copy(base)
        svi.optim = make(rate)

        def step(state: Any, key: Array) -> Any:
            return svi.update(state, data.train[random.randint(key, (BATCH,), 0, len(data.train))])[0], None

        return lax.scan(step, state, keys)[0]

    score = jax.jit(partial(elbo, vae))
    keys = random.split(random.key(seed + 5), (steps // every, every))
    jax.block_until_ready(advance(first, start, keys[0]))  # compiles
    curves = []
    for label, rate in rates.items():
        state, seconds, train, test = start, 0.0, [], []
        for chunk in tqdm(keys, desc=label, unit=f"{every} steps"):
            before = time.perf_counter()
            state = jax.block_until_ready(advance(rate, state, chunk))
            seconds += time.perf_counter() - before
            params = base.get_params(state)
            train.append(float(score(params, data.train)))
            test.append(float(score(params, data.test)))
        marks = every * np.arange(1, len(keys) + 1)
        curves.append(Curve(label, marks, np.array(train), np.array(test), params, 1e3 * seconds / steps))
    return curves


def natural(data: Digits, steps: int, *, every: int = 25, seed: int = 0) -> Curve:
    """The fit by natural gradients, nothing chosen.

    :param data: what to fit.
    :param steps: how many.
    :param every: steps between checkpoints.
    :param seed: of networks, draws and batches.
    """
    return fits(data, lambda _: NaturalGradient(), {"natural gradient": 0.0}, steps, every=every, seed=seed)[0]


def adams(data: Digits, steps: int, *, every: int = 25, seed: int = 0) -> list[Curve]:
    """Adam at five rates, each constant and with a cosine decay over all steps.

    :param data: what to fit.
    :param steps: how many.
    :param every: steps between checkpoints.
    :param seed: of networks, draws and batches.
    """
    rates = {f"Adam({rate:g}{decay})": (rate, bool(decay)) for decay in ("", ", cosine") for rate in RATES}
    decayed = lambda step, decays: jnp.where(decays, 0.5 * (1 + jnp.cos(jnp.pi * step / steps)), 1.0)
    make = lambda rate: optax_to_numpyro(optax.adam(lambda step: rate[0] * decayed(step, rate[1])))
    return fits(data, make, rates, steps, every=every, seed=seed)


def line(curve: Curve, mark: float) -> str:
    """What a fit cost and where it ended.

    :param curve: the fit.
    :param mark: the ELBO to reach, nats an image.
    """
    steps = curve.reached(mark)
    there = f"{steps:>9.0f}{1e-3 * curve.milliseconds * steps:>9.2f}" if np.isfinite(steps) else f"{'never':>9}{'–':>9}"
    return f"{curve.label:<22}{curve.steps[-1]:>7}{curve.train[-1]:>9.2f}{curve.test[-1]:>10.2f}{there}"


# %%
# One image
# ---------


def one_image(params: dict[str, Any], vae: Autoencoder, image: Array) -> str:
    """ArviZ's summaries of the latents of an image, by the encoder and by NUTS, for the same decoder.

    :param params: the networks'.
    :param vae: model and guide.
    :param image: shape `(PIXELS,)`.
    """
    decoder = _network(vae.decoder, params["decoder$params"])
    loc, scale = _network(vae.encoder, params["encoder$params"])(image)

    def model(image: Array) -> None:
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([LATENTS]).to_event(1))
        numpyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=image)

    by_encoder = loc + scale * random.normal(random.key(2), (4000, LATENTS))
    return summary({"encoder": by_encoder, "NUTS": jnp.asarray(nuts(model, image)["z"])})


# %%
# The figure
# ----------


def mosaic(axis: Axes, rows: list[Array], title: str) -> None:
    """Images in rows, in ink on white.

    :param axis: where to draw.
    :param rows: each of shape `(n, PIXELS)`.
    :param title: what they are.
    """
    tiles = [np.pad(np.asarray(x).reshape(8, 8), 1, constant_values=0.3) for row in rows for x in row]
    columns = len(rows[0])
    picture = np.block([tiles[i * columns : (i + 1) * columns] for i in range(len(rows))])
    axis.imshow(picture, cmap="gray_r", vmin=0, vmax=1)
    axis.set(title=title, xticks=[], yticks=[])


def reconstructed(params: dict[str, Any], vae: Autoencoder, images: Array) -> Array:
    """The mean image at the mean of each image's latents.

    :param params: the networks'.
    :param vae: model and guide.
    :param images: shape `(n, PIXELS)`.
    """
    loc, _ = _network(vae.encoder, params["encoder$params"])(images)
    return generated(params, vae, loc)


def generated(params: dict[str, Any], vae: Autoencoder, z: Array) -> Array:
    """Mean images of latents.

    :param params: the networks'.
    :param vae: model and guide.
    :param z: latents, shape `(n, LATENTS)`.
    """
    return jax.nn.sigmoid(_network(vae.decoder, params["decoder$params"])(z))


def _network(module: Any, params: Any) -> Any:
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)


def draw_curves(axes: list[Axes], curves: list[Curve], best: Curve) -> None:
    """ELBO of the fitted images against steps and seconds.

    :param axes: two of them.
    :param curves: the natural gradient's, and Adam's to show beside it.
    :param best: the Adam that sets the mark.
    """
    for curve, colour in zip(curves, (NATURAL, *OTHERS), strict=False):
        axes[0].plot(curve.steps, curve.train, color=colour, label=curve.label, lw=1.8)
        axes[1].plot(1e-3 * curve.milliseconds * curve.steps, curve.train, color=colour, lw=1.8)
    for axis, label in zip(axes, ("steps", "seconds, compilation excluded"), strict=True):
        axis.axhline(best.train[-1], color="0.6", lw=0.8, zorder=0)
        axis.set(xlabel=label, xscale="log", ylim=(best.train[-1] - 8, best.train[-1] + 2))
        plain(axis)
    axes[0].set_ylabel("ELBO (nats an image)")
    axes[1].legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="lower right", fontsize="small")


# %%
# All together
# ------------


def main() -> None:
    """Fit, compare, and draw the figure."""
    chosen = options("A variational autoencoder of digits.", "vae.png", steps=800, adam_steps=2000)
    data = digits()
    ours, others = natural(data, chosen.steps), adams(data, chosen.adam_steps)
    best = max(others, key=lambda curve: curve.train[-1])
    mark = best.train[-1]
    print(f"\n{'ELBO, nats an image':<22}{'steps':>6}{'fitted':>9}{'held out':>10}{'steps to':>9}{f'{mark:.2f}, s':>9}")
    for curve in (ours, *others):
        print(line(curve, mark))
    vae = autoencoder(data, 0)
    print(f"\nLatents of the first image that is held out:\n{one_image(ours.params, vae, data.test[0])}")
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.8), width_ratios=[3, 3, 2.4, 2.4], layout="constrained")
    draw_curves(list(axes[:2]), [ours, best, *(c for c in others if c is not best)][:4], best)
    seen = data.test[:32].reshape(4, 8, PIXELS)
    mosaic(axes[2], [row for x in seen for row in (x, reconstructed(ours.params, vae, x))], "held out, reconstructed")
    fresh = generated(ours.params, vae, random.normal(random.key(1), (8, 8, LATENTS)))
    mosaic(axes[3], list(fresh), "made up by the decoder")
    save(figure, chosen.output)


if __name__ == "__main__":
    main()
