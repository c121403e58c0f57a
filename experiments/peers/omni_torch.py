"""The real job, the other side: a plain torch loop around transformers' Thinker.

What PyTorch projects do: every sample is a row of its own, with its prompt and its clips, and each forward pass
(generation, confidences with and without reasoning, reference, update) encodes the clips of every row again. Their
frozen towers take no gradient. Where there is a choice it is made for speed: one batch of all rows where memory allows,
torch's fused attention, logits at the completion's tokens only.

Shape letters as in `mer_r1_jax.omni.batch` and `mer_r1_jax.rl.confidence`; R counts rows, B x G of them.
"""

from __future__ import annotations

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from transformers import Qwen2_5OmniThinkerConfig as ThinkerConfig
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker

from mer_r1_jax.omni.hf.config_json import config_to_hf
from mer_r1_jax.parity.processor_inputs import processor_tensors
from mer_r1_jax.peers.omni import REFERENCE, SAMPLE, SCORE, UPDATE, OmniJob
from mer_r1_jax.peers.timing import Laps, Stopwatch
from mer_r1_jax.rl.advantage import EPSILON
from mer_r1_jax.rl.scoring import ScoredGroups

FLOOR = 1e-10  # of a summed probability
Tensors = dict[str, torch.Tensor]


class Part(NamedTuple):
    """A micro-batch: which of a step's B x G rows, and their prompts."""

    at: slice
    rows: Tensors


