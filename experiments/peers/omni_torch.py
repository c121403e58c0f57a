"""The real job, the other side: a plain torch loop around transformers' Thinker.

What PyTorch projects do: every sample is a row of its own, with its prompt and its clips, and each forward pass
(generation, confidences with and without reasoning, reference, update) encodes the clips of every row again. Their
frozen towers take no gradient. Where there is a choice it is made for speed: one batch of all rows, torch's fused
attention, logits at the completion's tokens only.

Shape letters as in `mer_r1_jax.omni.batch` and `mer_r1_jax.rl.confidence`; R counts rows, B x G of them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerForConditionalGeneration

from mer_r1_jax.parity.processor_inputs import processor_tensors
from mer_r1_jax.peers.omni import REFERENCE, SAMPLE, SCORE, UPDATE, OmniJob
from mer_r1_jax.peers.timing import Laps, Stopwatch
from mer_r1_jax.rl.advantage import EPSILON

FLOOR = 1e-10  # of a summed probability
Tensors = dict[str, torch.Tensor]


class OmniPeer:
    """Steps of a torch loop on the weights of an export."""

    def __init__(self, job: OmniJob, export: str | pathlib.Path):
        rl = job.setup.config.rl
        self.job, self.rl = job, rl
        self.policy, self.reference = (_load(export) for _ in range(2))
        self.reference.requires_grad_(False)
        for tower in (self.policy.model.audio_tower, self.policy.model.visual):
            tower.requires_grad_(False)
        self._trained = [weight for weight in self.policy.parameters() if weight.requires_grad]
        adam = rl.optimizer
        self._optimizer = torch.optim.AdamW(
            self._trained,
            lr=adam.learning_rate,
            betas=(adam.adam_beta1, adam.adam_beta2),
            eps=adam.adam_epsilon,
            weight_decay=adam.weight_decay,
        )
        self._candidates_ZY = torch.from_numpy(np.array(job.setup.candidates.ids_ZY)).long()
        self._samples = [processor_tensors(prompt) for prompt in job.prompts]
        self.metrics: dict[str, float] = {}

    def step(self) -> Laps:
        """One whole step; leaves its metrics in `metrics`."""
        job, script = self.job, self.job.script
        watch = Stopwatch()
        rows = self.rows()
        self.sampled_ids(rows)
        watch.lap(SAMPLE)
        groups = job.setup.scorer.groups(script, [record.solution for record in job.records])
        ids, exists = _flat(script.id_BGC), _flat(script.exists_BGC)
        with torch.no_grad():
            slow = self._confidences(rows, ids, exists, groups.anchors.slow_BGW, groups.anchors.set_BGWQ)
            fast_ids, fast_exists = _flat(groups.anchors.fast.id_BGC), _flat(groups.anchors.fast.exists_BGC)
            fast = self._confidences(rows, fast_ids, fast_exists, groups.anchors.fast_BGW, groups.anchors.set_BGWQ)
            advantage = self._advantages(groups, slow - fast)
        watch.lap(SCORE)
        with torch.no_grad():
            reference = self._logprobs(self.reference, rows, ids, exists)
        watch.lap(REFERENCE)
        self._update(rows, ids, exists, advantage, reference)
        watch.lap(UPDATE)
        return watch.stop()

    def rows(self) -> Tensors:
        """The batch of a step, as a data collator makes it."""
        return _rows(self._samples, self.rl.num_generations, self.job.setup.backbone.config.pad_token_id)

    @torch.no_grad()
    def sampled_ids(self, rows: Tensors) -> torch.Tensor:
        """Completions [R, C] of rows, none of which ends."""
        sampling = self.job.setup.programs.sampling
        sequences = self.policy.generate(
            **rows,
            max_new_tokens=sampling.max_completion_length,
            eos_token_id=None,
            pad_token_id=self.job.setup.backbone.config.pad_token_id,
            suppress_tokens=list(sampling.banned_ids),
            do_sample=True,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
        )
        return sequences[:, rows["input_ids"].shape[1] :]

    def _hidden(self, model, rows: Tensors, ids, exists) -> torch.Tensor:
        """Hidden states [R, C, D] that predict the tokens of completions, each a row behind its whole prompt."""
        inputs = dict(rows)
        inputs["input_ids"] = torch.cat([rows["input_ids"], ids], dim=1)
        inputs["attention_mask"] = torch.cat([rows["attention_mask"], exists.long()], dim=1)
        hidden = model.model(**inputs, use_cache=False).last_hidden_state
        return hidden[:, rows["input_ids"].shape[1] - 1 : -1]

    def _logprobs(self, model, rows: Tensors, ids, exists) -> torch.Tensor:
        """Log-probabilities [R, C] of completions under logits / temperature."""
        logits = model.lm_head(self._hidden(model, rows, ids, exists)).float() / self.rl.temperature
        return torch.log_softmax(logits, dim=-1).gather(-1, ids[..., None])[..., 0]

    def _confidences(self, rows: Tensors, ids, exists, anchor_BGW: np.ndarray, set_BGWQ: np.ndarray) -> torch.Tensor:
        """Log-probability [B, G, W, Q] of each word's candidates where its first token is predicted."""
        hidden = self._hidden(self.policy, rows, ids, exists)
        anchor_RW = torch.from_numpy(anchor_BGW).long().flatten(0, 1)
        at_RWD = hidden.gather(1, anchor_RW[..., None].expand(-1, -1, hidden.shape[-1]))
        probability_RWN = torch.softmax(self.policy.lm_head(at_RWD).float(), dim=-1)
        sets_RWQ = torch.from_numpy(set_BGWQ).long().flatten(0, 1)
        tokens_RWQY = self._candidates_ZY[sets_RWQ.clamp(min=0)]
        picked = probability_RWN.gather(-1, tokens_RWQY.clamp(min=0).flatten(2)).view(tokens_RWQY.shape)
        total_RWQ = (picked * (tokens_RWQY >= 0)).sum(-1)
        return total_RWQ.clamp(min=FLOOR).log().view(set_BGWQ.shape)

    def _advantages(self, groups, difference_BGWQ: torch.Tensor) -> torch.Tensor:
        """MER-R1's advantages [B, G]."""
        rewards = {
            name: torch.from_numpy(np.asarray(getattr(groups.rewards, f"{name}_BG")))
            for name in ("recall", "precision", "format", "scored", "valid")
        }
        used = torch.from_numpy(groups.anchors.set_BGWQ >= 0)
        correct = torch.from_numpy(groups.anchors.correct_BGWQ)
        scored = rewards["scored"] & rewards["valid"]
        calibration = 0.0
        for sign, held in ((1, used & correct), (-1, used & ~correct)):
            words_BGQ = held.sum(2)
            wheel_BGQ = (sign * difference_BGWQ * held).sum(2) / words_BGQ.clamp(min=1)
            wheels_BG = (words_BGQ > 0).sum(-1)
            value_BG = (wheel_BGQ * (words_BGQ > 0)).sum(-1) / wheels_BG.clamp(min=1)
            calibration = calibration + _zscore(value_BG, (wheels_BG > 0) & scored)
        return (
            _zscore(rewards["recall"], scored)
            + _zscore(rewards["precision"], scored)
            + self.rl.calibration_weight * calibration
            + self.rl.format_weight * _zscore(rewards["format"], rewards["valid"])
        )

    def _update(self, rows: Tensors, ids, exists, advantage_BG: torch.Tensor, reference: torch.Tensor) -> None:
        """The clipped policy loss with its KL term over all tokens, and one step of AdamW."""
        logprob = self._logprobs(self.policy, rows, ids, exists)
        ratio = torch.exp(logprob - logprob.detach())
        advantage = advantage_BG.flatten()[:, None]
        clipped = ratio.clamp(1 - self.rl.epsilon, 1 + self.rl.epsilon_high)
        ahead = reference - logprob
        kl = torch.exp(ahead) - ahead - 1
        loss = -torch.minimum(ratio * advantage, clipped * advantage) + self.job.beta * kl
        loss = (loss * exists).sum() / exists.sum()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self.rl.optimizer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        mean_kl = (kl.detach() * exists).sum() / exists.sum()
        self.metrics = {"loss": loss.item(), "kl": mean_kl.item(), "grad_norm": norm.item()}


