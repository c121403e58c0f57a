"""What a configuration may hold: the bounds of each field's type, and rules about several fields together."""

from __future__ import annotations

from typing import Any

from mer_r1_jax.config.bounds import PlaceText, all_fields, bounds_of, problem_with
from mer_r1_jax.config.schema import RunConfig

_PLACES = {
    name: bound
    for name, hint, _ in all_fields(RunConfig())
    for bound in bounds_of(hint)
    if isinstance(bound, PlaceText)
}
# Fields that name places on the machine a run is made on, and those of them that must be on a disk of the host.
PATHS = tuple(_PLACES)
ON_DISK = tuple(name for name, place in _PLACES.items() if not place.bucket)


def lookup(config: Any, dotted: str) -> Any:
    """The value of a dotted field name."""
    for name in dotted.split("."):
        config = getattr(config, name)
    return config


def check_values(config: RunConfig) -> list[str]:
    """Every impossible value of a configuration, as one line each; an empty list means it can be used."""
    # Fields are held against each other only where each of them makes sense by itself.
    return out_of_bounds(config, RunConfig()) or [
        *_check_batches(config),
        *_check_adapters(config),
        *_check_rewards(config),
        *_check_media(config),
    ]


def out_of_bounds(section: Any, defaults: Any) -> list[str]:
    """A line for every field whose value its type does not allow, sections within included."""
    known = {name: value for name, _, value in all_fields(defaults)}
    return [
        f"{name}: {wrong} (left out, it is {known[name]!r})"
        for name, hint, value in all_fields(section)
        if (wrong := problem_with(hint, value))
    ]


def _check_batches(config: RunConfig) -> list[str]:
    problems = []
    for phase in ("sft", "rl"):
        section = getattr(config, phase)
        prompts, parts = section.prompts_per_step, section.gradient_accumulation_steps
        if parts >= 1 and prompts % parts:
            problems.append(
                f"{phase}.prompts_per_step: got {prompts}, which {phase}.gradient_accumulation_steps={parts} does not "
                f"divide; try {prompts // parts * parts or parts} or {(prompts // parts + 1) * parts}"
            )
    axes = (config.mesh.data, config.mesh.fsdp, config.mesh.tensor)
    if sum(size == -1 for size in axes) > 1:
        problems.append(f"mesh: got data, fsdp, tensor = {axes}, expected positive sizes with at most one -1")
    return problems


def _check_adapters(config: RunConfig) -> list[str]:
    lora, problems = config.model.lora, []
    if config.model.adapter_path and not lora.rank:
        problems.append(
            f"model.adapter_path: got {config.model.adapter_path!r} with model.lora.rank=0, expected the rank of that "
            "folder (r in its adapter_config.json); set model.lora.rank, or leave the path out"
        )
    if lora.rank and config.rl.sync_ref_model:
        problems.append(
            "rl.sync_ref_model: got True with model.lora.rank above 0, expected False: a mix of two adapters' matrices "
            "is not the mix of the two models; leave one of them out"
        )
    return problems


def _check_rewards(config: RunConfig) -> list[str]:
    rl, problems = config.rl, []
    if rl.delta and rl.delta <= 1 + rl.epsilon_high:
        problems.append(
            f"rl.delta: got {rl.delta}, expected 0 (off) or more than 1 + rl.epsilon_high = {1 + rl.epsilon_high:g}"
        )
    if rl.sync_ref_model and not rl.beta:
        problems.append(
            "rl.sync_ref_model: got True with rl.beta=0, expected a weight above 0: without a KL term there is no "
            "reference to mix the policy into; leave it out, or set rl.beta"
        )
    low, high, mode = rl.sampler_correction_min, rl.sampler_correction_max, rl.sampler_correction
    if high and low >= high:
        problems.append(
            f"rl.sampler_correction_min: got {low:g}, expected less than rl.sampler_correction_max={high:g}, or 0 for "
            "no lower bound"
        )
    if mode != "none" and not (low or high):
        problems.append(
            f"rl.sampler_correction: got {mode!r} without a bound, expected rl.sampler_correction_max or _min above 0 "
            "(3 is TRL's upper one): a ratio without any can grow without limit"
        )
    if mode != "none" and not rl.temper_logprobs:
        problems.append(
            f"rl.sampler_correction: got {mode!r} with rl.temper_logprobs=False, expected tempered log-probabilities: "
            "the ratio would correct for the temperature; leave one of them out"
        )
    for path in rl.reward_funcs:
        if path.count(".") < 1 or not all(part.isidentifier() for part in path.split(".")):
            problems.append(
                f"rl.reward_funcs: got {path!r}, expected package.module.function; several are written "
                "\"('a.b.one', 'a.b.two')\""
            )
    if len(set(rl.reward_funcs)) < len(rl.reward_funcs):
        problems.append(f"rl.reward_funcs: got {rl.reward_funcs}, expected each function once")
    if rl.reward_weights and len(rl.reward_weights) != len(rl.reward_funcs):
        problems.append(
            f"rl.reward_weights: got {len(rl.reward_weights)} for {len(rl.reward_funcs)} rl.reward_funcs, expected one "
            "for each, or none for 1 each; the method's own rewards are weighed by calibration_weight and format_weight"
        )
    return problems


def _check_media(config: RunConfig) -> list[str]:
    media, problems = config.media, []
    if media.min_frames > media.max_frames:
        problems.append(f"media.min_frames: got {media.min_frames}, expected at most max_frames={media.max_frames}")
    for kind in ("video", "image"):
        low, high = getattr(media, f"{kind}_min_pixels"), getattr(media, f"{kind}_max_pixels")
        if low > high:
            problems.append(f"media.{kind}_min_pixels: got {low}, expected 1..{kind}_max_pixels={high}")
    buckets, cap = config.data.prompt_buckets, config.data.max_prompt_length
    if buckets and (list(buckets) != sorted(set(buckets)) or buckets[-1] != cap):
        problems.append(
            f"data.prompt_buckets: got {buckets}, expected ascending lengths that end with data.max_prompt_length={cap}"
        )
    return problems
