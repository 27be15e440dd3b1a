# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Programs on several devices, which ``test_devices.py`` runs in processes of their own.

    python device_programs.py PROGRAM FILE PROCESSES NUMBER PORT

The figures that a program finds are written to FILE by the first process. The number of devices is in ``XLA_FLAGS``.
"""

import os
import pathlib
import pickle
import re
import signal
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from numpyro import distributions as dist
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal

from numpyro_natgrad import NaturalGradient, fit, verdict
from numpyro_natgrad.infer.judge import _JUDGES
from numpyro_natgrad.infer.loop import program_of

Arrays = tuple[np.ndarray, ...]
ROWS, LATENTS = 800, 2048
STEPS = 12
#: Collectives that bring the parts of an array together, or move them.
GATHERS = ("all-gather", "all-to-all", "collective-permute", "reduce-scatter")


def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()), ("part",))


def spread(x: Any, axis: int | None) -> jax.Array:
    """An array in parts along an axis, or in copies; every process has all of it."""
    x = np.asarray(x)
    parts = [None] * x.ndim if axis is None else ["part" if i == axis else None for i in range(x.ndim)]
    return jax.make_array_from_callback(x.shape, NamedSharding(mesh(), PartitionSpec(*parts)), lambda i: x[i])


def spread_state(state: Any, size: int) -> Any:
    """A state whose arrays of so many numbers are in parts, and all others in copies."""
    place = lambda x: NamedSharding(mesh(), PartitionSpec("part") if x.shape == (size,) else PartitionSpec())
    return jax.jit(lambda x: x, out_shardings=jax.tree.map(place, state))(state)


def regression(rows: int, latents: int) -> tuple[Callable, Arrays]:
    """Logistic regression; its data."""
    draw = np.random.default_rng(0)
    x = draw.normal(size=(rows, latents)).astype(np.float32) / np.sqrt(latents).astype(np.float32)
    y = (draw.random(rows) < 1 / (1 + np.exp(-3 * x @ draw.normal(size=latents)))).astype(np.float32)

    def model(x: jax.Array, y: jax.Array) -> None:
        w = numpyro.sample("w", dist.Normal(0, 1).expand([latents]).to_event(1))
        with numpyro.plate("rows", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)

    return model, (x, y)


def counts(latents: int) -> tuple[Callable, Arrays]:
    """A latent for each row, all in one plate; its data."""
    y = np.random.default_rng(0).poisson(20.0, latents).astype(np.float32)

    def model(y: jax.Array) -> None:
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Normal(3, 0.3))
            numpyro.sample("y", dist.Poisson(jnp.exp(z)), obs=y)

    return model, (y,)


def svi_of(model: Callable, guide: Callable, particles: int = 4, **options: Any) -> SVI:
    return SVI(model, guide(model), NaturalGradient(), Trace_ELBO(num_particles=particles, **options))


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and numbers, all arrays together, of each collective operation of a compiled program."""
    found = re.findall(rf"= (.+?) ({'|'.join(('all-reduce', *GATHERS))})(?:-start)?\(", text)
    size = lambda shape: int(np.prod([int(n) for n in shape.split(",") if n]))
    return [(kind, sum(map(size, re.findall(r"\w+\[([\d,]*)\]", shapes)))) for shapes, kind in found]


def path_of(svi: SVI, state: Any, *args: Any) -> list[Any]:
    """The states from which the first steps start."""
    update, path = jax.jit(svi.update), [state]
    for _ in range(STEPS - 1):
        path.append(update(path[-1], *args)[0])
    return path


def steps_of(svi: SVI, path: list[Any], *args: Any) -> dict[str, Any]:
    """Losses and averaged parameters of a step from each state, and the collectives of one.

    Two runs, each along its own states, would tell more of the start than of the step: far from the posterior a step
    multiplies a difference of rounding by ten.
    """
    update = jax.jit(svi.update)
    text = update.lower(path[0], *args).compile().as_text()
    ends = [update(state, *args) for state in path]
    params = [{name: np.asarray(x) for name, x in svi.get_params(state).items()} for state, _ in ends]
    return {
        "loss": np.array([float(loss) for _, loss in ends]),
        "params": jax.tree.map(lambda *x: np.stack(x), *params),
        "collectives": collectives(text),
    }


def fitted(svi: SVI, state: Any, *args: Any, **options: Any) -> dict[str, Any]:
    """What ``fit`` and ``verdict`` find, and the collectives of steps and judge."""
    result = fit(svi, random.key(0), *args, init_state=state, max_steps=100, **options)
    judged = verdict(svi, result, random.key(1), *args, num_draws=400, progress_bar=False)
    chunks = [future.result() for _, future in program_of(svi, False)._compiled.values()]
    judges = [future.result() for future in _JUDGES[svi][1]._programs.values()]
    return {
        "collectives": [x for program in chunks + judges for x in collectives(program.as_text())],
        "loss": result.losses,
        "reason": result.reason,
        "in parts": {name: not x.is_fully_replicated for name, x in result.params.items()},
        "decrement": judged.newton_decrement,
        "log weights": judged.log_weights,
        "moments": {name: (m.mean, m.sd) for name, m in judged.guide.items()},
        "linear response": judged.linear_response,
    }


