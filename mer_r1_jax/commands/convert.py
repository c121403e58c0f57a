"""Data files from a set of clips: mer-r1 convert --from=mer2025 --root=DIR --out=DIR --sft=5000 [--eval=N --seed=S]

    mer-r1 convert --from=table --data=FILE --root=DIR --out=DIR --video=COL --label=COL [--text=COL --label_map=FILE]

Writes sft.jsonl, rl.jsonl and eval.jsonl (of MER2025 also test.jsonl and candidates.jsonl), divided by a seed, and
counts.json: what was left out and why. Paths are relative to --root, which is the data.media_root of a run.
docs/converting.md says which layouts are read.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mer_r1_jax.data.conversion import Account, Draft

_FROM = flags.DEFINE_enum("from", "mer2025", ("mer2025", "table"), "what the set is")
_ROOT = flags.DEFINE_string("root", None, "folder of the set, below which its clips lie", required=True)
_OUT = flags.DEFINE_string("out", None, "folder of the data files", required=True)
_SFT = flags.DEFINE_integer("sft", 0, "clips for SFT, of those with a reasoning; the paper has 5000", lower_bound=0)
_EVAL = flags.DEFINE_integer("eval", 0, "clips held out for evaluation, drawn before those for SFT", lower_bound=0)
_SEED = flags.DEFINE_integer("seed", 0, "of the division", lower_bound=0)
_LANGUAGE = flags.DEFINE_enum("language", "english", ("english", "chinese", "none"), "mer2025: of the subtitles")
_DATA = flags.DEFINE_string("data", "", "table: the file of labels, of any kind that is read")
_ID = flags.DEFINE_string("id", "", "table: column of unique names; empty = the path of the clip")
_VIDEO = flags.DEFINE_string("video", "", "table: column of the clips")
_AUDIO = flags.DEFINE_string("audio", "", "table: column of sound files; empty = the clips' own sound")
_VIDEO_PATH = flags.DEFINE_string("video_path", "{}", "table: path of a clip, {} what stands in the column")
_AUDIO_PATH = flags.DEFINE_string("audio_path", "{}", "table: path of a sound file, likewise")
_LABEL = flags.DEFINE_string("label", "", "table: column of the emotions: words, or keys of --label_map")
_LABEL_MAP = flags.DEFINE_string(
    "label_map", "", "table: JSON object, or table of label and word, for labels not words"
)
_TEXT = flags.DEFINE_string("text", "", "table: column of what is said")
_REASONING = flags.DEFINE_string("reasoning", "", "table: column of how the emotions show")
_CHAT = flags.DEFINE_string("chat", "", "table: column of turns; without --label the last one is the label")
_REASONS_SHOWN = 12  # on the screen; counts.json has all


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; settings look like --from=table")
    from mer_r1_jax.data.conversion import ACCOUNT, Account, Division, convert

    with explained():
        account = Account()
        division = Division(sft=_SFT.value, held_out=_EVAL.value, seed=_SEED.value)
        written = convert(_drafts(account), account, division, _ROOT.value, _OUT.value)
    for file, records in written.items():
        screen.say(f"{_OUT.value}/{file}: {records} records")
    for title, reasons in (("left out", account.left_out), ("to know", account.noticed)):
        most = sorted(reasons.items(), key=lambda reason: -len(reason[1]))
        for reason, names in most[:_REASONS_SHOWN]:
            screen.say(f"{title}: {len(names)}, such as {names[0]}: {reason}")
        if len(most) > _REASONS_SHOWN:
            screen.say(f"{title}: {len(most) - _REASONS_SHOWN} reasons more, in {_OUT.value}/{ACCOUNT}")
    if not account.left_out:
        screen.say("left out: nothing")
    files = ",".join(f"{_OUT.value}/{file}" for file in written)
    screen.say(f"next: mer-r1 validate --data={files} --media_root={_ROOT.value}")
    return 0


def _drafts(account: Account) -> Iterator[Draft]:
    from mer_r1_jax.data.conversion import ConversionError
    from mer_r1_jax.data.labelled_table import TableColumns, read_label_map, read_labelled_table
    from mer_r1_jax.data.mer2025 import read_mer2025

    of_a_table = [name for name in _TABLE_FLAGS if flags.FLAGS[name].present]
    if _FROM.value == "mer2025":
        if of_a_table:
            raise ConversionError(
                f"got --{of_a_table[0]}, expected it with --from=table alone; drop it, or say --from=table"
            )
        return read_mer2025(_ROOT.value, account, _LANGUAGE.value)
    if not _DATA.value:
        raise ConversionError("--data is empty, expected the table of labels; name the file")
    columns = TableColumns(
        id=_ID.value,
        video=_VIDEO.value,
        audio=_AUDIO.value,
        video_path=_VIDEO_PATH.value,
        audio_path=_AUDIO_PATH.value,
        label=_LABEL.value,
        text=_TEXT.value,
        reasoning=_REASONING.value,
        chat=_CHAT.value,
    )
    label_map = read_label_map(_LABEL_MAP.value, account) if _LABEL_MAP.value else None
    return read_labelled_table(_DATA.value, columns, label_map, _ROOT.value, account)


_TABLE_FLAGS = (
    *("data", "id", "video", "audio", "video_path", "audio_path"),
    *("label", "label_map", "text", "reasoning", "chat"),
)
