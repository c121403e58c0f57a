"""The recipe of the authors' earlier code, where the paper is silent, on Qwen2.5-Omni-7B.

What the paper says stays as in `omni_7b.py`. The rest is what the first author's earlier public code did, five months
before the paper, and may not be the paper's: batches, the loss's mean, warm-up, the rollout's filter, and four switches
that are off everywhere else (docs/method.md). Evaluations score as they always do.

`authors_recipe:v5p:2x2x4` names its slice; `rl.arm` chooses what is trained, the paper's method unless set.
"""

from mer_r1_jax.config.build import other_config

# Slice -> devices along mesh.tensor (eight prompts are shared by eight) and mesh.decode_tensor, and what the backward
# pass keeps.
SLICES = {"v5p:2x2x4": (2, 2, "dots")}


def get_config(slice_name: str = "v5p:2x2x4"):
    """The recipe, laid out for a slice."""
    if slice_name not in SLICES:
        raise ValueError(f"slice {slice_name!r}: expected one of {', '.join(SLICES)}, or set mesh.* yourself")
    omni_7b = other_config("omni_7b", __file__)
    config = omni_7b.recipe()
    config.name = "authors_recipe"
    config.model.preset = "7b"
    omni_7b.lay_out(config, 8, *SLICES[slice_name])
    config.sft.prompts_per_step = 32
    config.sft.optimizer.warmup_ratio = config.rl.optimizer.warmup_ratio = 0.0
    config.rl.loss_type = "grpo"
    config.rl.top_k = 50
    config.rl.unscorable = "format_only"
    config.rl.temper_logprobs = False
    config.rl.wheels_without_truth = "zero"
    config.rl.untagged_answer = "split"
    config.rl.format_reward = "lenient"
    return config
