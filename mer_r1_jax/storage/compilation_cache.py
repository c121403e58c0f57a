"""The folder where jax keeps compiled programs, so that the next start of a command loads what this one compiled.

jax's own cache does the work: a program is found again by what it computes, the compiler's version and flags, and the
kind of device, and one that took less than a second to compile is not kept. A start costs 100 s of compiling at 3B.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from mer_r1_jax.config.schema import ConfigError
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.parallel import processes

DEFAULT_DIR = "~/.cache/mer-r1-jax/compiled"
OFF = "none"
_CPU_INFO = Path("/proc/cpuinfo")
_CPU_LINES = ("model name", "flags", "Features")

log = logging.getLogger(__name__)
_ours: list[str | None] = [None]  # what `use` told jax last; anything else there is the user's


def use(setting: str, devices: Sequence[Any]) -> Path | None:
    """Has jax keep compiled programs, and find those of earlier processes.

    A folder or switch that the user gave jax itself (JAX_COMPILATION_CACHE_DIR, JAX_ENABLE_COMPILATION_CACHE=false, or
    `jax.config`) comes before the default one.

    Args:
        setting: `train.compilation_cache_dir`.
        devices: of the mesh. Programs for devices that are not here are never run, and jax cannot load them.

    Returns:
        The folder; None where nothing is kept, or where the user said so to jax.

    Raises:
        ConfigError: a folder of the user's that cannot be written to.
    """
    users_own = jax.config.values["jax_compilation_cache_dir"] != _ours[0]
    here = set(devices) <= set(jax.devices())
    if setting == OFF or not here:
        if setting == OFF or not users_own:
            _tell(None)
        return None
    if not setting and users_own:
        return None
    if not setting and processes.count() > 1:
        # jax has the first process alone write: in the homes of the others nothing would ever be found.
        log.warning(
            "compiled programs are not kept, as only the first of %d processes writes them; name a folder that all "
            "hosts share in train.compilation_cache_dir",
            processes.count(),
        )
        _tell(None)
        return None
    try:
        folder = Path(setting or DEFAULT_DIR).expanduser().absolute() / _kind(devices)
        # Who can write there can have this user run any code.
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK | os.X_OK):
            raise PermissionError("it may not be written to")
    except (OSError, RuntimeError) as error:  # the latter: a user without a home
        where, why = printable(setting or DEFAULT_DIR), getattr(error, "strerror", None) or error
        if setting:
            raise ConfigError(
                f"train.compilation_cache_dir: got {where}, where nothing can be kept ({why}); expected a folder this "
                f"user can write to; name another, or {OFF} to keep no compiled programs"
            ) from error
        log.warning("compiled programs are not kept: %s: %s; train.compilation_cache_dir names a folder", where, why)
        _tell(None)
        return None
    _tell(str(folder))
    return folder


def _tell(folder: str | None) -> None:
    if folder != jax.config.values["jax_compilation_cache_dir"]:
        jax_cache.set_cache_dir(folder)
        jax_cache.reset_cache()  # it opens its folder once
    _ours[0] = folder


def _kind(devices: Sequence[Any]) -> str:
    """A folder for each kind of device.

    A home may be shared by machines with other processors, and a program made for one of them would end another with an
    illegal instruction: jax's key does not say which instructions a CPU has.
    """
    name = devices[0].platform
    if name != "cpu":
        return name
    lines = _CPU_INFO.read_text(errors="replace").splitlines() if _CPU_INFO.is_file() else [platform.processor()]
    told = {line for line in lines if line.startswith(_CPU_LINES)} or set(lines)
    return f"cpu-{hashlib.sha256(chr(10).join([platform.machine(), *sorted(told)]).encode()).hexdigest()[:12]}"
