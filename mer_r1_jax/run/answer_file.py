"""Answers to all records of a file, kept as they come: `mer-r1 infer --data=FILE --out=FILE`.

Beside what is written at the end lies a log, `<name>.answers.jsonl`, to which every batch is added. A command that was
stopped goes on from it, and it refuses answers of another model, of other settings or to other records.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from mer_r1_jax.data.records import Record, dataset_hash
from mer_r1_jax.emotion.answer_form import AUTO, Answer
from mer_r1_jax.evaluation.gate import Auto, confidence_of, is_sure, reason
from mer_r1_jax.evaluation.result_log import FAILED, LogForm, ResultLog
from mer_r1_jax.foreign_text import printable, would_run_in_a_spreadsheet
from mer_r1_jax.run.asking import Policy, answer_fingerprint, ask, eval_buckets, eval_length, make_answerer
from mer_r1_jax.run.inference import Reader
from mer_r1_jax.storage import atomic_files
from mer_r1_jax.storage.atomic_files import writing
from mer_r1_jax.training.stopping import NEVER, Stop

ENDINGS = (".jsonl", ".csv")
CSV_COLUMNS = ("name", "openset")  # of MER2025's files, where a list is written as Python writes it
_NOT_WRITTEN = ("record",)  # columns of the log alone


class AnswerFileError(ValueError):
    """A file that answers cannot be written to, or gone on with; the message says why."""


FORM = LogForm(key=("id", "mode"), lines="answers", error=AnswerFileError, last_counts=True)


@dataclasses.dataclass(frozen=True)
class AnswerCounts:
    """What became of the records.

    Attributes:
        answered: answers in the file, over all modes.
        wordless: those of them without an emotion word.
        gated: those that were taken by `Auto`, by mode.
        failed: id -> why it could not be asked.
    """

    answered: int
    wordless: int
    failed: Mapping[str, str]
    gated: Mapping[str, int] = dataclasses.field(default_factory=dict)


def log_of(out: str | pathlib.Path) -> pathlib.Path:
    """The log beside a file of answers; one of each ending share it."""
    out = pathlib.Path(out)
    return out.with_name(f"{out.stem}.answers.jsonl")


def check_out(out: str | pathlib.Path, modes: Sequence[str | Auto]) -> None:
    """Refuses, before a model is loaded, a file that cannot hold the answers or that somebody else wrote.

    Raises:
        AnswerFileError: naming it.
    """
    out = pathlib.Path(out)
    if out.suffix not in ENDINGS:
        raise AnswerFileError(
            f"--out: got {str(out)!r}, expected a name that ends in {' or '.join(ENDINGS)}; rename it"
        )
    if out.suffix == ".csv" and len(modes) > 1:
        raise AnswerFileError("--mode: got both, expected slow or fast: the CSV has one answer to a clip; choose one")
    if out.exists() and not log_of(out).is_file():
        raise AnswerFileError(
            f"--out: got {str(out)!r}, which is there without {log_of(out).name}, so nothing says which model wrote "
            "it; expected a new file or one of this command; choose another name, or remove it"
        )


def answer_records(
    policy: Policy,
    wanted: Sequence[tuple[Record, str | Auto]],
    out: str | pathlib.Path,
    *,
    media_root: str = "",
    stop: Stop = NEVER,
    progress: Callable[[int, int], None] = lambda *_: None,
) -> AnswerCounts:
    """Asks every record that has no answer yet, and writes the file.

    Args:
        policy: the model.
        wanted: records, each with slow, fast or `Auto`; one that is asked in several ways comes as often. What `Auto`
            needs is kept as the fast and slow answers that it is, so that another threshold asks none of them again.
        out: the file, which `check_out` has let pass.
        media_root: folder the records' paths are relative to; "" means each record's own file's folder.
        stop: asked between batches and inside them; raises StopRequested, and the log keeps every answer so far.
        progress: called with (answers there, answers in all).

    Raises:
        AnswerFileError: the log is another model's, of other settings or of other records; no record can be asked.
    """
    out = pathlib.Path(out)
    records = list({record.id: record for record, _ in wanted}.values())
    if out.suffix == ".csv":
        _check_names(records)
    with ResultLog(log_of(out), FORM, answer_fingerprint(policy, "infer")) as log:
        digests = {record.id: dataset_hash([record]) for record in records}
        _check_records(log, digests)
        reader, tried = None, set()
        # There are two rounds: which slow answers `Auto` takes is known when the fast ones are in the log.
        for needed in (_at_first, _of_the_unsure):
            keys = needed(log, wanted)
            # What could not be asked a moment ago is tried again by the next command.
            lacking = [
                (record, mode)
                for record, mode in keys
                if not log.done((record.id, mode)) and (record.id, mode) not in tried
            ]
            tried |= {(record.id, mode) for record, mode in lacking}
            progress(_done(log, keys), len(keys))
            if lacking and reader is None:
                # Shapes are those of all records: what is asked again after a stop is computed as it would have been.
                reader = _reader(policy, records)
            for lines in _asked(policy, reader, media_root, lacking, stop) if lacking and reader else ():
                log.append(line | {"record": digests[line["id"]]} for line in lines)
                progress(_done(log, keys), len(keys))
        rows = [_row(log, record.id, mode) for record, mode in wanted]
    failed = {row["id"]: row[FAILED] for row in rows if FAILED in row}
    answered = [row for row in rows if FAILED not in row]
    if not answered:
        raise AnswerFileError(
            f"none of the {len(records)} records can be asked, the first for: {next(iter(failed.values()))}; look at "
            "them with `mer-r1 validate`"
        )
    # It is written anew, whole, at the end of every command: what a command goes on from is the log.
    with writing("the answers", out):
        atomic_files.write_text(out, as_csv(rows) if out.suffix == ".csv" else as_json_lines(rows))
    gated = collections.Counter(row["mode"] for row in answered if "why" in row)
    return AnswerCounts(len(answered), sum(not row["prediction"] for row in answered), failed, gated)


def _at_first(log: ResultLog, wanted: Sequence[tuple[Record, str | Auto]]) -> list[tuple[Record, str]]:
    """What is asked whatever comes of it: the modes that are named, and the fast answer of every `Auto`."""
    keys = [(record, "fast" if isinstance(mode, Auto) else mode) for record, mode in wanted]
    return list({(record.id, mode): (record, mode) for record, mode in keys}.values())


def _of_the_unsure(log: ResultLog, wanted: Sequence[tuple[Record, str | Auto]]) -> list[tuple[Record, str]]:
    """The same with the slow answers that `Auto` takes, once the fast ones are there."""
    slow = [
        (record, "slow")
        for record, mode in wanted
        if isinstance(mode, Auto) and log.done((record.id, "fast")) and not _stands(log.rows[record.id, "fast"], mode)
    ]
    keys = [*_at_first(log, wanted), *slow]
    return list({(record.id, mode): (record, mode) for record, mode in keys}.values())


def _stands(fast: Mapping[str, Any], auto: Auto) -> bool:
    return is_sure(confidence_of(fast["confidences"]), auto.threshold)


def _row(log: ResultLog, name: str, mode: str | Auto) -> dict[str, Any]:
    """The line of the file; of a gated answer its `mode` is the one that was taken, and `why` says why."""
    if not isinstance(mode, Auto):
        return log.rows[name, mode]
    fast = log.rows[name, "fast"]
    if FAILED in fast:
        return fast | {"mode": AUTO}
    why = reason(confidence_of(fast["confidences"]), mode.threshold)
    taken = fast if _stands(fast, mode) else log.rows[name, "slow"]
    return taken | {"why": why}


def _reader(policy: Policy, records: Sequence[Record]) -> Reader:
    setup = policy.setup
    answerer = make_answerer(setup, eval_length(setup.config))
    return Reader(answerer, eval_buckets(setup, tuple(records)), setup.wheels)


def _asked(
    policy: Policy, reader: Reader, media_root: str, lacking: Sequence[tuple[Record, str]], stop: Stop
) -> Iterator[list[dict[str, Any]]]:
    """The lines of each batch."""
    for replies in ask(policy, reader, media_root, lacking, stop):
        lines = []
        for reply in replies:
            outcome: Any = reply.outcome
            if isinstance(outcome, Exception):
                lines.append({"id": reply.record.id, "mode": reply.mode, FAILED: str(outcome)})
            else:
                lines.append(answer_row(reply.record, outcome))
        yield lines


def answer_row(record: Record, answer: Answer) -> dict[str, Any]:
    """An answer as a line of the file; with a `solution` it is one that `mer-r1 score` reads."""
    truth = {"truth": list(record.solution)} if record.solution else {}
    return {
        "id": record.id,
        "mode": answer.mode,
        "prediction": list(answer.words),
        **truth,
        "reasoning": answer.reasoning,
        "categories": {word: list(answer.categories[word]) for word in answer.words},
        "confidences": {word: answer.probabilities.get(word) for word in answer.words},
        "truncated": answer.truncated,
        "text": answer.text,
    }


def as_json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """The lines of a file of answers."""
    kept = ({name: value for name, value in row.items() if name not in _NOT_WRITTEN} for row in rows)
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)


def as_csv(rows: Iterable[Mapping[str, Any]]) -> str:
    """The challenge's table. A clip without an answer has an empty list: its row must be there."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    writer.writerows([row["id"], str(row.get("prediction", []))] for row in rows)
    return text.getvalue()


def _check_names(records: Sequence[Record]) -> None:
    """Refuses ids that a spreadsheet would run, before any of them is asked."""
    for record in records:
        if would_run_in_a_spreadsheet(record.id):
            raise AnswerFileError(
                f"{record.where}: id: got {printable(record.id, 80)}, which a spreadsheet would run; expected a name "
                "for the CSV; rename it, or write .jsonl"
            )


def _done(log: ResultLog, wanted: Iterable[tuple[Record, str]]) -> int:
    return sum(log.done((record.id, mode)) for record, mode in wanted)


def _check_records(log: ResultLog, digests: Mapping[str, str]) -> None:
    """Refuses to go on where a record is not what it was when it was answered."""
    # An answer to a record that the data no longer have stays in the log, and is in no row of the file.
    changed = [row["id"] for row in log.rows.values() if digests.get(row["id"], row["record"]) != row["record"]]
    if changed:
        raise AnswerFileError(
            f"{log.path}: got {len(set(changed))} answers to other questions, subtitles, files or labels than the data "
            f"has now, such as that of {changed[0]!r}; expected the records that were answered; choose another --out, "
            "or use the earlier data"
        )
