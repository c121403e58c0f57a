"""Scores predictions as MER-UniBench does.

    mer-r1 score --predictions=FILE.jsonl --metric=set_f1|hit|waf [--wheel_dir=DIR] --out=FILE.json

A line is {"id", "prediction", "truth"}: text or lists of words for set_f1; one word as truth for hit; a number as truth
and a sentiment word as prediction for waf. Published numbers need the official wheel folder (--wheel_dir).
"""

import pathlib

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained
from mer_r1_jax.emotion import predictions
from mer_r1_jax.emotion.wheels import VARIANTS, load_wheels
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing

_PREDICTIONS = flags.DEFINE_string("predictions", None, "JSON lines to score.", required=True)
_METRIC = flags.DEFINE_enum("metric", None, list(predictions.METRICS), "Which score.", required=True)
_WHEELS = flags.DEFINE_string("wheel_dir", "", "Folder with emotion wheels; empty = the ones shipped.")
_VARIANT = flags.DEFINE_enum("variant", "unibench", list(VARIANTS), "Word forms and the treatment of an undefined F.")
_CLEAN = flags.DEFINE_bool("clean_up", False, "Predictions are an extractor LLM's raw text; clean it officially.")
_OUT = flags.DEFINE_string("out", None, "Where to write the scores as JSON.", required=True)


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --metric=set_f1")
    with explained():
        wheels = load_wheels(_WHEELS.value, _VARIANT.value)
        columns = predictions.read_predictions(_PREDICTIONS.value, _METRIC.value, clean_up=_CLEAN.value)
        result = predictions.score_predictions(columns, _METRIC.value, wheels)
        result["wheels"] = _WHEELS.value or "shipped"
        out = pathlib.Path(_OUT.value)
        with writing("the scores", out):
            out.parent.mkdir(parents=True, exist_ok=True)
            atomic_files.write_json(out, result)
    shown = "undefined" if result["score"] is None else f"{result['score']:.4f}"
    failed = f" ({result['n_failed']} more could not be asked)" if result["n_failed"] else ""
    screen.say(
        f"{result['metric']} {shown} over {result['n_scored']} of {result['n']} samples{failed}, "
        f"{result['n_unknown_words']} unknown words, {result['wheels']} wheels ({result['variant']}): {out}"
    )
    return 0
