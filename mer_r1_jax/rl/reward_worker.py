"""The program that reward functions run in: `python -m mer_r1_jax.rl.reward_worker`.

The first job imports the functions, every other one calls one of them. Whatever a function does wrong becomes an
answer: an error of the whole call, or a fault of a single value. Nothing here is ever turned into a reward.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import math
import numbers
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

from mer_r1_jax.foreign_text import printable
from mer_r1_jax.process_pool import serve

SHOWN = 80  # characters of a faulty value that are quoted
MESSAGE = 500  # of an error's own words


class NotAFunctionError(Exception):
    """A dotted path that leads to nothing that can be called as a reward function."""


def main() -> None:
    """Serves jobs until the parent closes the pipe."""
    functions: list[Callable[..., Any]] = []

    def answer(job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        if "import" not in job:
            return call(functions[job["function"]], job["arguments"], job["count"]), b""
        # What the parent can import, this process can; the working folder comes first, as in `python -m`.
        sys.path += [path for path in (os.getcwd(), *job["path"]) if path not in sys.path]
        found, errors = [], []
        for path in job["import"]:
            try:
                functions.append(load(path))
                found.append(signature(functions[-1]))
            except NotAFunctionError as error:
                errors.append(f"{path}: {error}")
        return {"functions": found, "errors": errors}, b""

    serve(answer)


def load(path: str) -> Callable[..., Any]:
    """The function at a dotted path.

    Raises:
        NotAFunctionError: it cannot be imported, or is no function.
    """
    module, _, name = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise NotAFunctionError("expected a dotted path, package.module.function")
    try:
        function = getattr(importlib.import_module(module), name, None)
    except BaseException as error:  # the user's code runs: anything may come out of it, SystemExit too
        raise NotAFunctionError(f"the module {module} cannot be imported: {_named(error)}") from error
    if function is None:
        raise NotAFunctionError(f"the module {module} has no {name}")
    if not callable(function) or inspect.isclass(function):
        raise NotAFunctionError(f"it is a {type(function).__name__}, expected a function")
    return function


def signature(function: Callable[..., Any]) -> dict[str, Any]:
    """What a function can be called with: {"takes": names, or None for any, "needs": names without a default}.

    Raises:
        NotAFunctionError: an argument that cannot be given by name.
    """
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # builtins have none; they are asked with everything
        return {"takes": None, "needs": []}
    required = [p for p in parameters if p.default is p.empty]
    if nameless := [p.name for p in required if p.kind is p.POSITIONAL_ONLY]:
        raise NotAFunctionError(f"its argument {nameless[0]} cannot be given by name, as all arguments are")
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    return {"takes": None if takes_any else [p.name for p in named], "needs": [p.name for p in named if p in required]}


def call(function: Callable[..., Any], arguments: dict[str, Any], expected: int) -> dict[str, Any]:
    """Calls a function about `expected` completions.

    Returns:
        {"values": per completion a number, None where unscored, or {"fault": what it is instead}}, or {"error": why
        nothing of the result can be used}.
    """
    try:
        result = function(**arguments)
        if inspect.isawaitable(result):
            result = asyncio.run(_awaited(result))
    except BaseException as error:  # a user's function: anything may come out of it, SystemExit too
        return {"error": f"it raised {_named(error)}"}
    try:
        is_array = hasattr(result, "tolist") and getattr(result, "ndim", 1) > 0  # an array or a tensor
        if not is_array and (not isinstance(result, Sequence) or isinstance(result, str | bytes)):
            return {"error": f"it returned a {type(result).__name__}, expected a list of {expected} numbers or None"}
        if len(result) != expected:
            return {"error": f"it returned {len(result)} values for {expected} completions"}
        return {"values": [_value(entry) for entry, _ in zip(result, range(expected), strict=True)]}
    except BaseException as error:  # the result's own methods
        return {"error": f"it returned a {type(result).__name__} that cannot be read: {_named(error)}"}


async def _awaited(result: Any) -> Any:
    return await result


def _value(entry: Any) -> float | None | dict[str, str]:
    """One completion's reward, or what is wrong with it; the entry's own methods may raise anything."""
    try:
        return _checked(entry)
    except BaseException as error:
        return {"fault": f"it returned a {type(entry).__name__} that is no number of float's: {_named(error)}"}


def _checked(value: Any) -> float | None | dict[str, str]:
    if value is None:
        return None
    if getattr(value, "ndim", None) == 0:
        value = value.item()  # one number as an array or a tensor
    if not isinstance(value, numbers.Real):
        return {
            "fault": f"it returned {printable(repr(value), SHOWN)} ({type(value).__name__}), expected a number or None"
        }
    if not math.isfinite(value):
        return {"fault": f"it returned {float(value)}, expected a finite number, or None for unscored"}
    return float(value)


def _named(error: BaseException) -> str:
    """Class, message and the place where the user's code raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    # The user's own line, not this file's or the importer's.
    frames = [frame for frame in frames if frame.filename != __file__ and "importlib" not in frame.filename]
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    try:
        said = printable(error, MESSAGE)
    except BaseException:  # an error whose text raises
        said = "without a text"
    return printable(f"{type(error).__name__}: {said}{place}")


if __name__ == "__main__":
    main()
