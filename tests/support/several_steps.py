"""Rollouts, an RL update and words asked about, on fixed tokens: several_steps.py DATA FSDP DECODE_TENSOR TENSOR FILE.

Started as a process of several (JAX_COORDINATOR_ADDRESS and so on); the first one writes what came of it to FILE.
"""

import dataclasses
import sys

import jax
import numpy as np
import optax

from mer_r1_jax.cli import explained
from mer_r1_jax.config.schema import MeshConfig, RlConfig
from mer_r1_jax.evaluation.answering import Answerer
from mer_r1_jax.omni.batch import PADDING, PROMPT, Prompts, Tokens
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.lora import AdapterConfig
from mer_r1_jax.parallel import processes
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.parallel.rows import local_rows, put, row_share
from mer_r1_jax.parallel.rules import replicated
from mer_r1_jax.parallel.whole import on_first
from mer_r1_jax.rl.confidence import AskedWords
from mer_r1_jax.rl.losses import PolicyTargets
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.backbone import Backbone
from mer_r1_jax.training.omni_backbone import OmniBackbone
from mer_r1_jax.training.rl_step import Experience, RlPrograms
from mer_r1_jax.training.state import init_state, state_shardings, trainable_names

LENGTHS = (11, 6, 0, 8, 5, 0, 7, 9)  # of the prompts; two rows are absent
WIDTH, GENERATIONS, TOKENS = 12, 4, 12
CANDIDATES = np.asarray([[3, 9, -1], [4, -1, -1], [70, 80, 90], [255, 7, 300]], np.int32)
SAMPLING = SamplingConfig(
    max_completion_length=TOKENS, eos_ids=tuple(range(40, 90)), temperature=0.8, num_generations=GENERATIONS
)
TEXT_ONLY = trainable_names(train_audio=False, train_vision=False)
OPTIMIZER = optax.sgd(1.0, momentum=0.9)  # its trace after the first update is the gradient


def main(data: int, fsdp: int, decode_tensor: int, tensor: int, file: str) -> None:
    backbone = small_backbone(MeshConfig(data=data, fsdp=fsdp, decode_tensor=decode_tensor, tensor=tensor))
    found = results(backbone, chunks=(0, 3))
    if processes.is_first():
        np.savez(file, **found)


def small_backbone(mesh: MeshConfig, devices=None, adapters: AdapterConfig | None = None) -> Backbone:
    config = ThinkerConfig.tiny(vocab_size=512, remat="nothing", adapters=adapters)
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, num_hidden_layers=1))
    return OmniBackbone.create(config, make_mesh(mesh, devices))


def results(backbone: Backbone, chunks: tuple[int, ...]) -> dict[str, np.ndarray]:
    """By name, on the first process: completions for every size of chunk, an update's metrics and gradients, and the
    probabilities of words.
    """
    params = parameters(backbone)
    found = {}
    for chunk in chunks:
        sampled = completions(backbone, params, chunk)
        found |= {f"{field.name} {chunk}": getattr(sampled, field.name) for field in dataclasses.fields(sampled)}
    return found | update(backbone, params) | asked(backbone, params)


def parameters(backbone: Backbone) -> dict[str, jax.Array]:
    """Weights spread so widely that mistakes show, the same on every mesh."""
    rng = np.random.default_rng(0)
    host = {
        name: np.ones(leaf.shape) if name.endswith("scale") else 0.15 * rng.normal(size=leaf.shape)
        for name, leaf in sorted(backbone.shapes.items())
    }
    return {
        name: jax.make_array_from_callback(
            leaf.shape, backbone.shardings[name], lambda index, leaf=leaf: leaf[index].astype(np.float32)
        )
        for name, leaf in host.items()
    }


def prompts(backbone: Backbone) -> Prompts:
    length_B1 = np.asarray(LENGTHS, np.int32)[:, None]
    index_BT = np.broadcast_to(np.arange(WIDTH, dtype=np.int32), (len(LENGTHS), WIDTH))
    exists_BT = index_BT < length_B1
    ids = np.random.default_rng(1).integers(0, 256, exists_BT.shape)
    tokens = Tokens(
        id_BT=np.where(exists_BT, ids, 0).astype(np.int32),
        segment_BT=np.where(exists_BT, PROMPT, PADDING).astype(np.int32),
        position_3BT=np.stack([np.where(exists_BT, index_BT, 1)] * 3).astype(np.int32),
        source_BT2=np.full((*exists_BT.shape, 2), -1, np.int32),
    )
    rows = Prompts(
        tokens=tokens,
        next_position_B=length_B1[:, 0],
        uid_B=np.arange(len(LENGTHS), dtype=np.uint32) + 7,
    )
    return on_mesh(rows, backbone)


def on_mesh(batch, backbone: Backbone):
    """Rows of all prompts on the mesh: this process puts its own."""
    share = row_share(backbone.mesh)
    own = share.of(len(LENGTHS))

    def mine(path, leaf):
        rows = slice(share.index * own, (share.index + 1) * own)
        return leaf[:, rows] if path[-1].name.endswith("_3BT") else leaf[rows]

    return put(jax.tree_util.tree_map_with_path(mine, batch), backbone.mesh)


