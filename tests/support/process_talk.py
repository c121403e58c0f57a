"""What the processes of a run say to each other, without a run around it: `python process_talk.py ENDING`.

Started as a process of several (JAX_COORDINATOR_ADDRESS and so on); prints one JSON line. ENDING: `lost` ends process 1
without a word, as SIGKILL or a broken host does; `refused` lets it end with an error of its own.
"""

import dataclasses
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np

from mer_r1_jax.cli import explained
from mer_r1_jax.config.schema import ConfigError, RunConfig
from mer_r1_jax.data.records import Record
from mer_r1_jax.evaluation.evaluate import agreed_batches
from mer_r1_jax.media.prompt import Prompt
from mer_r1_jax.omni.batch import BatchShape
from mer_r1_jax.omni.config import ThinkerConfig
from mer_r1_jax.parallel import processes
from mer_r1_jax.run import agreement
from mer_r1_jax.run.agreement import DisagreementError, check_config, check_data
from mer_r1_jax.run.setup import DataSets
from mer_r1_jax.training.prompts import prompt_rows
from mer_r1_jax.training.signals import StopSignals
from mer_r1_jax.training.stopping import ANNOUNCED, Stop

STEPS = 1000


def main(ending: str) -> None:
    own = processes.index()
    said = {
        "exchange": [processes.exchange("a number", 10 * own + round) for round in range(3)],
        "gather": processes.gather("a list", [own]),
        "from_first": processes.from_first("a choice", lambda: f"made by {own}"),
        "bucket": batch_of(6 if own else 3).shape[1],
        "batches": agreed(own),
        "config": refusal_of(check_config, config(beta=0.04 + own, decode_workers=own)),
        "data": refusal_of(check_data, data_of("sad" if own else "happy")),
        "length": refusal_of(check_data, data_of("happy", records=1 + own)),
        "code": refusal_of_other_code(own, "SOURCES", "training/rl_step.py"),
        "kernels": refusal_of_other_code(own, "KERNELS", "attention/__init__.py"),
        "stopped": stopped_at(own),
        "announced": processes.is_announced(ANNOUNCED),
    }
    check_config(config(beta=0.04, decode_workers=own))  # what a host may have of its own is no difference
    print(json.dumps(said), flush=True)
    processes.barrier("the talk")
    if own == 1 and ending == "lost":
        os._exit(9)
    if own == 1:
        raise ConfigError("this one cannot go on")
    time.sleep(600)


def prompt_of(length: int) -> Prompt:
    return Prompt(
        id="1",
        ids=np.ones(length, np.int32),
        source=np.tile(np.array([-1, 0], np.int32), (length, 1)),
        position=np.zeros((3, length), np.int32),
        next_position=length,
    )


def batch_of(length: int) -> np.ndarray:
    """Token rows of a batch whose one prompt has so many tokens; a bucket holds 4 of them, the other 8."""
    empty = {"vision_clips": 0, "frame_pairs": 0, "patches": 0, "audio_clips": 0, "audio_units": 0}
    buckets = [BatchShape(rows=1, tokens=tokens, **empty) for tokens in (4, 8)]
    return prompt_rows([prompt_of(length)], buckets, ThinkerConfig.tiny(), [1]).tokens.id_BT


def agreed(own: int) -> dict[str, list]:
    """Batches of two of five records of which each process cannot use another one."""
    records = [Record(id=str(number), messages=({"role": "user", "content": "Feel?"},)) for number in range(5)]
    broken = {1: "no such file"} if own == 0 else {3: "decoding took too long", 4: "decoding took too long"}
    prompts = ((record, broken.get(number, prompt_of(4))) for number, record in enumerate(records))
    skipped: list = []
    batches = [[record.id for record, _ in batch] for batch in agreed_batches(prompts, 2, skipped, at_least=4)]
    return {"batches": batches, "skipped": [(record.id, why) for record, why in skipped]}


def refusal_of(check, argument) -> str | None:
    try:
        check(argument)
    except DisagreementError as error:
        return str(error)


def config(beta: float, decode_workers: int) -> RunConfig:
    plain = RunConfig()
    return dataclasses.replace(
        plain,
        rl=dataclasses.replace(plain.rl, beta=beta),
        media=dataclasses.replace(plain.media, decode_workers=decode_workers),
    )


def refusal_of_other_code(own: int, part: str, file: str) -> str | None:
    """What comes of a process whose checkout has one more comment in a file, at the same version."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(getattr(agreement, part), copy, ignore=shutil.ignore_patterns("__pycache__"))
        if own:
            with open(copy / file, "a") as opened:
                opened.write("# another line\n")
        with mock.patch.object(agreement, part, copy):
            return refusal_of(check_config, config(beta=0.04, decode_workers=own))


def data_of(word: str, records: int = 1) -> DataSets:
    question = ({"role": "user", "content": "Feel?"},)
    rl = tuple(Record(id=str(number), messages=question, solution=(word,)) for number in range(records))
    return DataSets(sft=(), rl=rl, eval=(), unscorable=0)


def stopped_at(own: int) -> int:
    """The step at which this process stops after a signal to process 1 alone."""
    with StopSignals() as signals:
        stop = Stop(signals)
        for step in range(STEPS):
            if step == 5 and own == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            if stop.agreed():
                return step
    return STEPS


if __name__ == "__main__":
    with processes.joined(), explained():
        main(sys.argv[1])
