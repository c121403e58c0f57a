"""What can be certified of a model's folder without computing anything: its files, description, tokenizer and ends.

Each function returns what it found, in words, and raises one of this package's errors where that is not in order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mer_r1_jax.evaluation.report_kit import counted
from mer_r1_jax.media.tokenizer import PAD_TOKEN, TURN_END, check_special_tokens, load_tokenizer
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.omni.hf.config_json import GENERATION_FILE
from mer_r1_jax.omni.hf.foreign import read_json_object
from mer_r1_jax.omni.hf.load import find_weights
from mer_r1_jax.omni.hf.sums import SUMS_FILE, read_sums
from mer_r1_jax.omni.hf.tensor_files import weight_files
from mer_r1_jax.rl.tags import AnswerTags
from mer_r1_jax.storage import atomic_files

# What prompts and answers hold: a subtitle, other scripts and white space, the answer's tags.
_TEXTS = (
    "I never wanted it to end.",
    "她哭了 😢 — naïve\n\n\tvoice",
    "<think>the brows</think>\n<answer>sad, calm</answer>",
)


class CertificateError(ValueError):
    """A check that did not come out; the message says what was got, what was expected and how to mend it."""


def describe(config: ThinkerConfig) -> str:
    """The sizes of a model."""
    text, vision, audio = config.text, config.vision, config.audio
    return (
        f"{text.num_hidden_layers} text layers {text.hidden_size} wide, {vision.depth} of vision, "
        f"{audio.encoder_layers} of voice, {text.vocab_size:,} tokens"
    )


def compare_files(model: Path, files: list[dict[str, Any]]) -> str:
    """Sums every file once, and adds its name, bytes and sum to `files`.

    Raises:
        CertificateError: a file is not as listed.
        WeightError: there are no weights, or parts of some.
    """
    listed = read_sums(model / SUMS_FILE, CertificateError)
    weight_files(model)  # refuses a folder without any, or with parts of some
    wrong = []
    for file in sorted(path for path in model.iterdir() if path.is_file()):
        total = atomic_files.sha256_of(file)
        files.append({"name": file.name, "bytes": file.stat().st_size, "sha256": total})
        if listed.get(file.name, total) != total:
            wrong.append(f"{file.name} has the sum {total[:12]}…, expected {listed[file.name][:12]}…")
    wrong += [f"{name} is not there" for name in listed if not (model / name).is_file()]
    if wrong:
        raise CertificateError(f"{'; '.join(wrong)}. Copy the model again from where it was exported")
    covered = f"{len(listed)} of them are as {SUMS_FILE} lists them" if listed else "they have no list to compare with"
    return f"{counted(len(files), 'file')}; {covered}"


def match(model: Path, config: ThinkerConfig) -> str:
    """Holds the headers of the weights against the architecture. Raises WeightError listing what does not fit."""
    matched = find_weights(model, config)
    skipped = ", ".join(f"{count} of {part}" for part, count in matched.skipped.items())
    dtypes = sorted({tensor.dtype for tensor in matched.tensors.values()})
    return f"{len(matched.tensors)} tensors of {'/'.join(dtypes)}" + (f", beside {skipped}" if skipped else "")


def look_at_tokens(model: Path, config: ThinkerConfig) -> str:
    """Raises TokenizerError, TagError or CertificateError where words or tokens are not what the model takes."""
    tokenizer = load_tokenizer(model)
    check_special_tokens(tokenizer, config)
    tags = AnswerTags(tokenizer)
    changed = [text for text in _TEXTS if tags.text(tags.ids(text)) != text]
    if changed:
        raise CertificateError(
            f"the tokenizer gives {changed[0]!r} back as {tags.text(tags.ids(changed[0]))!r}, expected it unchanged; "
            "copy the tokenizer's files from where the model is from"
        )
    return f"{len(tokenizer):,} tokens; media tokens as the model numbers them; {len(_TEXTS)} texts come back unchanged"


def look_at_ends(model: Path, config: ThinkerConfig) -> str:
    """Raises CertificateError where an answer would be sampled, here or by others, past the end of its turn."""
    tokenizer = load_tokenizer(model)
    end, pad = (tokenizer.convert_tokens_to_ids(token) for token in (TURN_END, PAD_TOKEN))
    if end not in config.eos_token_ids:
        raise CertificateError(
            f"the model ends at the tokens {list(config.eos_token_ids)}, expected {end} ({TURN_END}) among them: "
            "answers would run into their length cap; correct eos_token_id in config.json"
        )
    file = model / GENERATION_FILE
    given = read_json_object(file, CertificateError, "settings of generation") if file.exists() else {}
    ends = given.get("eos_token_id")
    # transformers writes a single id, or a list of them.
    if end not in (ends if isinstance(ends, list) else [ends]):
        raise CertificateError(
            f"{GENERATION_FILE} gives the end tokens {ends}, expected {end} ({TURN_END}) among them: vLLM and "
            f"transformers read them there; add it, or export the model anew (`mer-r1 export --model={model}`)"
        )
    return f"at {TURN_END} ({end}), for this project and for what reads {GENERATION_FILE}; padding is {pad}"
