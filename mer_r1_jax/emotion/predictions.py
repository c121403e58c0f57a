"""Scoring a file of predictions: one JSON object a line with `id`, `prediction` and `truth`."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from mer_r1_jax.emotion import answer_form, official_scores
from mer_r1_jax.emotion.wheels import Wheels
from mer_r1_jax.foreign_text import printable
from mer_r1_jax.json_lines import Fault, JsonLineError, cut, parse_value, unfit_values
from mer_r1_jax.row_files import numbered_rows

METRICS = ("set_f1", "hit", "waf")
_MOST_SHOWN = 20  # mistakes listed in one error


class PredictionError(ValueError):
    """A predictions file that cannot be scored; the message lists file, line, what was got and what was expected."""


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The columns of a predictions file. Words are as the official splitter gives them; waf has a word and a number.

    Rows that failed are in no column and no score.
    """

    ids: list[str]
    predictions: list[Any]
    truths: list[Any]
    n_failed: int = 0  # rows that say why a clip could not be asked (`mer-r1 infer`)


def read_predictions(path: str | pathlib.Path, metric: str, *, clean_up: bool = False) -> Predictions:
    """Reads a predictions file.

    Args:
        path: records, one a line or row; `prediction` and `truth` are text or a list of words for set_f1; for hit
            `truth` is one word; for waf `truth` is a number and `prediction` a sentiment word. null stands for no
            words.
        metric: set_f1 | hit | waf.
        clean_up: predictions are an extractor LLM's raw text, to be cleaned as the official pipeline does.

    Raises:
        PredictionError: unknown metric, missing or empty file, one that cannot be read, lines that are not
            as described, an id twice.
    """
    _require_metric(metric)
    path = pathlib.Path(path)
    if not path.is_file():
        raise PredictionError(f"{path}: no such file; expected records with id, prediction and truth")
    read_prediction, read_truth = _READERS[metric]
    columns, mistakes, seen, failed = Predictions([], [], []), [], {}, 0
    faults: list[Fault] = []
    for number, line in numbered_rows(path, faults):
        try:
            if _could_not_be_asked(line):
                failed += 1
                continue
            record = _record(line)
            name = str(record["id"])
            if name in seen:
                raise ValueError(f"id {name!r} is on line {seen[name]} already; every sample is scored once")
            prediction = record["prediction"]
            if clean_up and isinstance(prediction, str):
                prediction = answer_form.clean_extractor_text(prediction)
            row = read_prediction(prediction), read_truth(record["truth"])
        except (ValueError, TypeError) as error:
            mistakes.append(f"{path}:{number}: {printable(error)}")
            continue
        seen[name] = number
        columns.ids.append(name)
        columns.predictions.append(row[0])
        columns.truths.append(row[1])
    mistakes.extend(f"{path}:{fault.line}: {fault}" if fault.line else f"{path}: {fault}" for fault in faults)
    if mistakes:
        raise PredictionError(_listed(mistakes))
    if not columns.ids:
        raise PredictionError(f"{path}: no predictions; expected records with id, prediction and truth")
    return dataclasses.replace(columns, n_failed=failed)


def paired(predictions: Mapping[str, Any], truths: Mapping[str, Any], metric: str) -> Predictions:
    """The columns of predictions and truths that lie in memory, each by id; cells are those of `read_predictions`.

    Raises:
        PredictionError: unknown metric, no predictions, ids without a partner, cells that cannot be read.
    """
    _require_metric(metric)
    read_prediction, read_truth = _READERS[metric]
    columns, mistakes = Predictions([], [], []), []
    for name in [*predictions, *(name for name in truths if name not in predictions)]:
        if name not in predictions or name not in truths:
            lacking = "prediction" if name not in predictions else "truth"
            mistakes.append(f"{printable(name)}: no {lacking}; expected one of each for every id, None for no words")
            continue
        try:
            row = read_prediction(predictions[name]), read_truth(truths[name])
        except (ValueError, TypeError) as error:
            mistakes.append(f"{printable(name)}: {printable(error)}")
            continue
        columns.ids.append(str(name))
        columns.predictions.append(row[0])
        columns.truths.append(row[1])
    if mistakes:
        raise PredictionError(_listed(mistakes))
    if not columns.ids:
        raise PredictionError("no predictions; expected at least one id with a prediction and a truth")
    return columns


