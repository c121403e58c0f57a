"""The processes of one run: how they find each other, what they tell each other on the host, how they go down together.

Arrays travel through XLA; what is said here (a bucket, a broken clip, "stop") goes through the key-value store of jax's
coordination service, which needs no device, has a time limit on every call, and is there before a backend is.

A run of one process goes through the same calls, and none of them does anything.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import jax

# jax has no public name for the client of its coordination service; Orbax takes it from here too.
from jax._src import distributed

from mer_r1_jax import screen
from mer_r1_jax.parallel.watch import Watch

# For clusters that jax does not know by itself: all three, or none.
SETTINGS = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
EXIT_PEER_LOST = 76  # another process of the run ended; the same command, started on all of them, goes on
WAIT_SECONDS = 1800.0  # for a process that is alive and busy: it decodes, compiles, writes a report
START_SECONDS = 300  # for the others to start
HEARTBEAT_SECONDS = 45  # after which jax itself ends a process that hears nothing of the others
SHUTDOWN_SECONDS = 30

_numbers: dict[str, itertools.count] = {}  # how often each kind of call was made, the same on every process


class ProcessError(RuntimeError):
    """The processes of a run cannot find each other, or one of them did not come where the others wait."""


def index() -> int:
    """Number of this process, from 0."""
    return distributed.global_state.process_id if jax.distributed.is_initialized() else 0


def count() -> int:
    """Processes of the run. Touches no backend."""
    return distributed.global_state.num_processes if jax.distributed.is_initialized() else 1


def is_first() -> bool:
    """Whether this is the process that writes what is written once."""
    return index() == 0


def start() -> bool:
    """Joins the processes of the run; to be called before anything touches a device.

    On Cloud TPU jax finds everything by itself. Elsewhere the environment says it: JAX_COORDINATOR_ADDRESS (host:port
    of process 0), JAX_NUM_PROCESSES and JAX_PROCESS_ID. Otherwise there is one process, and nothing happens.

    Returns:
        Whether the run has several processes.

    Raises:
        ProcessError: settings that cannot be used, or processes that did not come.
    """
    named = _settings()
    # jax puts "tpu" first when it is imported on a TPU host with nothing said about platforms.
    on_tpu = (jax.config.values["jax_platforms"] or "").split(",")[0] == "tpu"
    if jax.distributed.is_initialized() or not (named or on_tpu):
        return count() > 1
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    # Its handler of SIGTERM would stand beside ours, which agrees on a step by itself (see `Stop.agreed`).
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            **named,
            initialization_timeout=START_SECONDS,
            heartbeat_timeout_seconds=HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=SHUTDOWN_SECONDS,
        )
    except ValueError as error:
        if named:
            raise ProcessError(f"the processes of this run cannot be joined: {error}") from error
        return False  # a TPU host that belongs to no slice
    except OSError as error:  # the metadata server does not answer
        raise ProcessError(
            f"this is a TPU host, but which slice it belongs to cannot be found out: {_first_line(error)}; set "
            f"{', '.join(SETTINGS)}, or TPU_SKIP_MDS_QUERY=1 where it stands alone"
        ) from error
    except RuntimeError as error:
        raise ProcessError(
            f"the processes of this run did not find each other within {START_SECONDS} s: {_first_line(error)}; start "
            "the same command on every host, and see that the coordinator's port can be reached from all of them"
        ) from error
    return count() > 1


def _settings() -> dict[str, Any]:
    given = {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}
    if not given:
        return {}
    address, *numbers = (given.get(name, "") for name in SETTINGS)
    whole = [number.isdecimal() for number in numbers]
    if len(given) < len(SETTINGS) or ":" not in address or not all(whole) or not 0 <= int(numbers[1]) < int(numbers[0]):
        got = ", ".join(f"{name}={given.get(name, '(not set)')}" for name in SETTINGS)
        raise ProcessError(
            f"got {got}; expected host:port of process 0, the number of processes, and this one's number from 0; set "
            "all three, or none of them (one process, or Cloud TPU)"
        )
    return {
        "coordinator_address": address,
        "num_processes": int(numbers[0]),
        "process_id": int(numbers[1]),
        "cluster_detection_method": "deactivate",
    }


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Everything a command does as one of several processes: they start together, and they end together.

    A process that leaves by an error tells the others why, and they end with EXIT_PEER_LOST; so they do within a minute
    when one is gone without a word.
    """
    if not start():
        yield
        return
    watch = Watch(_client(), index(), count(), EXIT_PEER_LOST)
    watch.start()
    try:
        yield
    except SystemExit as leaving:
        if not leaving.code:
            _end_together(watch)
            raise
        _await_loss(watch, leaving)
        _leave(watch, int(leaving.code), leaving.__cause__ or leaving)
    except BaseException as error:
        _await_loss(watch, error)
        screen.say(traceback.format_exc().rstrip(), error=True)
        _leave(watch, 1, error)
    _end_together(watch)


