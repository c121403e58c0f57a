"""Draws docs/clip.svg: a held-out clip of the synthetic world, and what a trained model really answered about it.

    python experiments/clip_figure.py --model=runs/synthetic [--data=synthetic_data/eval.jsonl --clip=0] [--note=...]

The clip is taken by its number in the file, the first one unless --clip says otherwise. --note goes below the picture
and says what the model has been through.
"""

import json
import pathlib
import sys
import textwrap
from typing import Any

import av
import matplotlib
import numpy as np
from absl import app, flags
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

import mer_r1_jax
from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.storage import atomic_files

_MODEL = flags.DEFINE_string("model", None, "A run's folder, or its export.", required=True)
_DATA = flags.DEFINE_string("data", "synthetic_data/eval.jsonl", "Records of held-out clips.")
_CLIP = flags.DEFINE_integer("clip", 0, "Which of them, counted from 0.", lower_bound=0)
_NOTE = flags.DEFINE_string("note", "", "What the model has been through.")
_OUT = flags.DEFINE_string("out", "docs/clip.svg", "Where the picture goes.")

FRAMES = 4
INK, MUTED, SAID, VOICE = "#0f172a", "#64748b", "#1d4ed8", "#7c3aed"
STYLE: Any = {"svg.fonttype": "path", "svg.hashsalt": "clip", "font.size": 9}
WRAP = 70  # characters of a line of text
POINTS = 400  # of the drawn voice


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --model=runs/synthetic")
    data = pathlib.Path(_DATA.value)
    record = json.loads(data.read_text(encoding="utf-8").splitlines()[_CLIP.value])
    clip = data.parent / record["videos"][0]
    with explained():
        with mer_r1_jax.load(_MODEL.value) as model:
            ask = {"video": clip, "subtitle": record["subtitle"], "question": record["question"]}
            answers = [model.answer(**ask, mode=mode) for mode in ("slow", "fast")]
        with matplotlib.rc_context(STYLE):
            figure = picture(clip, record, answers)
            draw = FigureCanvasSVG(figure).print_svg
            atomic_files.write_atomically(pathlib.Path(_OUT.value), lambda file: draw(file, metadata={"Date": None}))
    for answer in answers:
        screen.say(f"{answer.mode}: {answer.text}")
    screen.say(_OUT.value)
    return 0


def picture(clip: pathlib.Path, record: dict, answers: list[mer_r1_jax.Answer]) -> Figure:
    """Frames and voice on the left, subtitle, reasoning and answers on the right."""
    frames, wave = _decoded(clip)
    figure = Figure(figsize=(9.6, 2.75), facecolor="white")
    for place in range(FRAMES):
        axes = figure.add_axes((0.012 + 0.102 * place, 0.42, 0.098, 0.46))
        axes.imshow(frames[round(place * (len(frames) - 1) / (FRAMES - 1))], interpolation="nearest")
        axes.axis("off")
    axes = figure.add_axes((0.012, 0.15, 0.404, 0.2))
    loudest = np.abs(wave[: len(wave) // POINTS * POINTS].reshape(POINTS, -1)).max(-1)
    axes.fill_between(range(POINTS), -loudest, loudest, color=VOICE, linewidth=0)
    axes.axis("off")
    figure.text(0.012, 0.93, f"held-out clip {record['id']}: frames and voice", color=MUTED, va="center")
    truth = ", ".join(record["solution"])
    figure.text(0.012, 0.06, f"its label: {truth}", color=MUTED, va="center")
    line = 0.93
    for title, text, color in _lines(record, answers):
        wrapped = textwrap.wrap(text, WRAP)
        figure.text(0.44, line, title, color=MUTED, va="center")
        for part in wrapped:
            figure.text(0.52, line, part, color=color, va="center")
            line -= 0.085
        line -= 0.035
    figure.text(0.99, 0.06, _NOTE.value, color=MUTED, va="center", ha="right", size=7.5)
    return figure


def _lines(record: dict, answers: list[mer_r1_jax.Answer]) -> list[tuple[str, str, str]]:
    """(title, text, colour) of everything that is said."""
    lines = [("subtitle", f"“{record['subtitle']}”", INK), ("reasoning", answers[0].reasoning or "none", INK)]
    for answer in answers:
        said = ", ".join(f"{word} {answer.probabilities.get(word, float('nan')):.2f}" for word in answer.words)
        lines.append((answer.mode, said or f"no answer; it wrote {answer.text!r}", SAID))
    return lines


def _decoded(clip: pathlib.Path) -> tuple[list[np.ndarray], np.ndarray]:
    """RGB frames uint8 [H, W, 3] and mono sound float32 [samples]."""
    with av.open(str(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    with av.open(str(clip)) as container:
        sound = [frame.to_ndarray().mean(0) for frame in container.decode(audio=0)]
    return frames, np.concatenate(sound).astype(np.float32)


if __name__ == "__main__":
    sys.exit(app.run(main))