def score_predictions(columns: Predictions, metric: str, wheels: Wheels) -> dict[str, Any]:
    """Scores what `read_predictions` gave, as a JSON-ready dict; NaN becomes None.

    Returns:
        score, precision, recall, per_wheel (a list of dicts), n, n_scored, and n_unknown_words with unknown_words: how
        often each predicted word that has no category on any wheel occurs (waf: each word that is no sentiment).
    """
    if metric == "waf":
        score = official_scores.waf(columns.predictions, columns.truths)
        unknown = collections.Counter(word for word in columns.predictions if word not in official_scores.SENTIMENTS)
    else:
        scorer = official_scores.set_f1 if metric == "set_f1" else official_scores.hit
        score = scorer(columns.predictions, columns.truths, wheels)
        lowered = (answer_form.distinct_words(words) for words in columns.predictions)
        unknown = collections.Counter(word for words in lowered for word in words if not wheels.is_known(word))
    result = {
        "metric": metric,
        "variant": wheels.variant,
        "score": score.score,
        "precision": score.precision,
        "recall": score.recall,
        "per_wheel": [
            {"wheel": name, **{key: _number(value) for key, value in dataclasses.asdict(wheel).items()}}
            for name, wheel in zip(wheels.names, score.per_wheel, strict=False)
        ],
        "n": score.n,
        "n_scored": score.n_scored,
        "n_failed": columns.n_failed,
        "n_unknown_words": sum(unknown.values()),
        "unknown_words": dict(unknown.most_common()),
    }
    if metric == "waf":
        result["accuracy"] = score.accuracy
    return {key: _number(value) for key, value in result.items()}


def _require_metric(metric: str) -> None:
    if metric not in METRICS:
        raise PredictionError(f"unknown metric {metric!r}: expected one of {', '.join(METRICS)}")


def _listed(mistakes: list[str]) -> str:
    """The first mistakes, one a line, and how many more there are."""
    more = len(mistakes) - _MOST_SHOWN
    return "\n".join(mistakes[:_MOST_SHOWN] + [f"... and {more} more"] * (more > 0))


def _could_not_be_asked(line: str) -> bool:
    """Whether a row is one of `mer-r1 infer` that says why there is no answer."""
    try:
        row = parse_value(line, nan=True)
    except JsonLineError:
        return False
    return isinstance(row, dict) and "failed" in row and "prediction" not in row


def _record(line: str) -> dict:
    try:
        record = parse_value(line, nan=True)
    except JsonLineError as error:
        expected = "an object with id, prediction and truth on one line"
        raise ValueError(f"not JSON: got {error.fault.got}; expected {expected}") from error
    if not isinstance(record, dict):
        raise ValueError(f"got a {type(record).__name__}; expected an object with id, prediction and truth")
    for fault in unfit_values(record):
        raise ValueError(str(fault))
    missing = [name for name in ("id", "prediction", "truth") if name not in record]
    if missing:
        raise ValueError(f"no {', '.join(missing)}; found {printable(', '.join(record), 200) or 'nothing'}")
    return record


def _words(cell: Any) -> list[str]:
    return answer_form.split_words(cell)


def _label(cell: Any) -> str:
    if not isinstance(cell, str):
        raise TypeError(f"truth is {cut(cell)}; expected one emotion word for hit")
    return cell


def _sentiment(cell: Any) -> str:
    if cell is None:
        return ""
    if not isinstance(cell, str):
        raise TypeError(f"prediction is {cut(cell)}; expected positive, negative or neutral for waf")
    return cell


def _real(cell: Any) -> float:
    if isinstance(cell, bool) or not isinstance(cell, (int, float)) or not math.isfinite(cell):
        raise TypeError(f"truth is {cut(cell)}; expected a finite number for waf")
    return float(cell)


def _number(value: Any) -> Any:
    return None if isinstance(value, float) and math.isnan(value) else value


_READERS: dict[str, tuple[Callable, Callable]] = {
    "set_f1": (_words, _words),
    "hit": (_words, _label),
    "waf": (_sentiment, _real),
}
