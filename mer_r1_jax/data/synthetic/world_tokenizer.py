"""The synthetic world's tokenizer: byte-level BPE with Qwen's split rule and special tokens, and the processor files.

It is trained on the project's own texts when a data set is made. Words of the world get many repetitions, so that each
is one token; all word forms of the emotion wheels follow once each, so that the first tokens of different categories'
words stay distinct (MER-R1's calibration terms need that).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from mer_r1_jax.data.synthetic import wording
from mer_r1_jax.emotion.answer_form import ANSWER_CLOSE, BRIDGE, THINK_OPEN
from mer_r1_jax.media.tokenizer import TURN_END

# Tokens, special ones included. With twice as many a step of SFT takes 1.4 times as long, for logits of tokens that no
# clip has; with half as many, words of the world lose their first tokens to other categories.
VOCABULARY = 4096
WORLD_REPEATS = 400  # occurrences of each of the world's texts per occurrence of a wheel's word form

SPLIT = (  # Qwen2's
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (  # in the order of their ids in the released tokenizer, 151643 and up
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
NAMED_TOKENS = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
CONFIG_TOKENS = {  # field of ThinkerConfig -> its token
    "audio_token_id": "<|AUDIO|>",
    "image_token_id": "<|IMAGE|>",
    "video_token_id": "<|VIDEO|>",
    "audio_start_token_id": "<|audio_bos|>",
    "audio_end_token_id": "<|audio_eos|>",
    "vision_start_token_id": "<|vision_bos|>",
    "vision_end_token_id": "<|vision_eos|>",
    "pad_token_id": "<|endoftext|>",
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' or 'image' in item %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif item['type'] == 'audio' or 'audio' in item %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif item['type'] == 'video' or 'video' in item %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif 'text' in item %}{{ item['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREPROCESSOR = {  # as the released checkpoint's, for transformers' processor
    "chunk_length": 300,
    "dither": 0.0,
    "feature_extractor_type": "WhisperFeatureExtractor",
    "feature_size": 128,
    "hop_length": 160,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_processor_type": "Qwen2VLImageProcessor",
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "max_pixels": 12845056,
    "merge_size": 2,
    "min_pixels": 3136,
    "n_fft": 400,
    "n_samples": 4800000,
    "nb_max_frames": 30000,
    "padding_side": "right",
    "padding_value": 0.0,
    "patch_size": 14,
    "processor_class": "Qwen2_5OmniProcessor",
    "return_attention_mask": True,
    "sampling_rate": 16000,
    "temporal_patch_size": 2,
}


def corpus(lexicon: dict, wheels, extra: Iterable[str] = ()) -> Iterator[str]:
    """Yields the training texts: the world's, the template's and the tags' (repeated), then the wheels' word forms."""
    words = [word for category in lexicon["words"].values() for word in category]
    pieces = [THINK_OPEN, BRIDGE, ANSWER_CLOSE, "<subtitle>", "</subtitle>\n", "system\n", "user\n"]
    pieces += ["assistant\n", "\nYou are a helpful assistant."]
    often = wording.all_texts(lexicon) + pieces + list(extra)
    often += [form for word in words for form in (word, f", {word}", word.capitalize())]
    for _ in range(WORLD_REPEATS):
        yield from often
    forms = {form for wheel in range(len(wheels)) for group in wheels.forms(wheel).values() for form in group}
    # One spelling of each only: the vocabulary is too small to hold all four of 14,000 forms whole, and more of them
    # would then lose their first tokens to other categories (so: an eighth, and none that the world says).
    yield from (f" {form}" for form in sorted(forms))


def train_tokenizer(lexicon: dict, wheels, extra: Iterable[str] = (), vocabulary: int = VOCABULARY):
    """Trains the tokenizer; the same texts give the same one.

    Args:
        lexicon: the world's words and phrases.
        wheels: emotion wheels whose word forms it should know.
        extra: further texts that will be met often, e.g. another question.
        vocabulary: size of the vocabulary, special tokens included.

    Returns:
        A `transformers.Qwen2Tokenizer` with the 22 special tokens last and a chat template.
    """
    from transformers import Qwen2Tokenizer

    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(corpus(lexicon, wheels, extra), trainer)
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return Qwen2Tokenizer(
        tokenizer_object=core,
        eos_token=TURN_END,
        pad_token="<|endoftext|>",
        extra_special_tokens=NAMED_TOKENS,
        chat_template=CHAT_TEMPLATE,
    )


def save_tokenizer(tokenizer, directory: str | Path, mel_bins: int = 128) -> None:
    """Writes tokenizer and processor files, the way a Qwen2.5-Omni checkpoint carries them."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(directory)
    (directory / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR | {"feature_size": mel_bins}, indent=2))
    # transformers 4 reads the template here, transformers 5 from chat_template.jinja.
    (directory / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}, indent=2))


def special_ids(tokenizer) -> dict:
    """Arguments of ThinkerConfig that follow from the tokenizer: `vocab_size`, `eos_token_ids` and the media ids."""
    ids = {field: tokenizer.convert_tokens_to_ids(token) for field, token in CONFIG_TOKENS.items()}
    return ids | {
        "eos_token_ids": (tokenizer.convert_tokens_to_ids(TURN_END),),
        "user_token_id": tokenizer.convert_tokens_to_ids("user"),
        "vocab_size": len(tokenizer),
    }
