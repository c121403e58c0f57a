"""Traced programs written out in full, so that two can be compared."""

import re

from jax.extend.core import Literal


def program(function, args):
    """A traced program written out in full.

    jax's own text names a part that is used twice once, or twice, as its caches would have it.
    """
    return listing(function.trace(*args).jaxpr)


def listing(jaxpr):
    """Every equation: primitive, operands numbered in their order, parameters, parts written out."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    numbers = {}

    def name(atom):
        if isinstance(atom, Literal):
            return f"{atom.val}:{atom.aval}"
        return f"v{numbers.setdefault(atom, len(numbers))}:{atom.aval}"

    lines = [" ".join(map(name, (*jaxpr.constvars, *jaxpr.invars)))]
    for equation in jaxpr.eqns:
        operands = [name(atom) for atom in equation.invars]
        parameters = dict(equation.params)
        if equation.primitive.name != "sharding_constraint":
            parameters.pop("sharding", None)  # of a new array: its mesh, whose axes are all Auto, or none
        parameters = [f"{key}={written(value)}" for key, value in sorted(parameters.items())]
        results = [name(atom) for atom in equation.outvars]
        lines.append(f"{equation.primitive.name} {operands} {parameters} -> {results}")
    return "\n".join([*lines, " ".join(map(name, jaxpr.outvars))])


def written(value):
    """A parameter as text, without the addresses of Python objects."""
    if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
        return "{" + listing(value) + "}"
    if isinstance(value, (tuple, list)):
        return str([written(one) for one in value])
    return re.sub(r"0x[0-9a-f]+", "", str(value))
