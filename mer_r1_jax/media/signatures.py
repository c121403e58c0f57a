"""Files that stand where a clip should and are none, told by how they begin: playlists, subtitles, pages, pictures."""

from __future__ import annotations

import dataclasses
import re

_BLANK = b" \t\r\n"
_WIDE = (  # the longer marks first: UTF-32 begins like UTF-16
    (b"\xff\xfe\x00\x00", "utf-32-le"),
    (b"\x00\x00\xfe\xff", "utf-32-be"),
    (b"\xff\xfe", "utf-16-le"),
    (b"\xfe\xff", "utf-16-be"),
)
_OWN = "List the clips themselves, one path each: a clip may not name other files."
_SUBTITLES = "Put its text into the `subtitle` column, and list the clip it belongs to."
_UNPACK = "Unpack it, and list the clips inside."


@dataclasses.dataclass(frozen=True)
class Signature:
    """A kind of file that is no clip.

    Attributes:
        what: its name in a message.
        reason: a slug of `MediaError`.
        mend: what to do; "" for a picture, which is refused only where FFmpeg finds no video in it.
    """

    what: str
    reason: str = "not_media"
    mend: str = ""


def _list(what: str) -> Signature:
    return Signature(what, "playlist", _OWN)


_TEXTS = (
    (rb"#EXTM3U|#EXT-X-", _list("a playlist (M3U or HLS)")),
    (rb"ffconcat version|file\s+['\"]?[^\s]", _list("a list of files (FFmpeg's concat)")),
    (rb"\[playlist\]", _list("a playlist (PLS)")),
    (rb"\[reference\]|<asx\b", _list("a playlist (ASX)")),
    (rb"v=0\s", _list("a description of a stream (SDP)")),
    (rb"(?:https?|rtsp|rtmp|mms|ftp|file|gs|s3)://\S", _list("a text with an address")),
    (rb"version https://git-lfs", Signature("a git-lfs pointer in place of the file", mend="Run `git lfs pull`.")),
    (rb"WEBVTT|\[script info\]|# vobsub index|\d+\s*\r?\n\d\d:\d\d:\d\d,\d", Signature("subtitles", mend=_SUBTITLES)),
)
# One path a line, as the plainest of playlists are.
_ENDING = rb"\.(?:mp4|m4[av]|mov|mkv|webm|avi|flv|wmv|mpe?g|ts|wav|mp3|flac|ogg|opus|aac)[ \t]*(?:[\r\n]|\Z)"
_PATHS = rb"[^\r\n\x00]{1,1000}" + _ENDING
_COMMENTS = re.compile(rb"(?:(?:#(?!EXT)|//)[^\r\n]*[\r\n]+\s*)+", re.IGNORECASE)
_MARKUP = (
    (rb"<mpd\b", _list("a manifest (DASH)")),
    (rb"<smoothstreamingmedia\b|<(?:\w+:)?manifest\b", _list("a manifest (streaming)")),
    (rb"<smil\b|<playlist\b|<asx\b|<wpl\b|<\?wpl", _list("a playlist (XML)")),
    (rb"<svg\b", Signature("a drawing (SVG)", mend="Save it as PNG and list it under `images`.")),
    (rb"<!doctype html|<html\b", Signature("a web page", mend="Download the clip itself.")),
    (rb"\A<\?xml\b", Signature("an XML text", mend="List the clip itself.")),
)
# A WebP of several pictures says so in its extended header: the flags' second bit.
_ANIMATED = b"RIFF....WEBPVP8X....[" + b"".join(b"\\x%02x" % flags for flags in range(256) if flags & 2) + b"]"
_BYTES = (
    (_ANIMATED, Signature("an animated WebP, which FFmpeg cannot decode", "several_pictures", "Make an mp4 of it.")),
    (rb"\x1f\x8b|PK\x03\x04|BZh[1-9]|\xfd7zXZ|7z\xbc\xaf|Rar!", Signature("an archive", mend=_UNPACK)),
    (rb"%PDF-", Signature("a PDF document", mend="Save its pictures, and list them under `images`.")),
    (rb"....ftyp(?:heic|heix|mif1)", Signature("a HEIC picture", mend="Save it as JPEG and list it under `images`.")),
    (rb"%!PS|\xc5\xd0\xd3\xc6", Signature("a PostScript document", mend="Save it as PNG and list it under `images`.")),
)
_PICTURE = Signature("a picture", "no_frames")
_PICTURES = rb"\x89PNG|\xff\xd8\xff|GIF8|BM|II\*\x00|MM\x00\*|RIFF....WEBP|P[1-6]\s|\x00\x00\x00\x0cjP  "


def signature_of(start: bytes) -> Signature | None:
    """Returns what a file is that begins like this, None where nothing tells it apart from a clip.

    Args:
        start: its first bytes, a few thousand.
    """
    for pattern, kind in _BYTES:
        if re.match(pattern, start, re.DOTALL):
            return kind
    if re.match(_PICTURES, start, re.DOTALL):
        return _PICTURE
    text = _plain(start)
    if text[:1] == b"<":
        return next((kind for pattern, kind in _MARKUP if re.search(pattern, text, re.IGNORECASE)), None)
    for spoken in (text, _COMMENTS.sub(b"", text, count=1) if _COMMENTS.match(text) else text):
        for pattern, kind in (*_TEXTS, (_PATHS, _list("a list of files"))):
            if re.match(pattern, spoken, re.IGNORECASE):
                return kind
    return None


def _plain(start: bytes) -> bytes:
    """The text without its byte order mark and leading blanks; UTF-16 and UTF-32 as one byte a letter."""
    for mark, encoding in _WIDE:
        if start.startswith(mark):
            start = start[len(mark) :].decode(encoding, "ignore").encode(errors="ignore")
            break
    else:
        # Without a mark letters have zeros beside them.
        for encoding, zeros, letters in (
            ("utf-16-le", start[1:40:2], start[:40:2]),
            ("utf-16-be", start[:40:2], start[1:40:2]),
        ):
            if zeros and not any(zeros) and all(letters) and letters.isascii():
                start = start.decode(encoding, "ignore").encode(errors="ignore")
    return start.removeprefix(b"\xef\xbb\xbf").lstrip(_BLANK)