def _await_loss(watch: Watch, error: BaseException | None) -> None:
    """Where a collective broke, the watch soon knows which process is gone, and ends this one with that reason."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return watch.wait_for_loss()
        error = error.__cause__ or error.__context__


def _end_together(watch: Watch) -> None:
    barrier("the end of the run")
    watch.stop()
    jax.distributed.shutdown()


def _leave(watch: Watch, code: int, error: BaseException) -> NoReturn:
    """Ends this process alone. Python's own way out would wait for the others in jax's shutdown."""
    watch.tell(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def exchange(what: str, value: Any) -> list[Any]:
    """The value of every process, in their order, on every process; all of them must call it.

    Args:
        what: what it is about, for the message when a process does not come.
        value: anything that can be pickled.

    Raises:
        ProcessError: a process that is alive did not come in time.
    """
    if count() == 1:
        return [value]
    client, folder, number = _client(), *_next("exchange")
    key = f"{folder}/{number}"
    client.key_value_set_bytes(f"{key}/{index()}", pickle.dumps(value))
    if is_first():
        values = [_read(what, f"{key}/{process}") for process in range(count())]
        for process in range(count()):
            client.key_value_delete(f"{key}/{process}")
        # Who has begun this exchange has read the one before.
        client.key_value_delete(f"{folder}/{number - 1}/all")
        client.key_value_set_bytes(f"{key}/all", pickle.dumps(values))
    return [pickle.loads(value) for value in pickle.loads(_read(what, f"{key}/all"))]


def gather(what: str, value: Any) -> list[Any] | None:
    """The value of every process, in their order, on the first process; None on the others, which do not wait."""
    if count() == 1:
        return [value]
    client, folder, number = _client(), *_next("gather")
    key = f"{folder}/{number}"
    if not is_first():
        client.key_value_set_bytes(f"{key}/{index()}", pickle.dumps(value))
        return None
    values = [value]
    for process in range(1, count()):
        values.append(pickle.loads(_read(what, f"{key}/{process}")))
        client.key_value_delete(f"{key}/{process}")
    return values


def from_first(what: str, make: Callable[[], Any]) -> Any:
    """What `make` gives on the first process, on every process."""
    return exchange(what, make() if is_first() else None)[0]


def announce(what: str) -> None:
    """Tells the other processes something that they may look up at any time, and that holds until the end."""
    if count() > 1:
        _client().key_value_set(f"mer_r1_jax/announced/{what}/{index()}", "", True)


def is_announced(what: str) -> bool:
    """Whether any process has announced it. Does not wait; another process may hear of it earlier or later."""
    return count() > 1 and bool(_client().key_value_dir_get(f"mer_r1_jax/announced/{what}"))


def barrier(what: str) -> None:
    """Waits until every process has come here.

    Raises:
        ProcessError: one did not come in time.
    """
    if count() > 1:
        folder, number = _next(what)
        try:
            _client().wait_at_barrier(f"{folder}/{number}", int(1e3 * WAIT_SECONDS))
        except jax.errors.JaxRuntimeError as error:
            raise ProcessError(_late(what, error)) from error


@contextlib.contextmanager
def one_after_first(what: str) -> Iterator[None]:
    """Lets the first process through alone, and the others when it is done: they find made what it made."""
    if not is_first():
        barrier(what)
    yield
    if is_first():
        barrier(what)


def _client() -> Any:
    return distributed.global_state.client


def _next(kind: str) -> tuple[str, int]:
    return f"mer_r1_jax/{kind}", next(_numbers.setdefault(kind, itertools.count()))


def _read(what: str, key: str) -> bytes:
    try:
        return _client().blocking_key_value_get_bytes(key, int(1e3 * WAIT_SECONDS))
    except jax.errors.JaxRuntimeError as error:
        raise ProcessError(_late(what, error)) from error


def _late(what: str, error: Exception) -> str:
    return (
        f"process {index()} of {count()} waited at {what!r} and not every process came within {WAIT_SECONDS:g} s "
        f"({_first_line(error)}); look at the logs of the others"
    )


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
