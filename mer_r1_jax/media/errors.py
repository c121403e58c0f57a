"""Errors of the media part: one message each, naming the file, what was found, what was expected and how to mend it."""

from __future__ import annotations


class MediaError(ValueError):
    """A clip that cannot be used.

    Attributes:
        path: the file.
        reason: a short slug for counting: missing, empty, unreadable, outside (the media root), not_media, playlist,
            unknown_codec, truncated, corrupt, no_video, no_audio, no_frames, too_long, too_short, too_large, bad_size,
            bad_rate, bad_pixels, odd_turn, several_pictures, not_finite, timeout, worker_died.
    """

    def __init__(self, path, reason: str, found: str, expected: str, mend: str):
        super().__init__(f"{path}: {found}; expected {expected}. {mend}")
        self.path = str(path)
        self.reason = reason
        self.found = found
        self.expected = expected
        self.mend = mend

    def to_json(self) -> dict[str, str]:
        """The constructor's arguments, so that a worker process can report the error to its parent."""
        return {name: getattr(self, name) for name in ("path", "reason", "found", "expected", "mend")}


class PromptError(ValueError):
    """A record that cannot become a prompt; the message names the record's id."""