class OmniPeer:
    """Steps of a torch loop.

    Args:
        job: what both sides work on.
        policy, reference: two Thinkers of the same weights, in the dtype and on the device that they compute in.
        rows_at_once: rows of a micro-batch, in which all but sampling goes, and whose backward pass recomputes its
            activations (gradient checkpointing); 0 takes all at once and keeps them.
    """

    def __init__(self, job: OmniJob, policy: Thinker, reference: Thinker, rows_at_once: int = 0):
        rl = job.setup.config.rl
        self.job, self.rl = job, rl
        self.policy, self.reference = policy, reference
        self._rows_at_once = rows_at_once
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
            fused=self.device.type == "cuda",
        )
        self._candidates_ZY = torch.from_numpy(np.array(job.setup.candidates.ids_ZY)).long().to(self.device)
        self._samples = [processor_tensors(prompt) for prompt in job.prompts]
        if rows_at_once:
            self.policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.metrics: dict[str, float] = {}

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.policy.device

    def step(self) -> Laps:
        """One whole step; leaves its metrics in `metrics`."""
        job = self.job
        watch = Stopwatch()
        self.sampled_ids(self.rows())
        self._lap(watch, SAMPLE)
        parts = self.parts()
        groups = job.setup.scorer.groups(job.script, [record.solution for record in job.records])
        advantage = self.advantages_of(parts, groups)
        self._lap(watch, SCORE)
        with torch.no_grad():
            reference = [self.logprobs(part, self.reference) for part in parts]
        self._lap(watch, REFERENCE)
        self.learn(parts, advantage, reference)
        self._lap(watch, UPDATE)
        return watch.stop()

    def _lap(self, watch: Stopwatch, name: str) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        watch.lap(name)

    def rows(self, part: slice = slice(None)) -> Tensors:
        """Rows of a step's batch, as a data collator makes it, on the device."""
        numbers = [b for b in range(len(self._samples)) for _ in range(self.rl.num_generations)][part]
        rows = _rows(self._samples, numbers, self.job.setup.backbone.config.pad_token_id)
        floats = {"input_features", "pixel_values_videos", "pixel_values"}
        dtype = {name: self.policy.dtype if name in floats else value.dtype for name, value in rows.items()}
        return {name: value.to(self.device, dtype[name]) for name, value in rows.items()}

    def parts(self) -> list[Part]:
        """The micro-batches of a step."""
        count = len(self._samples) * self.rl.num_generations
        size = self._rows_at_once or count
        return [Part(at, self.rows(at)) for at in (slice(start, start + size) for start in range(0, count, size))]

    @torch.no_grad()
    def sampled_ids(self, rows: Tensors, tokens: int = 0) -> torch.Tensor:
        """Completions [R, C] of rows, none of which ends; `tokens` of each in the place of the cap."""
        sampling = self.job.setup.programs.sampling
        sequences = self.policy.generate(
            **rows,
            max_new_tokens=tokens or sampling.max_completion_length,
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

    def _completions(self, part: Part) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and which exist, [R, C], of the script's completions in a part."""
        return self._flat(self.job.script.id_BGC, part), self._flat(self.job.script.exists_BGC, part)

    def _flat(self, array_BGC: np.ndarray, part: Part) -> torch.Tensor:
        """A part's rows [R, ...] of ids or of which exist."""
        flat = torch.from_numpy(np.array(array_BGC)).flatten(0, 1)[part.at]  # a copy: jax's own is read-only
        return (flat if flat.dtype == torch.bool else flat.long()).to(self.device)

    def encode(self, rows: Tensors) -> None:
        """The towers over the clips of all rows, as each of the passes has them once."""
        self.policy.get_video_features(rows["pixel_values_videos"], rows["video_grid_thw"])
        self.policy.get_audio_features(rows["input_features"], rows["feature_attention_mask"])

    def logprobs(self, part: Part, model: Thinker | None = None) -> torch.Tensor:
        """Log-probabilities [R, C] of a part's completions under logits / temperature, of the policy or another."""
        model = self.policy if model is None else model
        ids, exists = self._completions(part)
        logits = model.lm_head(self._hidden(model, part.rows, ids, exists)).float() / self.rl.temperature
        return torch.log_softmax(logits, dim=-1).gather(-1, ids[..., None])[..., 0]

    def _confidences(self, part: Part, id_BGC, exists_BGC, anchor_BGW: np.ndarray, set_BGWQ: np.ndarray):
        """Log-probability [R, W, Q] of each word's candidates where its first token is predicted."""
        hidden = self._hidden(self.policy, part.rows, self._flat(id_BGC, part), self._flat(exists_BGC, part))
        anchor_RW = self._flat(anchor_BGW, part)
        at_RWD = hidden.gather(1, anchor_RW[..., None].expand(-1, -1, hidden.shape[-1]))
        probability_RWN = torch.softmax(self.policy.lm_head(at_RWD).float(), dim=-1)
        sets_RWQ = self._flat(set_BGWQ, part)
        tokens_RWQY = self._candidates_ZY[sets_RWQ.clamp(min=0)]
        picked = probability_RWN.gather(-1, tokens_RWQY.clamp(min=0).flatten(2)).view(tokens_RWQY.shape)
        total_RWQ = (picked * (tokens_RWQY >= 0)).sum(-1)
        return total_RWQ.clamp(min=FLOOR).log()

    @torch.no_grad()
    def advantages_of(self, parts: list[Part], groups: ScoredGroups) -> torch.Tensor:
        """Advantages float32 [B, G] of the script's completions, which the scorer has read."""
        script, anchors, fast = self.job.script, groups.anchors, groups.anchors.fast
        # Slow minus fast, for each word and wheel: [B, G, W, Q].
        difference = [
            self._confidences(part, script.id_BGC, script.exists_BGC, anchors.slow_BGW, anchors.set_BGWQ)
            - self._confidences(part, fast.id_BGC, fast.exists_BGC, anchors.fast_BGW, anchors.set_BGWQ)
            for part in parts
        ]
        return self._advantages(groups, torch.cat(difference).cpu().view(anchors.set_BGWQ.shape))

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

    def learn(self, parts: list[Part], advantage_BG: torch.Tensor, reference: list[torch.Tensor]) -> None:
        """The clipped policy loss with its KL term over all tokens, and one step of AdamW.

        Args:
            parts: micro-batches of the step.
            advantage_BG: float32 [B, G].
            reference: log-probabilities [R, C] under the reference, in nats, for each part.
        """
        # Transformers recomputes in training mode alone, in which it keeps no cache while it samples. Nothing else
        # hangs on the mode: the Thinker has no dropout.
        self.policy.train(bool(self._rows_at_once))
        tokens = int(self.job.script.mask_BGC.sum())
        loss = kl = torch.zeros((), device=self.device)
        for part, reference_RC in zip(parts, reference, strict=True):
            of_part, kl_of_part = self.loss(part, advantage_BG.flatten()[part.at], reference_RC)
            (of_part / tokens).backward()
            loss, kl = loss + of_part.detach() / tokens, kl + kl_of_part / tokens
        norm = torch.nn.utils.clip_grad_norm_(self._trained, self.rl.optimizer.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self.policy.eval()
        self.metrics = {"loss": loss.item(), "kl": kl.item(), "grad_norm": norm.item()}

    def loss(self, part: Part, advantage_R: torch.Tensor, reference_RC: torch.Tensor):
        """Sums over a part's tokens, scalars: of the loss, and of the KL term alone, without gradient.

        Args:
            part: of R rows.
            advantage_R: float32 [R].
            reference_RC: log-probabilities [R, C] under the reference, in nats.
        """
        _, exists = self._completions(part)
        logprob = self.logprobs(part)
        ratio = torch.exp(logprob - logprob.detach())
        advantage = advantage_R.to(self.device)[:, None]
        clipped = ratio.clamp(1 - self.rl.epsilon, 1 + self.rl.epsilon_high)
        ahead = reference_RC - logprob
        kl = torch.exp(ahead) - ahead - 1
        loss = -torch.minimum(ratio * advantage, clipped * advantage) + self.job.beta * kl
        return (loss * exists).sum(), (kl.detach() * exists).sum()


def random_thinker(job: OmniJob, dtype: torch.dtype, device: torch.device) -> Thinker:
    """A Thinker of the job's architecture with random weights, made where it is to be."""
    config = ThinkerConfig(**config_to_hf(job.setup.backbone.config, style="v5"))
    with device:
        return Thinker._from_config(config, attn_implementation="sdpa", dtype=dtype).eval()


def load(export: str | pathlib.Path, count: int = 2) -> list[Thinker]:
    """Thinkers of an export, in float32 on the CPU."""
    settings = {"dtype": torch.float32, "attn_implementation": "sdpa"}
    return [Thinker.from_pretrained(export, **settings).eval() for _ in range(count)]


def _rows(samples: Sequence[dict[str, np.ndarray]], numbers: Sequence[int], pad: int) -> Tensors:
    """A batch of the samples of these numbers: ids padded on the left, each row with clips of its own."""
    length = max(sample["input_ids"].shape[1] for sample in samples)
    frames = max(int(sample["feature_attention_mask"].sum(-1).max()) for sample in samples)
    columns: dict[str, list[np.ndarray]] = {name: [] for name in samples[0]}
    for sample in (samples[number] for number in numbers):
        missing = length - sample["input_ids"].shape[1]
        padded = {
            "input_ids": np.pad(sample["input_ids"], ((0, 0), (missing, 0)), constant_values=pad),
            "attention_mask": np.pad(sample["attention_mask"], ((0, 0), (missing, 0))),
            # The processor pads every track to 30 seconds; nothing beyond the longest one is needed.
            "input_features": sample["input_features"][..., :frames],
            "feature_attention_mask": sample["feature_attention_mask"][..., :frames],
        }
        for name in columns:
            columns[name].append((sample | padded)[name])
    return {name: torch.from_numpy(np.concatenate(parts)) for name, parts in columns.items()}


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
