"""Looks at a model before anybody trusts it: mer-r1 certify --model=DIR [--data=FILE] [--out=FOLDER]

Files and sums, tokenizer and special tokens, where answers end; then the numbers: beside transformers' where torch is
installed (--noreference leaves that out: it holds the model twice in float32), the cache, a batch and the sampler
beside the plain way. With --data also slow and fast answers on these records, with intervals; in any case speed and
memory. Writes certificate.html and certificate.json, which say what is certified and what is not. The exit code is 1 if
anything failed.
"""

from __future__ import annotations

import pathlib

from absl import app, flags

from mer_r1_jax import screen
from mer_r1_jax.cli import explained

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory, such as a run's export.", required=True)
_DATA = flags.DEFINE_string("data", "", "Records with a solution each, to answer slow and fast.")
_MEDIA_ROOT = flags.DEFINE_string("media_root", "", "Folder of the media paths; empty = that of --data.")
_LIMIT = flags.DEFINE_integer("limit", 0, "First so many records; 0 = all.", lower_bound=0)
_OUT = flags.DEFINE_string("out", "certificate", "Folder for certificate.html and certificate.json.")
_REFERENCE = flags.DEFINE_bool("reference", True, "Compare with transformers where torch is installed.")
_SET = flags.DEFINE_multi_string("set", [], "NAME=VALUE of a setting, such as media.max_frames=8.")


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    from mer_r1_jax.config.command_line import named_values
    from mer_r1_jax.run.certificate import FAILED, Asked, certify, write_certificate
    from mer_r1_jax.run.policy import refuse_in_run

    with explained():
        refuse_in_run(_OUT.value)
        asked = Asked(
            model=pathlib.Path(_MODEL.value or ""),
            data=_DATA.value,
            media_root=_MEDIA_ROOT.value,
            limit=_LIMIT.value,
            overrides=named_values(_SET.value),
            reference=_REFERENCE.value,
        )
        certificate = certify(asked)
        page, _ = write_certificate(pathlib.Path(_OUT.value), certificate)
    for check in certificate.checks:
        screen.say(f"{check.state:>13}  {check.name}: {check.found}")
    for name, value in certificate.figures.items():
        screen.say(f"{'':>13}  {name}: {value}")
    screen.say(f"{certificate.verdict} {page}")
    return 1 if certificate.of(FAILED) else 0
