"""Completions from texts written by hand."""

import numpy as np
from support.tiny_tokenizer import tiny_tokenizer

from mer_r1_jax.rl.rollout import STOP_ABSENT, STOP_EOS, STOP_LENGTH, Completions
from mer_r1_jax.rl.tags import AnswerTags

LENGTH = 64  # tokens of a completion; the longest answers of these tests take fewer


def completions_of(rows):
    """Completions from texts; a text that ends in "..." was cut at the length cap, None is an absent one."""
    tags = AnswerTags(tiny_tokenizer())
    shape = (len(rows), len(rows[0]))
    ids, length = np.zeros((*shape, LENGTH), np.int32), np.zeros(shape, np.int32)
    stop = np.full(shape, STOP_ABSENT, np.int32)
    for row, group in enumerate(rows):
        for column, text in enumerate(group):
            if text is None:
                continue
            cut = text.endswith("...")
            tokens = [*tags.ids(text.removesuffix("...")), *(() if cut else (tags.turn_end,))]
            ids[row, column, : len(tokens)] = tokens
            length[row, column], stop[row, column] = len(tokens), STOP_LENGTH if cut else STOP_EOS
    mask = np.arange(LENGTH) < length[..., None]
    zeros = np.zeros(mask.shape, np.float32)
    return Completions(
        id_BGC=ids, length_BG=length, mask_BGC=mask, stop_BG=stop, logprob_BGC=zeros, sampling_logprob_BGC=zeros
    )


def slow(answer, reasoning="The voice"):
    return f"<think>{reasoning}</think>\n<answer>{answer}</answer>"
