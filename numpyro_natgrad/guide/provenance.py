# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Where a value of the loss comes from: one forward walk through its jaxpr.

Values are tagged with :func:`tag` while the loss is traced; :func:`origins` then carries, from every tag through every
equation, an :class:`Origin` = (tags it depends on, the product of tags that it *is* up to its shape, how log-densities
enter it). Three questions are answered without running anything:

* is a distribution's argument a parameter itself, a product of parameters, or computed in another way?
* does a parameter reach the loss by another way than the draws and the density of its site?
* is the loss affine in the log-densities of the guide (an ELBO is; a Rényi bound is not)?
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

_PREFIX = "numpyro_natgrad:"

# Equations that only change the shape, the type or the place in memory of their operand.
_SHAPE_ONLY = {
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p"),
    *("slice", "dynamic_slice", "name", "pvary", "optimization_barrier"),
}
# Equations through which an affine dependence stays affine whatever the operands are.
_AFFINE = _SHAPE_ONLY | {
    "gather",
    "add",
    "sub",
    "neg",
    "reduce_sum",
    "concatenate",
    "transpose",
    "add_any",
    "cumsum",
    "pad",
    "rev",
}
# ... and those that are affine in one operand while the others do not depend on it.
_BILINEAR = {"mul", "dot_general", "div", "select_n"}
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")


class Origin(NamedTuple):
    """The past of one value.

    :ivar sources: the tags it depends on; a value that is itself *cut* (see :func:`tag`) depends on its tag alone.
    :ivar powers: the tags, with their exponents, whose product it equals up to shape and dtype, or ``None``.
    :ivar degree: 0 if no log-density enters it, 1 if they enter affinely, 2 otherwise.
    """

    sources: frozenset[str] = frozenset()
    powers: Mapping[str, int] | None = None
    degree: int = 0

    @property
    def copy_of(self) -> str | None:
        """The tag that it equals up to shape and dtype, or ``None``."""
        return next(iter(self.powers)) if self.powers and list(self.powers.values()) == [1] else None


class Sighting(NamedTuple):
    """What was seen at a tag: the origin of the tagged value, and how often it was computed (the particles).

    ``sizes`` is by equation: particles may come in batches, each with a program of its own, and the body of a loop is
    walked more than once.  ``looped``: it was computed inside of a loop.
    """

    origin: Origin
    sizes: Mapping[int, int]
    looped: bool

    @property
    def size(self) -> int:
        return sum(self.sizes.values())

    @property
    def batched(self) -> bool:
        """Whether one equation computes it for all particles."""
        return len(self.sizes) == 1 and not self.looped


def tag(kind: str, name: str, value: Any) -> Any:
    """Mark ``value`` (an array) with a name that survives tracing, batching and scanning.

    :param kind: ``"param"``, ``"draw"``, ``"density"`` (these three cut the past: what follows depends on the tag), or
        any other word, which only observes.
    """
    return checkpoint_name(value, f"{_PREFIX}{kind}:{name}")


def origins(fn: Callable, *args: Any) -> tuple[Origin, dict[str, Sighting]]:
    """Trace ``fn(*args)`` and follow its tags.

    :param fn: a function whose first output leaf is the loss.
    :return: the origin of the loss, and what was seen at each tag (``"kind:name"``).
    """
    closed = jax.make_jaxpr(fn)(*args)
    seen: dict[str, Sighting] = {}
    outputs = _walk(closed.jaxpr, [Origin()] * len(closed.jaxpr.invars), seen, repeats=1)
    return outputs[0], seen


def _walk(jaxpr: Any, inputs: Sequence[Origin], seen: dict[str, Sighting], repeats: int) -> list[Origin]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def past(atom: Any) -> Origin:
        return Origin() if isinstance(atom, core.Literal) else known.get(atom, Origin())

    for eqn in jaxpr.eqns:
        outs = _equation(eqn, [past(v) for v in eqn.invars], seen, repeats)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [past(v) for v in jaxpr.outvars]


