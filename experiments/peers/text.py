"""Text alone, our side: generation, and whole GRPO steps, by the programs that training calls."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Sequence

import jax
import numpy as np
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mer_r1_jax.config.schema import MeshConfig, OptimizerConfig, RlConfig
from mer_r1_jax.omni.batch import PROMPT, FeatureLayout, Prompts, Tokens
from mer_r1_jax.omni.config import TextConfig, ThinkerConfig
from mer_r1_jax.omni.hf.export import export_model
from mer_r1_jax.parallel.mesh import make_mesh
from mer_r1_jax.parallel.rows import put
from mer_r1_jax.peers.timing import Laps, Stopwatch
from mer_r1_jax.rl.advantage import Rewards, advantages
from mer_r1_jax.rl.losses import PolicyTargets
from mer_r1_jax.rl.packing import Continuations
from mer_r1_jax.rl.sampling import SamplingConfig
from mer_r1_jax.training.omni_backbone import OmniBackbone
from mer_r1_jax.training.rl_step import Experience, RlPrograms
from mer_r1_jax.training.state import make_optimizer, nest, trainable_names

PAD, END, FIRST_WORD = 0, 1, 2  # ids; all others are words


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextJob:
    """Sizes of the work and of the model, the same for both sides.

    Attributes:
        completions: of a batch. num_generations: of these, how many belong to one prompt in a GRPO step.
        prompt_length, max_completion_length: tokens of every prompt and of every completion.
        hidden_size, layers, heads, kv_heads, mlp_size, vocab_size: the decoder; float32 weights, random.
        learning_rate: of AdamW.
    """

    completions: int = 32
    num_generations: int = 8
    prompt_length: int = 64
    max_completion_length: int = 128
    hidden_size: int = 256
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    mlp_size: int = 1024
    vocab_size: int = 4096
    learning_rate: float = 1e-6

    @property
    def thinker(self) -> ThinkerConfig:
        """The architecture; its towers are tiny and never run."""
        half = self.hidden_size // self.heads // 2
        text = TextConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.mlp_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            mrope_section=(half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8),
        )
        return dataclasses.replace(
            ThinkerConfig.tiny(vocab_size=self.vocab_size, hidden_size=self.hidden_size),
            text=text,
            remat="everything",  # neither side recomputes activations
        )

    def prompts(self, count: int, seed: int = 0) -> list[str]:
        """Random prompts of exactly `prompt_length` words."""
        words = np.random.default_rng(seed).integers(FIRST_WORD, self.vocab_size, (count, self.prompt_length))
        return [" ".join(f"w{word}" for word in row) for row in words]


def tokenizer_of(job: TextJob) -> PreTrainedTokenizerFast:
    """One token a word; word n is id n."""
    words = {"<pad>": PAD, "<end>": END} | {f"w{word}": word for word in range(FIRST_WORD, job.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def reward(completions: Sequence[str]) -> list[float]:
    """The share of a completion's words that have an even number."""
    return [sum(word[-1] in "02468" for word in text.split()) / max(1, len(text.split())) for text in completions]


