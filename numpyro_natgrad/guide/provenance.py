# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Which parameters, draws and log-densities a value of the loss depends on: one forward walk through its jaxpr.

Values are tagged (:func:`tag`) while the loss is traced. :func:`origins` propagates an :class:`Origin` from every tag
through every equation, which answers three questions:

* Is a distribution's argument a parameter itself, a product of parameters, or computed in another way?
* Does a parameter reach the loss by another path than the draws and the density of its site?
* Is the loss affine in the guide's log-densities? An ELBO is; a Rényi bound is not.

``numpyro.ops.provenance.eval_provenance`` finds sources only; the first question needs exponents, the third a degree,
and the number of particles the sizes of tagged values.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core

_PREFIX = "numpyro_natgrad"

# Equations that only change the shape, the type or the place in memory of their operand.
_SHAPE_ONLY = {
    *("broadcast_in_dim", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p"),
    *("slice", "dynamic_slice", "name", "pvary", "optimization_barrier"),
}
# Equations through which an affine dependence stays affine whatever the operands are.
_AFFINE = _SHAPE_ONLY | {
    *("gather", "add", "sub", "neg", "reduce_sum", "concatenate", "transpose", "add_any", "cumsum", "pad", "rev"),
}
# Equations that are affine in one operand while the others do not depend on it.
_BILINEAR = {"mul", "dot_general", "div", "select_n"}
_CALLS = ("jaxpr", "call_jaxpr", "fun_jaxpr")

Atom = core.Var | core.Literal


class LabelKind(StrEnum):
    """What a tagged value is."""

    PARAM = "param"  #: a parameter's unconstrained value
    DRAW = "draw"  #: the value of a guide site
    DENSITY = "density"  #: the log-density of a guide site in the loss
    FROZEN_DENSITY = "frozen_density"  #: the same with a frozen draw
    ARGUMENT = "argument"  #: an argument of a guide site's distribution
    MODEL_VALUE = "model_value"  #: the value of a site of the model
    MODEL_DENSITY = "model_density"  #: its log-density

    @property
    def is_source(self) -> bool:
        """Whether values behind the tag depend on the tag alone, and not on the sources of the tagged value."""
        return self in (LabelKind.PARAM, LabelKind.DRAW, LabelKind.DENSITY)


class Label(NamedTuple):
    """The kind of a tagged value, the name of its parameter or site, and which ``argument`` of a distribution it is."""

    kind: LabelKind
    name: str
    argument: str = ""

    def encode(self) -> str:
        """The label as the one string that a jaxpr can carry."""
        return ":".join((_PREFIX, self.kind, self.argument, self.name))

    @staticmethod
    def decode(text: str) -> "Label | None":
        """The label from that string; ``None`` for any other string."""
        if not text.startswith(f"{_PREFIX}:"):
            return None
        _, kind, argument, name = text.split(":", 3)  # a site's name may hold colons
        return Label(LabelKind(kind), name, argument)


class Origin(NamedTuple):
    """What one value depends on.

    :ivar sources: the tags it depends on.
    :ivar powers: the tags, with their exponents, whose product it equals up to shape and dtype, or ``None``.
    :ivar degree: 0 if no log-density enters it, 1 if they enter affinely, 2 otherwise.
    """

    sources: frozenset[Label] = frozenset()
    powers: Mapping[Label, int] | None = None
    degree: int = 0

    @property
    def copy_of(self) -> Label | None:
        """The tag that it equals up to shape and dtype, or ``None``."""
        return next(iter(self.powers)) if self.powers and list(self.powers.values()) == [1] else None

    @property
    def params(self) -> frozenset[str]:
        return frozenset(label.name for label in self.sources if label.kind == LabelKind.PARAM)

    @property
    def is_drawn(self) -> bool:
        return any(label.kind == LabelKind.DRAW for label in self.sources)

    @property
    def param(self) -> str | None:
        """The parameter that it equals up to shape and dtype, or ``None``."""
        label = self.copy_of
        return label.name if label and label.kind == LabelKind.PARAM else None

    @property
    def param_powers(self) -> dict[str, int] | None:
        """The parameters, with their exponents, whose product it equals up to shape and dtype, or ``None``."""
        if self.powers is None or any(label.kind != LabelKind.PARAM for label in self.powers):
            return None
        return {label.name: n for label, n in self.powers.items()}


class TaggedValue(NamedTuple):
    """The origin of a tagged value, and how many numbers it has in all particles together.

    :ivar sizes: for each equation that computes it, since every batch of particles may have one.
    :ivar looped: whether it is computed inside of a loop.
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


Tags = dict[Label, TaggedValue]


def tag(label: Label, value: jax.Array) -> jax.Array:
    """Mark ``value`` (an array) with a label that survives tracing, batching and scanning."""
    return checkpoint_name(value, label.encode())


def origins(fn: Callable, *args: Any) -> tuple[Origin, Tags]:
    """Trace ``fn(*args)``; return the origin of its first output leaf, the loss, and of each tagged value."""
    closed = jax.make_jaxpr(fn)(*args)
    tags: Tags = {}
    outputs = _walk(closed.jaxpr, [Origin()] * len(closed.jaxpr.invars), tags, repeats=1)
    return outputs[0], tags


def _walk(jaxpr: core.Jaxpr, inputs: Sequence[Origin], tags: Tags, repeats: int) -> list[Origin]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))

    def past(atom: Atom) -> Origin:
        return Origin() if isinstance(atom, core.Literal) else known.get(atom, Origin())

    for eqn in jaxpr.eqns:
        outs = _equation(eqn, [past(v) for v in eqn.invars], tags, repeats)
        known.update(zip(eqn.outvars, outs, strict=True))
    return [past(v) for v in jaxpr.outvars]


def _equation(eqn: core.JaxprEqn, inputs: list[Origin], tags: Tags, repeats: int) -> list[Origin]:
    kind = eqn.primitive.name
    label = Label.decode(eqn.params["name"]) if kind == "name" else None
    if label:
        return [_tagged(label, inputs[0], eqn.outvars[0], tags, repeats)]
    if kind == "scan":
        return _scan(eqn, inputs, tags, repeats)
    if kind not in ("while", "cond"):
        for inner in (eqn.params.get(key) for key in _CALLS):
            if inner is not None:
                body = getattr(inner, "jaxpr", inner)
                if len(body.invars) == len(inputs) and len(body.outvars) == len(eqn.outvars):
                    return _walk(body, inputs, tags, repeats)
    merged = Origin(_union(inputs), _powers(eqn, inputs), _degree(kind, inputs))
    return [merged] * len(eqn.outvars)


def _tagged(label: Label, past: Origin, out: core.Var, tags: Tags, repeats: int) -> Origin:
    before = tags[label].sizes if label in tags else {}
    tags[label] = TaggedValue(past, {**before, id(out): math.prod(_shape(out)) * repeats}, repeats > 1)
    if not label.kind.is_source:
        return past
    return Origin(frozenset([label]), {label: 1}, int(label.kind == LabelKind.DENSITY))


def _scan(eqn: core.JaxprEqn, inputs: list[Origin], tags: Tags, repeats: int) -> list[Origin]:
    body = getattr(eqn.params["jaxpr"], "jaxpr", eqn.params["jaxpr"])
    carry = _unstacked(eqn.outvars, body.outvars)
    consts = _unstacked(eqn.invars, body.invars) - carry
    outputs: list[Origin] = []
    for _ in range(carry + 1):  # a dependence passes at most one carried value a round
        outputs = _walk(body, inputs, tags, repeats * eqn.params["length"])
        carried = [_join(a, b) for a, b in zip(inputs[consts : consts + carry], outputs[:carry], strict=True)]
        if carried == inputs[consts : consts + carry]:
            break
        inputs = [*inputs[:consts], *carried, *inputs[consts + carry :]]
    return outputs


def _unstacked(outer: Sequence[Atom], inner: Sequence[Atom]) -> int:
    """How many operands of a scan are not sliced along its axis: constants and carried values, which come first."""
    return sum(len(_shape(a)) == len(_shape(b)) for a, b in zip(outer, inner, strict=True))


def _shape(atom: Atom) -> tuple[int, ...]:
    return getattr(atom.aval, "shape", ())


def _union(inputs: list[Origin]) -> frozenset[Label]:
    return frozenset().union(*(i.sources for i in inputs))


def _join(a: Origin, b: Origin) -> Origin:
    return Origin(a.sources | b.sources, a.powers if a.powers == b.powers else None, max(a.degree, b.degree))


def _powers(eqn: core.JaxprEqn, inputs: list[Origin]) -> Mapping[Label, int] | None:
    kind, first = eqn.primitive.name, inputs[0].powers if inputs else None
    if first is None:
        return None
    if kind in _SHAPE_ONLY:
        return None if _union(inputs[1:]) else first
    if kind == "mul":
        return _product(first, inputs[1].powers)
    exponent = {"square": 2, "integer_pow": eqn.params.get("y")}.get(kind)
    return {label: n * exponent for label, n in first.items()} if exponent else None


def _product(a: Mapping[Label, int], b: Mapping[Label, int] | None) -> Mapping[Label, int] | None:
    return None if b is None else {label: a.get(label, 0) + b.get(label, 0) for label in {**a, **b}}


def _degree(kind: str, inputs: list[Origin]) -> int:
    degrees = [i.degree for i in inputs]
    top = max(degrees, default=0)
    if top == 0 or kind in _AFFINE or (kind in _BILINEAR and _affine(kind, degrees)):
        return top
    return 2


def _affine(kind: str, degrees: list[int]) -> bool:
    """Whether log-densities enter one operand only, in which the result is linear."""
    if kind == "select_n":
        return degrees[0] == 0
    return degrees[1] == 0 if kind == "div" else 0 in degrees
