"""Every metric of metrics.jsonl and TensorBoard, with its meaning; docs/reference.md is made from it.

Names are TRL's where TRL has one. `<...>` stands for any name, {a,b} for one of several.
"""

from __future__ import annotations

import itertools
import re

# A row of the reference: names that are explained together -> what they mean.
METRICS: dict[tuple[str, ...], str] = {
    ("reward", "reward_std"): (
        "F1 + `rl.format_weight` x format, whatever the arm, so that arms can be compared; its spread within groups"
    ),
    ("rewards/{recall,precision,f1,format,r_plus,r_minus}/{mean,std}",): (
        "each of the method's rewards and its spread over the step's answers; R+ and R- in nats"
    ),
    ("rewards/{recall,precision,f1}/group_std", "rewards/recall/precision_corr"): (
        "spread within groups, mean over groups; correlation of recall and precision within groups: what arms differ in"
    ),
    ("advantages/corr/{recall,precision,categories}",): (
        "correlation of the advantage within groups with each reward, and with the number of categories named: above 0 "
        "RL draws answers out, below it shortens them"
    ),
    ("advantages/share/{calibration,format}",): "share of the advantage's variance that comes from these terms",
    ("rewards/<function>/{mean,std,unscored,faults}",): (
        "of a reward function of your own; the share of answers without a value, and the number of faults"
    ),
    ("frac_reward_zero_std",): "share of groups whose answers all got the same advantage: they teach nothing",
    ("confidence/{slow,fast}", "confidence/{slow,fast}_{correct,wrong}"): (
        "probability of the categories of sampled words, with the reasoning and without; also over right or wrong words"
    ),
    ("confidence/left_out/<why>",): (
        "what got no confidence: answers with `bad_format`, words beyond `rl.max_answer_words`, ..."
    ),
    ("kl", "beta"): "KL to the reference, mean over tokens, in nats; its weight",
    ("policy_loss", "calibration_loss"): (
        "the clipped policy loss without the KL term; the loss of the arm `sfcc_loss`, unweighted"
    ),
    ("entropy",): "of the policy, mean over tokens, in nats",
    ("entropy_bonus",): "what the bonus `rl.entropy_coef` takes off the loss; only where it is on",
    ("sampling/importance_sampling_ratio/{mean,beyond}",): (
        "with `rl.sampler_correction`: weights of tokens, or of answers, and the share beyond a bound"
    ),
    ("clip_ratio/{low,high,region}_mean",): "share of clipped tokens; 0 in the first update of a rollout",
    ("completions/{mean,min,max,mean_terminated}_length", "completions/count"): (
        "length of the sampled answers in tokens, `mean_terminated` without those that were cut; their number"
    ),
    ("completions/clipped_ratio",): "share of answers cut at the length cap",
    ("answers/{mean_words,mean_categories,mean_unknown_words,mean_repeats}",): (
        "words, categories, words on no wheel, and words of a category named before, of an answer; watch them: answers "
        "can pad with words of one category at no cost"
    ),
    ("sampling/sampling_logp_difference/mean",): (
        "sampler against trainer: mean absolute difference of log-probabilities, in nats"
    ),
    ("loss", "loss/{slow,fast}"): (
        "in SFT, nats a token, over slow and fast targets. In RL the loss starts at 0 and says nothing about learning"
    ),
    ("grad_norm", "learning_rate"): "global norm of the gradient before clipping; the schedule's value",
    ("skipped_steps",): "updates left out so far because something was not finite",
    ("data/skipped",): "broken clips whose rows had weight zero",
    ("data/{silent_audio,mute_audio,cancelled_audio}",): (
        "clips without a sound track; tracks of silence; tracks whose channels cancel out"
    ),
    ("data/{audio_cut,audio_filled}",): (
        "clips whose sound was cut at the limit; seconds of silence filled in for gaps and late starts"
    ),
    ("data/decode_ms",): "milliseconds to decode a clip, mean",
    ("num_tokens", "perf/throughput"): "tokens so far; tokens per second",
    ("perf/{memory,peak_memory}_gib",): "GiB of the fullest device in use, and at its highest; where devices tell it",
    ("perf/mfu",): (
        "share of the devices' bf16 speed that the step's passes through the decoder's layers used, sampling included; "
        "for TPUs and GPUs of `training/device_metrics.py`"
    ),
    ("step_time", "timing_s/{gen,reward,reward_funcs,score,reference}"): (
        "seconds of the step, and of its parts; of `reference` those that the host's work did not hide"
    ),
    ("step", "phase", "time"): "optimizer steps done in the phase; `sft` or `rl`; seconds since 1970",
}


def patterns() -> tuple[str, ...]:
    """Every name with `{a,b}` written out and `<...>` left in."""
    return tuple(one for names in METRICS for name in names for one in _written_out(name))


def is_known(name: str) -> bool:
    """Whether a metric is in the reference."""
    return any(re.fullmatch(_expression(pattern), name) for pattern in patterns())


def _written_out(name: str) -> list[str]:
    parts = [part[1:-1].split(",") if part.startswith("{") else [part] for part in re.split(r"(\{[^}]*\})", name)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def _expression(pattern: str) -> str:
    return "".join(".+" if part.startswith("<") else re.escape(part) for part in re.split(r"(<[^>]*>)", pattern))