# ---- programs --------------------------------------------------------------------------------------------------------


def features() -> dict[str, Any]:
    """Steps of a mean field in parts, whose data are in parts along its axis."""
    model, (x, y) = regression(64, LATENTS)
    svi = svi_of(model, AutoNormal, 2)
    path = path_of(svi, svi.init(random.key(2), x, y), x, y)
    in_parts = [spread_state(state, LATENTS) for state in path]
    return {"one": steps_of(svi, path, x, y), "many": steps_of(svi, in_parts, spread(x, 1), spread(y, None))}


def rows(guide: Callable) -> dict[str, Any]:
    """Steps on rows in parts, by Hessian-vector products: the first regressions on draws amplify rounding."""
    model, data = regression(ROWS, 6)
    svi = SVI(model, guide(model), NaturalGradient(estimator="second_order"), Trace_ELBO(num_particles=4))
    path = path_of(svi, svi.init(random.key(1), *data), *data)
    return {"one": steps_of(svi, path, *data), "many": steps_of(svi, path, *(spread(x, 0) for x in data))}


def particles() -> dict[str, Any]:
    """Steps with particles in parts; in double precision, because the first regressions on draws amplify rounding."""
    model, data = regression(64, 6)
    keys_in_parts = lambda keys: lax.with_sharding_constraint(keys, NamedSharding(mesh(), PartitionSpec("part")))
    in_parts = lambda f, keys: jax.vmap(f)(keys_in_parts(keys))
    one, many = svi_of(model, AutoNormal, 16), svi_of(model, AutoNormal, 16, vectorize_particles=in_parts)
    many.init(random.key(1), *data)
    path = path_of(one, one.init(random.key(1), *data), *data)
    return {"one": steps_of(one, path, *data), "many": steps_of(many, path, *data)}


def in_double_precision(program: Callable[[], Any]) -> Any:
    with jax.enable_x64(True):
        return program()


def whole() -> dict[str, Any]:
    """``fit`` and ``verdict`` with rows in parts, and with parameters in parts."""
    found = {}
    for name, (model, data), guide in (
        ("rows", regression(ROWS, 6), AutoMultivariateNormal),
        ("parameters", counts(LATENTS), AutoNormal),
    ):
        svi = svi_of(model, guide)
        state = svi.init(random.key(1), *data)
        if jax.device_count() > 1:
            state, data = spread_state(state, LATENTS), tuple(spread(x, 0) for x in data)
        tolerance = 0.05 if name == "rows" else 20.0
        found[name] = fitted(svi, state, *data, tolerance=tolerance)
    return found


def checkpointed(folder: pathlib.Path) -> dict[str, Any]:
    """Fits in pieces of ten steps, from the last state that was saved; the second process dies in the third piece."""
    model, data = regression(ROWS, 6)
    svi = svi_of(model, AutoNormal)
    file = folder / "state.pickle"
    state = svi.init(random.key(1), *data)
    saved = pickle.loads(file.read_bytes()) if file.exists() else (0, [])
    begin, leaves = saved
    if leaves:
        key = random.wrap_key_data(leaves.pop())
        state = jax.tree.unflatten(jax.tree.structure(state._replace(rng_key=None)), leaves)._replace(rng_key=key)
    data, state = tuple(spread(x, 0) for x in data), spread_state(state, LATENTS)
    for piece in range(begin, 4):
        if jax.process_count() > 1 and piece == 2 and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        result = fit(svi, random.key(0), *data, init_state=state, max_steps=10, tolerance=0, progress_bar=False)
        state = result.state
        leaves = [np.asarray(x) for x in jax.tree.leaves(state._replace(rng_key=None))]
        leaves.append(np.asarray(random.key_data(state.rng_key)))
        if jax.process_index() == 0:
            file.write_bytes(pickle.dumps((piece + 1, leaves)))
    return {"params": {name: np.asarray(x) for name, x in svi.get_params(state).items()}}


PROGRAMS: dict[str, Callable[[pathlib.Path], Any]] = {
    "features": lambda folder: features(),
    "steps": lambda folder: {
        "full": rows(AutoMultivariateNormal),
        "diagonal": rows(AutoNormal),
        "particles": in_double_precision(particles),
    },
    "whole": lambda folder: whole(),
    "checkpointed": checkpointed,
}


def main() -> None:
    program, file, processes, number, port = sys.argv[1], pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:])
    if processes > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", processes, number, heartbeat_timeout_seconds=10)
    found = PROGRAMS[program](file.parent)
    if jax.process_index() == 0:
        file.write_bytes(pickle.dumps(found))


if __name__ == "__main__":
    main()
