"""On a CPU the whole 3B in bfloat16 is asked without a second copy of its weights: its programs, compiled, not run."""

import jax
import pytest

from mer_r1_jax.config.build import from_mapping, other_config
from mer_r1_jax.planning.programs import RunPrograms
from mer_r1_jax.training.backbone import compiler_options

GB = 10**9


def programs_of(preset: str, compute_dtype: str = "bfloat16") -> RunPrograms:
    config = other_config("omni_3b", __file__).get_config("h100:1")
    config.model.preset = preset
    config.model.param_dtype = config.model.compute_dtype = compute_dtype
    config.rl.prompts_per_step = config.sft.prompts_per_step = 1
    config.rl.num_generations = 2
    config.rl.max_completion_length = 16
    config.rl.decode_chunk = 0
    config.data.max_prompt_length = 512
    config.data.prompt_buckets = (512,)
    return RunPrograms(from_mapping(config), jax.devices()[:1])


@pytest.mark.timeout(1200)
def test_no_layer_of_a_large_model_is_kept_twice():
    planned = programs_of("3b")
    bucket = planned.buckets("rl")[-1]
    temporary = {
        program.name: program.trace().lower().compile().memory_analysis().temp_size_in_bytes
        for program in planned.rl(bucket)
        if program.name in ("encode", "sample", "score")
    }
    # Layers alone are 5.5 GB in bfloat16, and were 11 more in float32.
    assert temporary.keys() == {"encode", "sample", "score"}
    assert max(temporary.values()) < 1 * GB, temporary


@pytest.mark.parametrize(("preset", "compute_dtype"), [("tiny", "bfloat16"), ("3b", "float32")])
def test_what_is_small_or_computed_in_float32_is_left_to_the_compiler(preset, compute_dtype):
    assert compiler_options(programs_of(preset, compute_dtype).backbone) is None
