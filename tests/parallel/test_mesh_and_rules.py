"""Where arrays live: the mesh, the table of logical axes, and the rows of a batch."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mer_r1_jax.config.schema import ConfigError, MeshConfig
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.thinker import abstract_thinker
from mer_r1_jax.parallel.mesh import AXES, make_mesh, mesh_sizes, row_cut
from mer_r1_jax.parallel.rows import moved, put, row_axis, row_shardings
from mer_r1_jax.parallel.rules import (
    DECODE_RULES,
    TRAIN_RULES,
    ShardingError,
    halfway,
    on,
    param_shardings,
    replicated,
    rows,
    spec,
)


@dataclasses.dataclass(frozen=True)
class Name:
    """The last part of a key path, as jax gives it."""

    name: str


@pytest.mark.parametrize(
    ("sizes", "devices", "expected"),
    [
        ((-1, 1, 1, 1), 8, (8, 1, 1, 1)),
        ((2, -1, 1, 2), 8, (2, 2, 1, 2)),
        ((1, -1, 2, 2), 8, (1, 2, 2, 2)),
        ((1, 1, 1, 1), 1, (1, 1, 1, 1)),
        ((2, 2, 1, 2), 4, None),
        ((2, 2, 2, 1), 4, None),
        ((3, -1, 1, 1), 8, None),
        ((-1, 16, 1, 1), 8, None),
    ],
)
def test_one_axis_of_the_mesh_is_inferred(sizes, devices, expected):
    config = MeshConfig(**dict(zip(AXES, sizes, strict=True)))
    assert mesh_sizes(config, devices) == expected


def test_mesh_that_does_not_fit_the_devices_is_refused_with_its_numbers():
    wanted = "mesh.data=3, mesh.fsdp=1, mesh.decode_tensor=1, mesh.tensor=2"
    with pytest.raises(ConfigError, match=wanted + " cannot be laid out over 8 devices"):
        make_mesh(MeshConfig(data=3, tensor=2))


def test_rows_are_cut_over_both_data_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert row_cut(mesh) == 4
    assert rows(mesh).spec == PartitionSpec(("data", "fsdp"))
    assert rows(mesh, axis=1).spec == PartitionSpec(None, ("data", "fsdp"))


def test_decode_tensor_is_fsdp_in_training_and_tensor_in_decoding():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, decode_tensor=2, tensor=2))
    assert mesh.axis_names == AXES and (row_cut(mesh), row_cut(mesh, DECODE_RULES)) == (4, 2)
    assert rows(mesh).spec == PartitionSpec(("data", "fsdp", "decode_tensor"))
    axes = {"q": ("embed", "heads", "head_dim"), "up": ("embed", "mlp")}
    shapes = {name: jax.ShapeDtypeStruct((64,) * len(names), "float32") for name, names in axes.items()}
    trained, decoded = (param_shardings(shapes, axes, mesh, rules) for rules in (TRAIN_RULES, DECODE_RULES))
    cut, heads = ("fsdp", "decode_tensor"), ("tensor", "decode_tensor")
    assert (trained["q"].spec, trained["up"].spec) == (PartitionSpec(cut, "tensor", None), PartitionSpec(cut, "tensor"))
    assert decoded["q"].spec == PartitionSpec(None, heads, None)
    assert decoded["up"].spec == PartitionSpec(None, ("tensor", "fsdp", "decode_tensor"))


def test_rows_are_moved_without_waiting_for_them():
    mesh = make_mesh(MeshConfig(data=1, fsdp=4, decode_tensor=2))

    @functools.partial(jax.jit, out_shardings=rows(mesh))
    def slow(x_BD):
        return jax.lax.fori_loop(0, 2000, lambda _, y_BD: jnp.sin(y_BD), x_BD)

    x_BD = np.ones((64, 20_000), np.float32)
    moved({"x_BD": jax.block_until_ready(slow(x_BD))}, mesh, DECODE_RULES)  # compiles what follows
    batch = {"x_BD": slow(x_BD), "beta": jax.device_put(np.float32(2), replicated(mesh)), "none": None}
    there = moved(batch, mesh, DECODE_RULES)
    assert not batch["x_BD"].is_ready()  # is being computed still
    assert there["x_BD"].sharding.is_equivalent_to(rows(mesh, DECODE_RULES), 2)
    assert there["beta"] is batch["beta"] and there["none"] is None
    np.testing.assert_array_equal(there["x_BD"], batch["x_BD"])
    assert moved(there, mesh, DECODE_RULES)["x_BD"] is there["x_BD"]


def test_a_weight_goes_to_decoding_by_way_of_a_place_where_heads_are_cut_and_its_width_still_is():
    mesh = make_mesh(MeshConfig(data=1, fsdp=2, decode_tensor=2, tensor=2))
    axes = {"q": ("embed", "heads", "head_dim"), "up": ("embed", "mlp"), "table": ("vocab", "embed")}
    shapes = {name: jax.ShapeDtypeStruct((64,) * len(names), "float32") for name, names in axes.items()}
    trained, decoded = (param_shardings(shapes, axes, mesh, rules) for rules in (TRAIN_RULES, DECODE_RULES))
    between = {name: halfway(trained[name], decoded[name]).spec for name in axes}
    heads = ("tensor", "decode_tensor")
    assert between["q"] == PartitionSpec("fsdp", heads, None)
    assert between["table"] == PartitionSpec(heads, "fsdp")
    assert between["up"] == decoded["up"].spec  # cut over all: nothing is brought together


def test_a_mesh_without_it_has_three_axes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    for rules in (TRAIN_RULES, DECODE_RULES):
        assert {axis for axes in on(mesh, rules).values() for axis in axes} == {"data", "fsdp", "tensor"}


def test_a_mesh_axis_cuts_an_array_once():
    # An activation's width stays whole, because its batch already uses fsdp; a parameter's axes must not collide.
    batch, width = ("data", "fsdp", "decode_tensor"), ("fsdp", "decode_tensor")
    assert spec(("batch", "length", "embed"), activation=True) == PartitionSpec(batch, None, None)
    assert spec(("layers", "embed", "mlp")) == PartitionSpec(None, width, "tensor")
    with pytest.raises(ShardingError, match="tensor on two dimensions of one array; change the rule of 'vocab'"):
        spec(("mlp", "vocab"))


def test_every_parameter_that_cannot_be_cut_is_listed():
    config = ThinkerConfig.tiny()
    _, shapes, axes = abstract_thinker(config)
    mesh = make_mesh(MeshConfig(data=1, fsdp=1, tensor=8))
    heads = config.text.num_key_value_heads
    assert heads % 8
    with pytest.raises(ShardingError) as caught:
        param_shardings(shapes, axes, mesh)
    message = str(caught.value)
    assert "choose smaller mesh.tensor, mesh.decode_tensor or mesh.fsdp" in message
    assert f"text/layers/attn/k/kernel: dimension 'kv_heads' of size {heads} is not a multiple of 8" in message
    assert "text/layers/attn/v/bias" in message


def test_released_sizes_can_be_cut_eight_ways_by_fsdp():
    for config in (ThinkerConfig.qwen2_5_omni_3b(), ThinkerConfig.qwen2_5_omni_7b()):
        _, shapes, axes = abstract_thinker(config)
        shardings = param_shardings(shapes, axes, make_mesh(MeshConfig(data=1, fsdp=8)))
        assert shardings["text"]["layers"]["mlp"]["up"]["kernel"].spec == PartitionSpec(None, "fsdp", "tensor")


def test_row_axis_is_the_letter_b_of_a_name():
    assert row_axis((Name("batch"), Name("position_3BT"))) == 1
    assert row_axis((Name("id_BGC"),)) == 0
    assert row_axis((Name("ids_ZY"),)) is None
    assert row_axis((Name("uid_B"),)) == 0
    assert row_axis((Name("beta"),)) is None


def test_rows_land_on_the_devices_that_own_them():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    batch = {"id_BT": np.arange(24, dtype=np.int32).reshape(8, 3), "beta": np.float32(2)}
    placed = put(batch, mesh)
    assert placed["id_BT"].sharding.is_equivalent_to(row_shardings(batch, mesh)["id_BT"], 2)
    for shard in placed["id_BT"].addressable_shards:
        assert shard.data.shape == (2, 3)
        np.testing.assert_array_equal(shard.data, batch["id_BT"][shard.index])
    assert {shard.data.shape for shard in placed["beta"].addressable_shards} == {()}
    assert len(placed["beta"].addressable_shards) == jax.device_count()


def test_rules_name_only_axes_of_the_mesh():
    assert {axis for axes in TRAIN_RULES.values() for axis in axes} == set(AXES)
