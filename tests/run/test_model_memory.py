"""What a model takes is known from its headers, said before it is loaded, and refused where there is less memory."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mer_r1_jax.config.schema import ModelConfig
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.tensor_files import StoredTensor
from mer_r1_jax.omni.thinker import abstract_thinker
from mer_r1_jax.parity.port import run_port
from mer_r1_jax.parity.self_checks import probe_inputs
from mer_r1_jax.run import model_memory, policy
from mer_r1_jax.run.model_memory import (
    MemoryNeed,
    ModelMemoryError,
    check_memory,
    free_bytes,
    free_on_host,
    kept_dtype,
    need_of_files,
    thinker_tensors,
)

GB = 10**9
MEBIBYTE = 2**20


def write_weights(folder, shapes, dtype="BF16"):
    """A safetensors file with these tensors and holes in place of their numbers."""
    folder.mkdir(exist_ok=True)
    header, end = {}, 0
    for name, shape in shapes.items():
        size = int(np.prod(shape, dtype=np.int64)) * {"BF16": 2, "F32": 4, "F16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    encoded = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + end)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def huge(tmp_path):
    """100 GB of bfloat16 that take a page of the disk: 40 billion parameters of the language model, 10 of a tower."""
    text = {f"thinker.model.layers.{n}.mlp.up_proj.weight": [20_000, 1_000_000] for n in range(2)}
    tower = {"thinker.visual.merger.mlp.0.weight": [10_000, 1_000_000], "talker.codec_head.weight": [1000, 1_000_000]}
    folder = write_weights(tmp_path / "huge", text | tower)
    assert (folder / "model.safetensors").stat().st_blocks * 512 < MEBIBYTE
    return folder


BFLOAT16, MIXED = (ModelConfig(param_dtype=dtype, compute_dtype="bfloat16") for dtype in ("bfloat16", "float32"))


def test_what_files_take_follows_from_their_headers(huge):
    tensors = thinker_tensors(huge)
    assert sorted(tensors) == [
        *(f"model.layers.{n}.mlp.up_proj.weight" for n in range(2)), "visual.merger.mlp.0.weight"
    ]  # the talker is not loaded  # fmt: skip
    need = need_of_files(tensors, BFLOAT16)
    assert (need.parameters, need.weights, need.decoding) == (50 * GB, 100 * GB, 0)
    assert need.tensor == 80 * GB and need.total == 180 * GB  # 40 GB as read, 40 as kept
    # Kept in float32, decoding wants the language model once more, in the dtype it computes in.
    need = need_of_files(tensors, MIXED)
    assert (need.weights, need.decoding, need.tensor) == (200 * GB, 80 * GB, 120 * GB) and need.total == 320 * GB


@pytest.mark.parametrize(
    ("stored", "param", "compute", "kept"),
    [
        (["BF16", "BF16"], "float32", "bfloat16", "bfloat16"),
        (["BF16", "F32"], "float32", "bfloat16", "float32"),
        (["F16"], "float32", "bfloat16", "float32"),
        (["BF16"], "float32", "float32", "float32"),
        (["F32"], "bfloat16", "bfloat16", "bfloat16"),
        ([], "float32", "bfloat16", "float32"),
    ],
)
def test_a_model_is_kept_as_its_files_have_it(stored, param, compute, kept):
    tensors = [StoredTensor(str(n), dtype, (1,), 2, None, 0) for n, dtype in enumerate(stored)]
    assert kept_dtype(tensors, ModelConfig(param_dtype=param, compute_dtype=compute)) == kept


def test_weights_kept_in_bfloat16_give_the_numbers_of_the_same_weights_in_float32():
    """Towers, decoder and head, with the norms' and biases' own rounding."""
    preset = ThinkerConfig.tiny()
    parts = {"text": {"num_hidden_layers": 1}, "audio": {"encoder_layers": 1}}
    parts["vision"] = {"depth": 1, "fullatt_block_indexes": (0,)}
    small = {name: dataclasses.replace(getattr(preset, name), **fields) for name, fields in parts.items()}
    config = dataclasses.replace(preset, **small, compute_dtype="bfloat16")
    rng = np.random.default_rng(0)
    stored = jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape, np.float32)).astype(jnp.bfloat16),
        abstract_thinker(config)[1],
    )
    inputs = probe_inputs(config)
    kept, wide = (
        run_port(
            jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), stored),
            dataclasses.replace(config, param_dtype=dtype),
            inputs,
        )
        for dtype in ("bfloat16", "float32")
    )
    assert {"logits", "audio_features", "video_features"} <= set(kept)
    for name, numbers in wide.items():
        np.testing.assert_array_equal(kept[name], numbers, err_msg=name)
    assert np.ptp(kept["logits"]) > 1  # or nothing would have been compared


def test_a_model_that_does_not_fit_is_refused_before_anything_is_loaded(huge, monkeypatch):
    monkeypatch.setattr(policy, "make_setup", lambda *_, **__: pytest.fail("it was going to be loaded"))
    monkeypatch.setattr(model_memory, "free_on_host", lambda: 62 * GB)
    with pytest.raises(ModelMemoryError) as refused:
        policy.open_model(huge, devices=jax.devices()[:1])
    said = str(refused.value)
    assert f"{huge}: got a model that takes at least 180 GB of memory" in said and "50 billion parameters" in said
    assert "as bfloat16: 100 GB" in said and "expected no more than the 62 GB that are free" in said
    assert "--set=eval.memory_check=warn" in said


@pytest.mark.parametrize(("check", "told"), [("warn", "loaded all the same"), ("off", "")])
def test_who_says_so_loads_it_all_the_same(huge, monkeypatch, capsys, check, told):
    class LoadingError(Exception):
        pass

    def make_setup(*_, kept_dtype, **__):
        assert kept_dtype == "bfloat16"
        raise LoadingError

    monkeypatch.setattr(policy, "make_setup", make_setup)
    monkeypatch.setattr(model_memory, "free_on_host", lambda: 62 * GB)
    with pytest.raises(LoadingError):
        policy.open_model(huge, {"eval.memory_check": check}, devices=jax.devices()[:1])
    said = capsys.readouterr()
    assert said.out == "" and (told in said.err if told else said.err == "")


NEED = MemoryNeed(parameters=3 * GB, dtype="float32", weights=12 * GB, decoding=6 * GB, tensor=2 * GB)


@pytest.mark.parametrize(
    ("need", "sizes", "free", "said"),
    [
        (NEED, (1, 1, 1), 20 * GB, "at least 18 GB of memory to answer (3 billion parameters as float32: 12 GB and 6"),
        (NEED, (1, 4, 2), 20 * GB, "at least 18 GB"),
        (NEED, (2, 1, 1), 40 * GB, "at least 36 GB of memory to answer (3 billion parameters as float32: 12 GB and 6"),
        (NEED, (1, 1, 1), None, "at least 18 GB"),
        (dataclasses.replace(NEED, weights=1000, decoding=0, tensor=0), (1, 1, 1), 20 * GB, ""),
    ],
)  # fmt: skip
def test_a_large_model_is_announced_and_a_small_one_is_not(need, sizes, free, said, capsys):
    check_memory("model", need, sizes, "refuse", free)
    shown = " ".join(capsys.readouterr().err.split())
    assert said in shown if said else shown == ""
    assert ("are free" in shown) is bool(said and free) and ("2 times (mesh.data)" in shown) is (sizes[0] == 2)


def test_copies_of_a_mesh_count_and_float32_is_advised_against():
    with pytest.raises(ModelMemoryError, match=r"36 GB .*2 times \(mesh.data\).*export it in bfloat16"):
        check_memory("model", NEED, (2, 1, 1), "refuse", 35 * GB)
    check_memory("model", NEED, (2, 1, 1), "refuse", 37 * GB)


MEMINFO = "MemTotal: 999 kB\nMemFree: 1 kB\nMemAvailable:  2097152 kB\nSwapFree: 1048576 kB\n"


def machine(folder, cgroup, files=()):
    """A stand-in for /proc and /sys/fs/cgroup."""
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/meminfo").write_text(MEMINFO)
    (folder / "proc/self/cgroup").write_text(cgroup)
    for name, content in files:
        place = folder / "cgroup" / name
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_text(f"{content}\n")
    return folder / "proc", folder / "cgroup"


def group(folder, most, used, given_back, names=("memory.max", "memory.current", "inactive_file")):
    return [
        (f"{folder}/{names[0]}", most), (f"{folder}/{names[1]}", used),
        (f"{folder}/memory.stat", f"anon 5\n{names[2]} {given_back}"),
    ]  # fmt: skip


ONE = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


@pytest.mark.parametrize(
    ("cgroup", "files", "free"),
    [
        ("0::/\n", (), 3 * 2**30),  # available and swap
        ("0::/a/b\n", group("a/b", "max", 9, 0), 3 * 2**30),
        ("0::/a/b\n", [*group("a/b", "max", 9, 0), *group("a", 1000, 700, 200)], 500),  # the group above is the limit
        ("0::/\n", group(".", 1000, 2000, 0), 0),
        # Weights that were read twice lie in active pages, which are given back as well.
        ("0::/\n", group(".", 1000, 900, "100\nactive_file 500\nslab_reclaimable 50"), 750),
        ("4:cpu,memory:/x\n3:cpuset:/y\n", group("memory/x", 800, 300, 100, ONE), 600),
        ("4:memory:/hidden\n", group("memory", 9223372036854771712, 300, 100, ONE), 3 * 2**30),
    ],
)
def test_what_is_free_is_what_machine_and_container_leave(tmp_path, cgroup, files, free):
    assert free_on_host(*machine(tmp_path, cgroup, files)) == free


def test_free_memory_of_devices_is_what_they_tell(tmp_path):
    assert free_on_host(tmp_path) is None

    class Card:
        platform, process_index = "gpu", 0

        def __init__(self, stats):
            self.memory_stats = lambda: stats

    cards = [Card({"bytes_limit": 80 * GB, "bytes_in_use": 10 * GB}), Card({"bytes_limit": 80 * GB})]
    assert free_bytes(cards) == 150 * GB and free_bytes([*cards, Card(None)]) is None
    here = free_bytes(jax.devices())
    assert here is None or here > 0