def completions(backbone: Backbone, params, chunk: int):
    """Sampled completions of all processes, row by row."""
    programs = RlPrograms(backbone, RlConfig(decode_chunk=chunk), SAMPLING)
    with programs.rollout_params(params) as decoding:
        sampled = programs.sample(decoding, prompts(backbone), jax.random.fold_in(jax.random.key(1), 2))
    parts = processes.gather("completions", local_rows(sampled, backbone.mesh))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts) if parts else sampled


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Fixed:
    """Completions nobody sampled, and what is to be learnt of them."""

    id_BGC: np.ndarray
    exists_BGC: np.ndarray
    present_BG: np.ndarray
    advantage_BG: np.ndarray
    sampling_logprob_BGC: np.ndarray


def fixed() -> Fixed:
    rng = np.random.default_rng(2)
    shape = (len(LENGTHS), GENERATIONS, TOKENS)
    present_BG = np.repeat(np.asarray(LENGTHS)[:, None] > 0, GENERATIONS, axis=1)
    length_BG = np.where(present_BG, rng.integers(2, TOKENS + 1, shape[:2]), 0)
    return Fixed(
        id_BGC=rng.integers(0, 256, shape).astype(np.int32),
        exists_BGC=np.arange(TOKENS) < length_BG[..., None],
        present_BG=present_BG,
        advantage_BG=np.where(present_BG, rng.normal(size=shape[:2]), 0).astype(np.float32),
        sampling_logprob_BGC=rng.normal(-6, 1, shape).astype(np.float32),
    )


def update(backbone: Backbone, params) -> dict[str, np.ndarray]:
    """Metrics and gradients of one update on the fixed completions, in two micro-batches and with a KL term."""
    config = RlConfig(gradient_accumulation_steps=2, max_completion_length=TOKENS)
    programs = RlPrograms(backbone, config, SAMPLING)
    rows, own = prompts(backbone), on_mesh(fixed(), backbone)
    completion = Continuations(id_BGC=own.id_BGC, exists_BGC=own.exists_BGC)
    # The reference is a fixed step away from the policy, so that the KL term has a gradient.
    logprob_BGC = jax.jit(lambda x: x - 0.3)(programs.logprobs(params, rows, completion))
    experience = Experience(
        prompts=rows,
        completion=completion,
        targets=PolicyTargets(
            advantage_BG=own.advantage_BG,
            mask_BGC=own.exists_BGC,
            present_BG=own.present_BG,
            reference_logprob_BGC=logprob_BGC,
        ),
        sampling_logprob_BGC=own.sampling_logprob_BGC,
    )
    shapes = backbone.abstract_state(TEXT_ONLY, OPTIMIZER, "float32")
    shardings = state_shardings(shapes, backbone.shardings, replicated(backbone.mesh))
    state = jax.jit(lambda x: init_state(x, TEXT_ONLY, OPTIMIZER, "float32"), out_shardings=shardings)(params)
    state, metrics = programs.make_update(OPTIMIZER)(state, experience, np.float32(0.04))
    gradients = on_first(optax.tree.get(state.opt_state, "trace")) or {}
    metrics = {f"metric {name}": np.asarray(value) for name, value in metrics.items()}
    return metrics | {f"gradient {name}": leaf for name, leaf in gradients.items()}


def asked(backbone: Backbone, params) -> dict[str, np.ndarray]:
    """What an evaluation would be told of words in two kinds of texts, one of them short."""
    rng, own, share = np.random.default_rng(3), fixed(), row_share(backbone.mesh)
    rows = slice(share.index * share.of(len(LENGTHS)), (share.index + 1) * share.of(len(LENGTHS)))
    words = []
    for length in (TOKENS, 5):
        shape_BGW = (len(LENGTHS), GENERATIONS, 3)
        set_BGWQ = rng.integers(-1, len(CANDIDATES), (*shape_BGW, 2))  # -1: the word has none on that wheel
        everything = AskedWords(
            continuation=Continuations(id_BGC=own.id_BGC[..., :length], exists_BGC=own.exists_BGC[..., :length]),
            index_BGW=rng.integers(0, length, shape_BGW).astype(np.int32),
            set_BGWQ=set_BGWQ.astype(np.int32),
        )
        words.append(jax.tree.map(lambda leaf: leaf[rows], everything))
    answerer = Answerer(RlPrograms(backbone, RlConfig(), SAMPLING), None, CANDIDATES, SAMPLING)
    with answerer.holding(params) as policy:
        parts = processes.gather("words", policy.probabilities(prompts(backbone), words)) or []
    return {f"asked {kind}": np.concatenate([part[kind] for part in parts]) for kind in (0, 1) if parts}


if __name__ == "__main__":
    with processes.joined(), explained():
        main(*map(int, sys.argv[1:5]), sys.argv[5])
