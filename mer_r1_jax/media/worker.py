"""The program a decoding process runs: `python -m mer_r1_jax.media.worker`.

It reads jobs from standard input, one JSON object per line, and answers each on standard output with one JSON line,
followed by the entry's bytes where decoding succeeded. It ends when its input is closed or its parent is gone.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.entry import decode_file
from mer_r1_jax.media.errors import MediaError

PARENT_CHECK_SECONDS = 1.0


def main() -> None:
    """Serves jobs until the parent closes the pipe."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a codec prints must not end up between the answers
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    _answer(answers, {"ready": True})
    for line in sys.stdin.buffer:
        job = json.loads(line)
        job["media"] = MediaConfig(**job["media"])
        try:
            data = decode_file(**job).to_bytes()
        except MediaError as error:
            _answer(answers, {"error": error.to_json()})
        else:
            _answer(answers, {"size": len(data)}, data)


def _answer(answers, header: dict, data: bytes = b"") -> None:
    answers.write(json.dumps(header).encode() + b"\n" + data)
    answers.flush()


def _end_with_parent(parent: int) -> None:
    """Ends this process soon after its parent died, even while a codec hangs."""
    while os.getppid() == parent:
        time.sleep(PARENT_CHECK_SECONDS)
    os._exit(0)


if __name__ == "__main__":
    main()
