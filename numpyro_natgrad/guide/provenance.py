# Copyright Contributors to the numpyro_natgrad project.
# SPDX-License-Identifier: Apache-2.0
"""Which parameters, draws and log-densities a value of the loss depends on: one forward walk through its jaxpr.

Values are tagged (:func:`tag`) while the loss is traced. :func:`origins` propagates an :class:`Origin` from every tag
through every equation, which answers three questions:

* Is a distribution's argument a parameter itself, a product of parameters, or computed in another way?
* Does a parameter reach the loss by another path than the draws and the density of its site?
* Is the loss affine in the guide's log-densities? An ELBO is; a Rényi bound is not. With which factors?

``numpyro.ops.provenance.eval_provenance`` finds sources only; the first question needs exponents, the third a degree
and constants, and the number of particles the sizes of tagged values.
"""

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
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
# Equations after which every entry of a log-density has the same factor in the sum of all entries as before.
_ENTRYWISE = (_AFFINE | {"select_n", "mul", "div"}) - {"cumsum", "gather", "dynamic_slice", "pad"}
_BINARY: dict[str, Callable[[float, float], float]] = {
    "mul": operator.mul,
    "div": operator.truediv,
    "add": operator.add,
    "sub": operator.sub,
}
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
    :ivar constant: the number that all of its entries are, or ``None`` if that is not known while tracing.
    :ivar factors: of each log-density that enters it, the factor before every entry, or ``None`` if that is not known.
    :ivar gathered: it has some entries of that product, at indices that depend on no tag, and not all of them.
    """

    sources: frozenset[Label] = frozenset()
    powers: Mapping[Label, int] | None = None
    degree: int = 0
    constant: float | None = None
    factors: Mapping[Label, float | None] = {}
    gathered: bool = False

    @property
    def copy_of(self) -> Label | None:
        """The tag that it equals up to shape and dtype, or ``None``."""
        return None if self.gathered else self._single

    @property
    def rows_of(self) -> str | None:
        """The parameter of which it has some entries, or ``None``."""
        label = self._single if self.gathered else None
        return label.name if label and label.kind == LabelKind.PARAM else None

    @property
    def _single(self) -> Label | None:
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
        if self.powers is None or self.gathered or any(label.kind != LabelKind.PARAM for label in self.powers):
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
    outputs = _walk(closed.jaxpr, [Origin()] * len(closed.jaxpr.invars), tags, 1, closed.consts)
    return outputs[0], tags


def _walk(
    jaxpr: core.Jaxpr, inputs: Sequence[Origin], tags: Tags, repeats: int, consts: Sequence[Any] = ()
) -> list[Origin]:
    known = dict(zip(jaxpr.invars, inputs, strict=True))
    known.update({var: _of_constant(x) for var, x in zip(jaxpr.constvars, consts, strict=False)})

    def past(atom: Atom) -> Origin:
        return _of_constant(atom.val) if isinstance(atom, core.Literal) else known.get(atom, Origin())

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
    powers = _powers(eqn, inputs)
    merged = Origin(
        _union(inputs),
        powers,
        _degree(kind, inputs),
        _constant(kind, inputs),
        _factors(eqn, inputs),
        powers is not None and (kind == "gather" or any(i.gathered for i in inputs)),
    )
    return [merged] * len(eqn.outvars)


def _tagged(label: Label, past: Origin, out: core.Var, tags: Tags, repeats: int) -> Origin:
    before = tags[label].sizes if label in tags else {}
    tags[label] = TaggedValue(past, {**before, id(out): math.prod(_shape(out)) * repeats}, repeats > 1)
    if not label.kind.is_source:
        return past
    is_density = label.kind == LabelKind.DENSITY
    return Origin(frozenset([label]), {label: 1}, int(is_density), factors={label: 1.0} if is_density else {})


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
    same = lambda x, y: x if x == y else None
    degree = max(a.degree, b.degree)
    factors = {label: same(a.factors.get(label), b.factors.get(label)) for label in {**a.factors, **b.factors}}
    gathered = a.gathered or b.gathered
    powers, constant = same(a.powers, b.powers), same(a.constant, b.constant)
    return Origin(a.sources | b.sources, powers, degree, constant, factors, gathered)


def _of_constant(x: Any) -> Origin:
    """The origin of a number that is known while tracing."""
    if isinstance(x, jax.core.Tracer) or jnp.size(x) != 1:
        return Origin()
    dtype = jnp.result_type(x)
    real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    return Origin(constant=np.asarray(x).item()) if real else Origin()


def _constant(kind: str, inputs: list[Origin]) -> float | None:
    values = [i.constant for i in inputs]
    if not values or values[0] is None or any(i.sources for i in inputs):
        return None
    if kind in _SHAPE_ONLY:
        return values[0]
    if kind == "neg":
        return -values[0]
    if kind in _BINARY and values[1] is not None and (kind != "div" or values[1]):
        return _BINARY[kind](values[0], values[1])
    return None


def _factors(eqn: core.JaxprEqn, inputs: list[Origin]) -> dict[Label, float | None]:
    """Factors before the entries of log-densities, through sums and products with known numbers."""
    kind, each = eqn.primitive.name, [i.factors for i in inputs]
    labels = {label for factors in each for label in factors}
    if not labels:
        return {}
    scale = [1.0] * len(inputs)
    if kind in ("mul", "div"):
        constants = [i.constant for i in inputs]
        by = constants[1] if each[0] else constants[0] if kind == "mul" else None
        if by is None or (each[0] and each[1]) or (kind == "div" and not by):
            return dict.fromkeys(labels)
        scale = [by if kind == "mul" else 1 / by] * 2
    elif kind in ("neg", "sub"):
        scale[-1] = -1.0
    elif kind not in _ENTRYWISE or (kind == "broadcast_in_dim" and _size(eqn.outvars[0]) != _size(eqn.invars[0])):
        return dict.fromkeys(labels)
    terms = {label: [(f[label], s) for f, s in zip(each, scale, strict=True) if label in f] for label in labels}
    return {label: _combined(kind, some) for label, some in terms.items()}


def _combined(kind: str, terms: list[tuple[float | None, float]]) -> float | None:
    """One factor from those of the operands: their sum in a sum, and elsewhere the one that all have."""
    scaled = [None if factor is None else factor * scale for factor, scale in terms]
    known = [x for x in scaled if x is not None]
    if len(known) < len(scaled):
        return None
    if kind in ("add", "add_any", "sub"):
        return sum(known)
    return known[0] if len(set(known)) == 1 else None


def _size(atom: Atom) -> int:
    return math.prod(_shape(atom))


def _powers(eqn: core.JaxprEqn, inputs: list[Origin]) -> Mapping[Label, int] | None:
    kind, first = eqn.primitive.name, inputs[0].powers if inputs else None
    if first is None:
        return None
    if kind in _SHAPE_ONLY or kind == "gather":
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
