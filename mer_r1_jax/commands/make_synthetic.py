"""Makes the synthetic data set: mer-r1 make-synthetic --out=synthetic_data [--seed=1 ...]

Writes sft.jsonl, rl.jsonl, eval.jsonl, mp4 clips, the tokenizer and the ceiling's scores. Safe to repeat: what is there
already is kept.
"""

import json

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained

_OUT = flags.DEFINE_string("out", "synthetic_data", "Folder of the data set.")
_SFT = flags.DEFINE_integer("sft_clips", 4000, "Clips for supervised fine-tuning.", lower_bound=0)
_RL = flags.DEFINE_integer("rl_clips", 2000, "Clips for reinforcement learning.", lower_bound=0)
_EVAL = flags.DEFINE_integer("eval_clips", 320, "Held-out clips.", lower_bound=0)
_WORLD = flags.DEFINE_string("world", "", "Which world: U, O, even or concluding (docs/lab.md); empty = U.")
_SEED = flags.DEFINE_integer("seed", 0, "Every random choice follows from it.", 0, (1 << 31) - 1)
_WORKERS = flags.DEFINE_integer("workers", 2, "Processes that draw and encode.", lower_bound=0)
_WHEELS = flags.DEFINE_string("wheel_dir", "", "Folder with emotion wheels; empty = the ones shipped.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --sft_clips=4000")
    from mer_r1_jax.data.synthetic.make import WorldSettings, make_world
    from mer_r1_jax.data.synthetic.world import DEFAULT, WORLDS

    name = _WORLD.value or DEFAULT
    if name not in WORLDS:
        raise app.UsageError(f"--world: got {_WORLD.value!r}, expected one of {', '.join(WORLDS)}")

    with screen.bar(unit="clip", desc="synthetic clips") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        with explained():
            paths = make_world(
                _OUT.value,
                WorldSettings(
                    sft_clips=_SFT.value,
                    rl_clips=_RL.value,
                    eval_clips=_EVAL.value,
                    seed=_SEED.value,
                    config=WORLDS[name],
                    wheel_dir=_WHEELS.value,
                ),
                workers=_WORKERS.value,
                progress=progress,
            )
    for name, scores in json.loads(paths.oracle.read_text()).items():
        screen.say(
            f"{name:10} precision {scores['precision']:.3f}  recall {scores['recall']:.3f}  F1 {scores['f1']:.3f}"
        )
    screen.say(paths.sft, paths.rl, paths.eval, paths.tokenizer, sep="\n")
    return 0