def _equation(eqn: Any, inputs: list[Origin], seen: dict[str, Sighting], repeats: int) -> list[Origin]:
    kind = eqn.primitive.name
    if kind == "name" and eqn.params["name"].startswith(_PREFIX):
        return [_tagged(eqn.params["name"][len(_PREFIX) :], inputs[0], eqn.outvars[0], seen, repeats)]
    if kind == "scan":
        return _scan(eqn, inputs, seen, repeats)
    if kind not in ("while", "cond"):
        for inner in (eqn.params.get(key) for key in _CALLS):
            if inner is not None:
                body = getattr(inner, "jaxpr", inner)
                if len(body.invars) == len(inputs) and len(body.outvars) == len(eqn.outvars):
                    return _walk(body, inputs, seen, repeats)
    merged = Origin(_union(inputs), _powers(eqn, inputs), _degree(kind, inputs))
    return [merged] * len(eqn.outvars)


def _tagged(label: str, past: Origin, out: Any, seen: dict[str, Sighting], repeats: int) -> Origin:
    before = seen[label].sizes if label in seen else {}
    seen[label] = Sighting(past, {**before, id(out): math.prod(out.aval.shape) * repeats}, repeats > 1)
    kind = label.partition(":")[0]
    if kind not in ("param", "draw", "density"):
        return past
    return Origin(frozenset([label]), {label: 1}, int(kind == "density"))


def _scan(eqn: Any, inputs: list[Origin], seen: dict[str, Sighting], repeats: int) -> list[Origin]:
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    carry = _unstacked(eqn.outvars, body.outvars)
    consts = _unstacked(eqn.invars, body.invars) - carry
    outputs: list[Origin] = []
    for _ in range(carry + 1):  # a carried value hears of one more carried value a round
        outputs = _walk(body, inputs, seen, repeats * eqn.params["length"])
        carried = [_join(a, b) for a, b in zip(inputs[consts : consts + carry], outputs[:carry], strict=True)]
        if carried == inputs[consts : consts + carry]:
            break
        inputs = [*inputs[:consts], *carried, *inputs[consts + carry :]]
    return outputs


def _unstacked(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many operands of a scan are not sliced along its axis: constants and carried values, which come first."""
    return sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))


def _union(inputs: list[Origin]) -> frozenset[str]:
    return frozenset().union(*(i.sources for i in inputs))


def _join(a: Origin, b: Origin) -> Origin:
    return Origin(a.sources | b.sources, a.powers if a.powers == b.powers else None, max(a.degree, b.degree))


def _powers(eqn: Any, inputs: list[Origin]) -> Mapping[str, int] | None:
    kind, first = eqn.primitive.name, inputs[0].powers if inputs else None
    if first is None:
        return None
    if kind in _SHAPE_ONLY:
        return None if _union(inputs[1:]) else first
    if kind == "mul":
        return _product(first, inputs[1].powers)
    exponent = {"square": 2, "integer_pow": eqn.params.get("y")}.get(kind)
    return {label: n * exponent for label, n in first.items()} if exponent else None


def _product(a: Mapping[str, int], b: Mapping[str, int] | None) -> Mapping[str, int] | None:
    return None if b is None else {label: a.get(label, 0) + b.get(label, 0) for label in {**a, **b}}


def _degree(kind: str, inputs: list[Origin]) -> int:
    degrees = [i.degree for i in inputs]
    top = max(degrees, default=0)
    if top == 0 or kind in _AFFINE or (kind in _BILINEAR and _affine(kind, degrees)):
        return top
    return 2


def _affine(kind: str, degrees: list[int]) -> bool:
    """Whether log-densities enter one operand only, and one that counts linearly."""
    if kind == "select_n":
        return degrees[0] == 0
    return degrees[1] == 0 if kind == "div" else 0 in degrees
