"""Text alone, the other side: transformers' generate and TRL's GRPOTrainer, with our weights."""

from __future__ import annotations

import pathlib
import tempfile
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from mer_r1_jax.peers.text import END, PAD, TextJob, reward, tokenizer_of
from mer_r1_jax.peers.timing import WHOLE, Laps, Stopwatch

TOWERS = ("audio_tower.", "visual.")


class TextPeer:
    """transformers and TRL on the weights of an export."""

    def __init__(self, job: TextJob, export: str | pathlib.Path):
        self.job, self.tokenizer = job, tokenizer_of(job)
        self.model = _load(job, pathlib.Path(export)).eval()

    def generate(self, prompts: Sequence[str]) -> Laps:
        """Samples one completion of every prompt."""
        watch = Stopwatch()
        self.sampled_ids(prompts)
        return watch.stop()

    @torch.no_grad()
    def sampled_ids(self, prompts: Sequence[str]) -> np.ndarray:
        """int [B, C], completions of prompts."""
        inputs = self.tokenizer(list(prompts), return_tensors="pt", return_token_type_ids=False)
        length = self.job.max_completion_length
        sequences = self.model.generate(
            **inputs, max_new_tokens=length, min_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0
        )
        return sequences[:, inputs["input_ids"].shape[1] :].numpy()

    @torch.no_grad()
    def logits(self, ids_BT: np.ndarray) -> np.ndarray:
        """float32 [B, T, N], logits of whole rows, for comparing the sides."""
        return self.model(torch.from_numpy(ids_BT.astype(np.int64))).logits.numpy()

    def grpo_steps(self, prompts: Sequence[str], steps: int, before_each: Callable[[], None]) -> list[Laps]:
        """Trains with TRL.

        Args:
            prompts: the data set.
            steps: optimizer steps.
            before_each: called before every step, outside its time.

        Returns:
            Seconds of every step: `rollout` is TRL's generation, rewards and advantages, `update` the rest.
        """
        # Imported where they are used: TRL takes its time to load.
        from datasets import Dataset
        from trl import GRPOConfig, GRPOTrainer

        job = self.job
        clock = _StepClock(before_each)
        with tempfile.TemporaryDirectory() as folder:
            config = GRPOConfig(
                output_dir=folder,
                use_cpu=True,
                bf16=False,
                gradient_checkpointing=False,
                per_device_train_batch_size=job.completions,
                num_generations=job.num_generations,
                max_completion_length=job.max_completion_length,
                generation_kwargs={"min_new_tokens": job.max_completion_length},
                temperature=1.0,
                beta=0.0,
                learning_rate=job.learning_rate,
                lr_scheduler_type="constant",
                max_steps=steps,
                logging_steps=steps,
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
            )
            trainer = GRPOTrainer(
                model=self.model,
                reward_funcs=lambda completions, **_: reward(completions),
                args=config,
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
                processing_class=self.tokenizer,
                callbacks=[clock],
            )
            # TRL has no hook between the rollout and the update.
            trainer._generate_and_score_completions = clock.timed(trainer._generate_and_score_completions)
            trainer.train()
        return clock.laps


class _StepClock(TrainerCallback):
    """Times the steps of a trainer."""

    def __init__(self, before_each: Callable[[], None]):
        self.laps: list[Laps] = []
        self._before_each = before_each
        self._rollout = self._start = 0.0

    def timed(self, function: Callable) -> Callable:
        def call(*arguments):
            start = time.perf_counter()
            result = function(*arguments)
            self._rollout = time.perf_counter() - start
            return result

        return call

    def on_step_begin(self, *arguments, **keywords) -> None:
        self._before_each()
        self._start = time.perf_counter()

    def on_step_end(self, *arguments, **keywords) -> None:
        whole = time.perf_counter() - self._start
        self.laps.append({"rollout": self._rollout, "update": whole - self._rollout, WHOLE: whole})


def _load(job: TextJob, export: pathlib.Path) -> Qwen2ForCausalLM:
    """A Qwen2 with a Thinker's decoder: transformers' quickest model that computes the same.

    A Qwen2 counts one position where the Thinker counts three equal ones.
    """
    text = job.thinker.text
    config = Qwen2Config(
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=text.intermediate_size,
        num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=text.num_key_value_heads,
        rms_norm_eps=text.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": text.rope_theta},
        max_position_embeddings=text.max_position_embeddings,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = Qwen2ForCausalLM(config)
    weights = load_file(export / "model.safetensors")
    model.load_state_dict({name: value for name, value in weights.items() if not name.startswith(TOWERS)})
    return model