def _load(export: str | pathlib.Path) -> Qwen2_5OmniThinkerForConditionalGeneration:
    return Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(
        export, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()


def _rows(samples: Sequence[dict[str, np.ndarray]], generations: int, pad: int) -> Tensors:
    """A batch with every sample `generations` times: ids padded on the left, each row with clips of its own."""
    length = max(sample["input_ids"].shape[1] for sample in samples)
    frames = max(int(sample["feature_attention_mask"].sum(-1).max()) for sample in samples)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in samples[0]}
    for sample in samples:
        missing = length - sample["input_ids"].shape[1]
        padded = {
            "input_ids": np.pad(sample["input_ids"], ((0, 0), (missing, 0)), constant_values=pad),
            "attention_mask": np.pad(sample["attention_mask"], ((0, 0), (missing, 0))),
            # The processor pads every track to 30 seconds; nothing beyond the longest one is needed.
            "input_features": sample["input_features"][..., :frames],
            "feature_attention_mask": sample["feature_attention_mask"][..., :frames],
        }
        for name in columns:
            columns[name] += [(sample | padded)[name]] * generations
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()}


def _flat(array_BGC: np.ndarray) -> torch.Tensor:
    """Rows [R, C] of ids or of which exist."""
    flat = torch.from_numpy(np.array(array_BGC)).flatten(0, 1)  # a copy: what jax hands out is read-only
    return flat if flat.dtype == torch.bool else flat.long()


def _zscore(x_BG: torch.Tensor, valid_BG: torch.Tensor) -> torch.Tensor:
    """(x - mean) / (std + 1e-4) over each group's valid values; 0 where there is none or no spread."""
    count = valid_BG.sum(-1, keepdim=True)
    x_BG = torch.where(valid_BG, x_BG.float(), 0.0)
    centred = torch.where(valid_BG, x_BG - x_BG.sum(-1, keepdim=True) / count.clamp(min=1), 0.0)
    deviation = (centred.square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    spread = torch.where(valid_BG, x_BG, -torch.inf).amax(-1, keepdim=True) > torch.where(
        valid_BG, x_BG, torch.inf
    ).amin(-1, keepdim=True)
    return torch.where(valid_BG & spread, centred / (deviation + EPSILON), 0.0)
