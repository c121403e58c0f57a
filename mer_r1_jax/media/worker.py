"""The program a decoding process runs: `python -m mer_r1_jax.media.worker`.

A job holds the arguments of `decode_file`; the answer is the size of the entry whose bytes follow, or the error.
"""

from __future__ import annotations

from typing import Any

from mer_r1_jax.child import serve
from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media.entry import decode_file
from mer_r1_jax.media.errors import MediaError


def main() -> None:
    """Serves jobs until the parent closes the pipe."""
    serve(_answer)


def _answer(job: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
    job["media"] = MediaConfig(**job["media"])
    try:
        data = decode_file(**job).to_bytes()
    except MediaError as error:
        return {"error": error.to_json()}, b""
    return {"size": len(data)}, data


if __name__ == "__main__":
    main()
