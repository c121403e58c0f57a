"""What an architecture is held to: numbers of the right kind, in ranges that a host's memory survives."""

from __future__ import annotations

from typing import TypeGuard

from mer_r1_jax.foreign_text import printable


class ConfigError(ValueError):
    """An architecture that cannot exist; the message names the field, what it is and what it has to be."""


def require(condition: bool, field: str, got: object, expected: str) -> None:
    """Raises ConfigError with a field's name and value unless the condition holds."""
    if not condition:
        raise ConfigError(f"{field} is {printable(repr(got), 100)}: expected {expected}")


# Far beyond any model there is: a number above is a damaged or hostile file, and would exhaust the host's memory.
MOST_LAYERS = 1024
MOST_OF_A_SIZE = 1 << 24
MOST_OF_A_NUMBER = 1e18
_REAL = f"a number above 0 and up to {MOST_OF_A_NUMBER:g}"


def require_positive(config: object, *names: str) -> None:
    """Raises ConfigError unless each of these fields is an integer above 0 that a model can have."""
    for name in names:
        value = getattr(config, name)
        most = MOST_LAYERS if name in ("depth", "encoder_layers", "num_hidden_layers") else MOST_OF_A_SIZE
        require(
            is_int(value) and 0 < value <= most,
            f"{type(config).__name__}.{name}",
            value,
            f"an integer from 1 to {most}",
        )


def require_real(config: object, *names: str) -> None:
    """Raises ConfigError unless each of these fields is a finite number above 0."""
    for name in names:
        value = getattr(config, name)
        real = is_int(value) or isinstance(value, float)
        require(real and 0 < value <= MOST_OF_A_NUMBER, f"{type(config).__name__}.{name}", value, _REAL)


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def ints(config: object, name: str) -> tuple[int, ...]:
    """A field that holds several integers, as a tuple."""
    value = getattr(config, name)
    require(
        isinstance(value, (list, tuple)) and all(map(is_int, value)),
        f"{type(config).__name__}.{name}",
        value,
        "a list of integers",
    )
    return tuple(value)