class TextSide:
    """Our generation and GRPO steps."""

    def __init__(self, job: TextJob):
        self.job, self.tokenizer = job, tokenizer_of(job)
        self.backbone = OmniBackbone.create(job.thinker, make_mesh(MeshConfig()))
        self.params = self.backbone.init(seed=0)
        optimizer = OptimizerConfig(learning_rate=job.learning_rate, lr_scheduler_type="constant", warmup_ratio=0.0)
        self.config = RlConfig(
            arm="baseline",  # z of one reward
            num_generations=job.num_generations,
            max_completion_length=job.max_completion_length,
            temperature=1.0,
            beta=0.0,
            optimizer=optimizer,
        )
        # The end is never sampled, so every completion has the same length.
        sampling = SamplingConfig(
            max_completion_length=job.max_completion_length,
            eos_ids=(job.vocab_size,),
            banned_ids=(END,),
            num_generations=job.num_generations,
        )
        self.programs = RlPrograms(self.backbone, self.config, sampling)
        self._optimizer = make_optimizer(optimizer, total_steps=1)
        self._update = self.programs.make_update(self._optimizer)
        self._advantages = jax.jit(functools.partial(advantages, "baseline", config=RlConfig(format_weight=0.0)))
        self._state, self._rollouts = None, 0

    def export(self, directory: str | pathlib.Path) -> None:
        """Writes the weights for the other side."""
        export_model(directory, self.backbone.config, nest(self.params))

    def generate(self, prompts: Sequence[str]) -> Laps:
        """Samples one completion of every prompt."""
        watch = Stopwatch()
        self.sampled_ids(prompts, generations=1)
        return watch.stop()

    def sampled_ids(self, prompts: Sequence[str], generations: int) -> np.ndarray:
        """int32 [B, G, C], completions of prompts."""
        return np.asarray(self._sample(self._rows(prompts), self.params, generations).id_BGC)

    def grpo_step(self, prompts: Sequence[str]) -> Laps:
        """One whole step: sample, decode the texts, reward, advantages, update."""
        if self._state is None:
            self._state = self._new_state()
        state = self._state
        watch = Stopwatch()
        rows = self._rows(prompts)
        completions = self._sample(rows, state.params, self.job.num_generations)
        ids_BGC, length_BG = jax.device_get((completions.id_BGC, completions.length_BG))
        texts = self.tokenizer.batch_decode(ids_BGC.reshape(-1, ids_BGC.shape[-1]), skip_special_tokens=True)
        reward_BG = np.asarray(reward(texts), np.float32).reshape(length_BG.shape)
        here_BG = length_BG > 0
        zero_BG = np.zeros_like(reward_BG)
        rewards = Rewards(
            recall_BG=zero_BG,
            precision_BG=zero_BG,
            f1_BG=reward_BG,
            format_BG=zero_BG,
            valid_BG=here_BG,
            scored_BG=here_BG,
        )
        experience = Experience(
            prompts=rows,
            completion=Continuations(id_BGC=completions.id_BGC, exists_BGC=completions.exists_BGC),
            targets=PolicyTargets(
                advantage_BG=self._advantages(put(rewards, self.backbone.mesh)),
                mask_BGC=completions.mask_BGC,
                present_BG=completions.length_BG > 0,
            ),
            sampling_logprob_BGC=completions.sampling_logprob_BGC,
        )
        jax.block_until_ready(experience)
        watch.lap("rollout")
        self._state, metrics = jax.block_until_ready(self._update(state, experience, np.float32(0)))
        watch.lap("update")
        del metrics
        return watch.stop()

    def logits(self, ids_BT: np.ndarray) -> np.ndarray:
        """float32 [B, T, N], logits of whole rows, for comparing the sides."""
        rows = self._rows_of_ids(ids_BT)

        def logits(params, prompts):
            model = self.backbone.bind(params)
            return model.logits(model.hidden(prompts.tokens, None, FeatureLayout()))

        return np.asarray(jax.jit(logits)(self.params, rows))

    def _new_state(self):
        is_trainable = trainable_names(train_audio=False, train_vision=False)
        params = {name: leaf.copy() for name, leaf in self.params.items()}  # a state takes what it is given
        return self.backbone.new_state(params, is_trainable, self._optimizer, self.config.optimizer.dtype)

    def _sample(self, rows: Prompts, params, generations: int):
        self._rollouts += 1
        key = jax.random.fold_in(jax.random.key(0), self._rollouts)
        sampling = dataclasses.replace(self.programs.sampling, num_generations=generations)
        with self.programs.rollout_params(params) as decoding:
            return self.programs.sample(decoding, rows, key, sampling)

    def _rows(self, prompts: Sequence[str]) -> Prompts:
        return self._rows_of_ids(np.asarray(self.tokenizer(list(prompts))["input_ids"], np.int32))

    def _rows_of_ids(self, ids_BT: np.ndarray) -> Prompts:
        rows, length = ids_BT.shape
        tokens = Tokens(
            id_BT=ids_BT,
            segment_BT=np.full((rows, length), PROMPT, np.int32),
            position_3BT=np.broadcast_to(np.arange(length, dtype=np.int32), (3, rows, length)),
            source_BT2=np.tile(np.array([-1, 0], np.int32), (rows, length, 1)),
        )
        uids = np.arange(rows, dtype=np.uint32)
        made = Prompts(tokens=tokens, next_position_B=np.full(rows, length, np.int32), uid_B=uids)
        return put(made, self.backbone.mesh)
