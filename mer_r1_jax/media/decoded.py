"""What decoding one file yields, and the bytes it is kept as: by the cache on disk, and between processes.

Layout: 8 bytes of magic, CRC-32 of all that follows, length of the header, JSON header padded with blanks so that the
arrays are aligned, arrays one after the other. A truncated, extended or damaged entry is recognised. `np.savez` and
`np.load` keep the same with a sum for each array, but take 1.4 and 1.6 times as long for the frames of a clip (12 MB:
232 against 165 ms, 54 against 34 ms), and 2.4 and 7 times as long for 36 KB.
"""

from __future__ import annotations

import dataclasses
import json
import struct
import zlib
from typing import Any

import numpy as np

from mer_r1_jax.config.schema import MediaConfig
from mer_r1_jax.media import decode
from mer_r1_jax.media.mel import log_mel
from mer_r1_jax.media.opening import MediaError, MediaFile, media_file
from mer_r1_jax.media.tracks import encoding_of

MAGIC = b"MERCLIP1"
_PREFIX = struct.Struct("<8sI")
_HEADER_SIZE = struct.Struct("<I")
_HEADER_AT = _PREFIX.size + _HEADER_SIZE.size
_ALIGNMENT = 16
DTYPES = ("uint8", "float32")

VIDEO, AUDIO, IMAGE = "video", "audio", "image"
STILLS = "stills"  # single pictures of a video, as large as they are
ENCODING = "encoding"  # how it is encoded, and nothing of what it shows


class CorruptEntryError(ValueError):
    """Bytes that are not a whole entry."""


@dataclasses.dataclass(frozen=True)
class Entry:
    """One decoded file.

    Attributes:
        arrays: "frames" uint8[n, h, w, 3] of a video, its stills or an image, or "mel" float32[F, M] of an audio track.
        facts: plain numbers: "fps" (sampled) and "duration" of a video; of an audio track "samples", "cut", "filled",
            "silent" and "cancelled", as `decode.AudioTrack` has them. Of an encoding, names: `tracks.encoding_of`.
    """

    arrays: dict[str, np.ndarray]
    facts: dict[str, Any]

    def to_bytes(self) -> bytes:
        """Returns the entry as bytes."""
        arrays = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        described = [[name, str(array.dtype), list(array.shape)] for name, array in arrays.items()]
        header = json.dumps({"arrays": described, "facts": self.facts}).encode()
        header += b" " * (-(_HEADER_AT + len(header)) % _ALIGNMENT)
        body = b"".join([_HEADER_SIZE.pack(len(header)), header, *(array.tobytes() for array in arrays.values())])
        return _PREFIX.pack(MAGIC, zlib.crc32(body)) + body

    @classmethod
    def from_bytes(cls, data: bytes) -> Entry:
        """Returns the entry with read-only arrays that share `data`.

        Raises:
            CorruptEntryError: if the bytes are not exactly what `to_bytes` wrote.
        """
        if len(data) < _HEADER_AT:
            raise CorruptEntryError(f"{len(data)} bytes are too few for an entry")
        magic, checksum = _PREFIX.unpack_from(data)
        if magic != MAGIC or zlib.crc32(memoryview(data)[_PREFIX.size :]) != checksum:
            raise CorruptEntryError("the checksum does not match")
        at = _HEADER_AT + _HEADER_SIZE.unpack_from(data, _PREFIX.size)[0]
        header = json.loads(data[_HEADER_AT:at])
        arrays = {}
        for name, dtype, shape in header["arrays"]:
            if dtype not in DTYPES:
                raise CorruptEntryError(f"array of dtype {dtype}")
            size = int(np.prod(shape, dtype=np.int64))
            arrays[name] = np.frombuffer(data, dtype, size, at).reshape(shape)
            at += arrays[name].nbytes
        return cls(arrays=arrays, facts=header["facts"])


def decode_file(path: str, kind: str, media: MediaConfig, factor: int, n_mels: int, root: str = "") -> Entry:
    """Decodes one file completely, up to resized frames or the log-mel spectrogram.

    Args:
        path: the file.
        kind: "video", "audio", "image", "stills" or "encoding": what to read from it.
        media: sampling and limits.
        factor: pixels that sides of resized pictures are multiples of.
        n_mels: mel bins.
        root: the media root, which links may not lead out of; "" for none.

    Raises:
        MediaError: for anything wrong with the file.
    """
    try:
        with media_file(path, root) as file:
            return _decode(file, kind, media, factor, n_mels)
    except MediaError:
        raise
    except MemoryError as error:
        raise MediaError(
            path,
            "too_large",
            "a clip that needs more memory to decode than there is",
            f"one that decodes within media.decode_memory_mb={media.decode_memory_mb}",
            "Scale it down or cut it, or raise the setting.",
        ) from error
    except Exception as error:  # decoders are fed arbitrary bytes: whatever they raise is about this file
        raise MediaError(
            path,
            "corrupt",
            f"data that fails to decode ({type(error).__name__}: {error})",
            "a whole file",
            "Encode it again.",
        ) from error


def _decode(path: MediaFile, kind: str, media: MediaConfig, factor: int, n_mels: int) -> Entry:
    if kind == VIDEO:
        video = decode.read_video(path, media, factor)
        return Entry({"frames": video.frames}, {"fps": video.sampled_fps, "duration": video.duration})
    if kind == STILLS:
        video = decode.read_stills(path, media)
        return Entry({"frames": video.frames}, {"fps": video.sampled_fps, "duration": video.duration})
    if kind == ENCODING:
        return Entry({}, encoding_of(path))
    if kind == IMAGE:
        return Entry({"frames": decode.read_image(path, media, factor)[None]}, {"fps": 0.0, "duration": 0.0})
    track = decode.read_audio_track(path, media)
    mel = log_mel(track.samples, n_mels, media.sampling_rate)
    facts = {"cut": track.cut, "filled": track.filled, "silent": track.silent, "cancelled": track.cancelled}
    return Entry({"mel": mel}, {"samples": track.samples.size} | facts)
