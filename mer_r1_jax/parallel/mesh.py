"""The device mesh: axes `data`, `fsdp` and `tensor`, one of which may be inferred, and `decode_tensor` if asked for."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from mer_r1_jax.config.schema import ConfigError, MeshConfig
from mer_r1_jax.parallel.rules import TRAIN_RULES, Rules, on

AXES = ("data", "fsdp", "decode_tensor", "tensor")


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Lays the devices out as data x fsdp x decode_tensor x tensor, with Auto axes (the compiler propagates shardings).

    A `decode_tensor` of one is left out, so that such a mesh, and every program on it, has three axes.

    Args:
        config: sizes of the axes, at most one of them -1.
        devices: of type jax.Device, which type checkers know nothing about; None for all there are.

    Raises:
        ConfigError: when the sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if len({device.process_index for device in devices}) > 1:
        # On some TPU slices ids run across hosts; rows of a batch lie together in the process that loads them.
        devices.sort(key=lambda device: (device.process_index, device.id))
    sizes = mesh_sizes(config, len(devices))
    if sizes is None:
        wanted = ", ".join(f"mesh.{axis}={getattr(config, axis)}" for axis in AXES)
        raise ConfigError(
            f"{wanted} cannot be laid out over {len(devices)} devices: the sizes must multiply to that number "
            "(leave data, fsdp or tensor at -1 and it is inferred)"
        )
    laid_out = {axis: size for axis, size in zip(AXES, sizes, strict=True) if axis != "decode_tensor" or size > 1}
    return Mesh(
        np.asarray(devices).reshape(*laid_out.values()), tuple(laid_out), axis_types=(AxisType.Auto,) * len(laid_out)
    )


def mesh_sizes(config: MeshConfig, devices: int) -> tuple[int, ...] | None:
    """Devices along each axis, the inferred one filled in; None when so many devices cannot be laid out like that."""
    sizes = [getattr(config, axis) for axis in AXES]
    known = math.prod(size for size in sizes if size != -1)
    if -1 in sizes:
        sizes[sizes.index(-1)] = devices // known
    return tuple(sizes) if math.prod(sizes) == devices else None


def for_devices(config: MeshConfig, devices: int) -> MeshConfig:
    """The layout of a model that nobody trains, which may have been laid out for another number of devices.

    Where so many cannot be laid out like that, but can without `decode_tensor`, it goes without.
    """
    plain = dataclasses.replace(config, decode_tensor=1)
    return plain if mesh_sizes(config, devices) is None and mesh_sizes(plain, devices) is not None else config


def row_cut(mesh: Mesh, rules: Rules = TRAIN_RULES) -> int:
    """How many parts the rows of a batch are cut into; every batch must have a multiple of it in training."""
    return math.prod(mesh.shape[axis] for axis in on(mesh, rules)["batch"])
