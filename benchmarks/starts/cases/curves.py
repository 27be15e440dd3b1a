# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Curves of the natural sciences: exponentials, saturation, growth, dose and response, differential equations."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax

from ..problems import problem


@problem("sum of exponentials", 50, every_setting=True, tenth=True)
def two_decays(rng: np.random.Generator) -> tuple[Any, ...]:
    """A sum of two exponential decays, whose order is not determined."""
    t = np.linspace(0, 8, 40)
    y = 3 * np.exp(-2 * t) + 2 * np.exp(-0.3 * t) + 0.1 * rng.normal(size=40)

    def model(t: Any, y: Any) -> None:
        amplitudes = numpyro.sample("amplitudes", dist.LogNormal(0, 1).expand([2]).to_event(1))
        rates = numpyro.sample("rates", dist.LogNormal(0, 1.5).expand([2]).to_event(1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        mean = jnp.exp(-t[:, None] * rates) @ amplitudes
        with numpyro.plate("times", len(t)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, t, y


@problem("curve", 51)
def michaelis_menten(rng: np.random.Generator) -> tuple[Any, ...]:
    """Reaction speed and concentration, most of them far below saturation."""
    concentration = np.repeat([0.1, 0.2, 0.4, 0.8, 1.6], 3)
    speed = 5 * concentration / (2.5 + concentration) * np.exp(0.1 * rng.normal(size=15))

    def model(concentration: Any, speed: Any) -> None:
        fastest = numpyro.sample("fastest", dist.LogNormal(1, 1))
        half = numpyro.sample("half", dist.LogNormal(0, 1.5))
        sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
        mean = jnp.log(fastest * concentration / (half + concentration))
        with numpyro.plate("rows", len(speed)):
            numpyro.sample("speed", dist.LogNormal(mean, sigma), obs=speed)

    return model, concentration, speed


@problem("curve", 52, every_setting=True)
def logistic_growth(rng: np.random.Generator) -> tuple[Any, ...]:
    """Population counts on their way to a capacity."""
    t = np.arange(0.0, 25)
    y = rng.poisson(200 / (1 + 19 * np.exp(-0.4 * t)))

    def model(t: Any, y: Any) -> None:
        capacity = numpyro.sample("capacity", dist.LogNormal(5, 1))
        first = numpyro.sample("first", dist.LogNormal(2, 1))
        rate = numpyro.sample("rate", dist.LogNormal(-1, 1))
        mean = capacity / (1 + (capacity / first - 1) * jnp.exp(-rate * t))
        with numpyro.plate("years", len(t)):
            numpyro.sample("y", dist.Poisson(jnp.maximum(mean, 1e-3)), obs=y)

    return model, t, y


@problem("curve", 53)
def dose_response(rng: np.random.Generator) -> tuple[Any, ...]:
    """Four parameters of a sigmoid in the logarithm of the dose."""
    log_dose = np.linspace(-4, 4, 24)
    y = 1 + 9 / (1 + np.exp(-1.5 * (log_dose - 0.7))) + 0.5 * rng.normal(size=24)

    def model(log_dose: Any, y: Any) -> None:
        bottom = numpyro.sample("bottom", dist.Normal(0, 10))
        top = numpyro.sample("top", dist.Normal(0, 10))
        middle = numpyro.sample("middle", dist.Normal(0, 3))
        slope = numpyro.sample("slope", dist.Normal(0, 2))
        sigma = numpyro.sample("sigma", dist.HalfNormal(2))
        mean = bottom + (top - bottom) * jax.nn.sigmoid(slope * (log_dose - middle))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, log_dose, y


@problem("curve", 54)
def sine_wave(rng: np.random.Generator) -> tuple[Any, ...]:
    """Amplitude, frequency and phase of a wave: the likelihood in the frequency has many modes."""
    t = np.linspace(0, 6, 40)
    y = 1.2 * np.sin(2.2 * t + 0.5) + 0.4 * rng.normal(size=40)

    def model(t: Any, y: Any) -> None:
        waves = numpyro.sample("waves", dist.Normal(0, 1).expand([2]).to_event(1))
        frequency = numpyro.sample("frequency", dist.LogNormal(0.7, 0.3))
        sigma = numpyro.sample("sigma", dist.HalfNormal(1))
        mean = waves[0] * jnp.sin(frequency * t) + waves[1] * jnp.cos(frequency * t)
        with numpyro.plate("times", len(t)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    return model, t, y


def _runge_kutta(field: Any, start: Any, step: float, count: int) -> Any:
    """The solution of a differential equation after 1 to ``count`` steps."""

    def one(z: Any, _: None) -> Any:
        k1 = field(z)
        k2 = field(z + step / 2 * k1)
        k3 = field(z + step / 2 * k2)
        z = z + step / 6 * (k1 + 2 * k2 + 2 * k3 + field(z + step * k3))
        return z, z

    return lax.scan(one, start, None, length=count)[1]


@problem("differential equation", 55, every_setting=True)
def predator_prey(rng: np.random.Generator) -> tuple[Any, ...]:
    """Yearly catches of two species, by the equations of Lotka and Volterra in twenty steps."""
    rates = np.array([0.6, 0.03, 0.03, 0.8])
    path, z = [], np.array([30.0, 8.0])
    for _ in range(200):
        z = z + 0.05 * z * np.array([rates[0] - rates[1] * z[1], rates[2] * z[0] - rates[3]])
        path.append(z)
    y = np.array(path[19::20]) * np.exp(0.2 * rng.normal(size=(10, 2)))

    def model(y: Any) -> None:
        growth = numpyro.sample("growth", dist.LogNormal(jnp.log(jnp.array([0.6, 0.8])), 0.5).to_event(1))
        contact = numpyro.sample("contact", dist.LogNormal(jnp.log(0.03) * jnp.ones(2), 0.5).to_event(1))
        start = numpyro.sample("start", dist.LogNormal(jnp.log(jnp.array([20.0, 10.0])), 0.7).to_event(1))
        sigma = numpyro.sample("sigma", dist.LogNormal(-1, 0.7))

        def field(log_z: Any) -> Any:
            z = jnp.exp(jnp.clip(log_z, -10, 8))
            return jnp.stack([growth[0] - contact[0] * z[1], contact[1] * z[0] - growth[1]])

        path = _runge_kutta(field, jnp.log(start), 0.25, 40)[3::4]
        numpyro.sample("y", dist.LogNormal(path, sigma).to_event(2), obs=y)

    return model, y


@problem("differential equation", 56)
def drug_in_blood(rng: np.random.Generator) -> tuple[Any, ...]:
    """Absorption and elimination of a drug: which of the two rates is the larger is not determined by the shape."""
    t = np.array([0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 12])
    y = 4 * 1.5 / (1.5 - 0.25) * (np.exp(-0.25 * t) - np.exp(-1.5 * t)) * np.exp(0.1 * rng.normal(size=10))

    def model(t: Any, y: Any) -> None:
        absorption = numpyro.sample("absorption", dist.LogNormal(0, 1))
        elimination = numpyro.sample("elimination", dist.LogNormal(-1, 1))
        scale = numpyro.sample("scale", dist.LogNormal(1, 1))
        sigma = numpyro.sample("sigma", dist.HalfNormal(0.5))
        field = lambda z: jnp.stack([-absorption * z[0], absorption * z[0] - elimination * z[1]])
        path = _runge_kutta(field, scale * jnp.array([1.0, 0.0]), 0.125, 96)[:, 1]
        level = path[jnp.round(8 * t).astype(int) - 1]
        with numpyro.plate("samples", len(t)):
            numpyro.sample("y", dist.LogNormal(jnp.log(jnp.maximum(level, 1e-6)), sigma), obs=y)

    return model, t, y
