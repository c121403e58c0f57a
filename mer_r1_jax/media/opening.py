"""Opening media files: one descriptor under the media root, known formats, and nothing that a file names.

A clip is bytes from strangers. What is read is one regular file, opened once and never again by its path, so that a
link put in its place later changes nothing. FFmpeg and Pillow get the open file and a list of formats: no protocol, no
playlist and no other file is within their reach, whatever the clip's name or content says.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import stat
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import av
import av.container
import av.error
from PIL import Image, UnidentifiedImageError

from mer_r1_jax import faults
from mer_r1_jax.media.signatures import Signature, signature_of


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


FileKey = tuple[int, int] | str


def file_key(path: str | os.PathLike) -> FileKey:
    """Returns what all spellings of one file have in common; of one that is not there, its normalised path."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return unicodedata.normalize("NFC", os.path.realpath(path))
    if not status.st_ino:  # some mounted disks number no files
        return unicodedata.normalize("NFC", os.path.realpath(path))
    return status.st_dev, status.st_ino


def other_spelling(path: str | os.PathLike) -> str | None:
    """Returns the name of a file beside a missing one that differs in letter case or Unicode form only, if any.

    A disk that tells these apart shows names that look alike, or are alike elsewhere: macOS writes é as two characters,
    and Windows finds `Clip.MP4` as `clip.mp4`.
    """
    path = Path(path)
    try:
        names = os.listdir(path.parent)
    except (OSError, ValueError):
        return None
    wanted = _folded(path.name)
    return next((name for name in sorted(names) if name != path.name and _folded(name) == wanted), None)


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


# FFmpeg's names of the containers that are read: what cameras, phones, browsers, recorders and data sets write. None of
# them opens a second file. Not here, on purpose: lists and manifests (hls, dash, concat, sdp), image sequences and
# pipes, subtitles, text and devices.
CONTAINERS = (
    *("mov", "mp4", "m4a", "3gp", "3g2", "mj2"),
    *("matroska", "webm", "avi", "asf", "flv", "mpeg", "mpegts", "mxf", "nut", "ogg", "rm", "dv", "ivf", "gif", "apng"),
    *("wav", "w64", "mp3", "aac", "flac", "aiff", "au", "caf", "amr", "ac3", "eac3", "dts", "wv", "tta", "ape"),
    *("h264", "hevc", "av1", "obu", "m4v", "h263", "mpegvideo", "mjpeg", "vc1", "yuv4mpegpipe"),
)
# Pillow's names. Not here: EPS, which runs another program, and formats nobody keeps photographs in.
PICTURES = ("JPEG", "PNG", "WEBP", "AVIF", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000")
USUAL = "mp4, mov, mkv, webm, avi, wav, mp3, flac, ogg or another usual container"

MAX_BYTES = 16 << 30  # of a file: ten minutes at 230 Mbit/s; it is read whole for the cache's key
SIGNATURE_BYTES = 4096  # of a file's start: enough to tell a list from a clip
BUFFER_BYTES = 1 << 16  # FFmpeg asks for this much at a time
_ENDING = re.compile(r"\.[A-Za-z0-9]{1,8}$")
_PATH_ONLY = getattr(os, "O_PATH", os.O_RDONLY)  # passes through folders that may be entered but not listed
_FOLDER = _PATH_ONLY | os.O_DIRECTORY | os.O_CLOEXEC
_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC | os.O_NOFOLLOW


class MediaFile:
    """A regular file that is open for reading; as text it is the path it is known by, for messages."""

    def __init__(self, path: str, stream: io.FileIO):
        """
        Args:
            path: as it was asked for.
            stream: its bytes.
        """
        self.path, self.stream = path, stream

    def __str__(self) -> str:
        return self.path

    def __fspath__(self) -> str:
        return self.path

    def status(self) -> os.stat_result:
        """Size, times and identity of what is open."""
        return os.fstat(self.stream.fileno())

    def rewound(self) -> io.FileIO:
        """Returns the bytes from the start."""
        self.stream.seek(0)
        return self.stream


@contextlib.contextmanager
def media_file(path: str | Path | MediaFile, root: str | Path = "") -> Iterator[MediaFile]:
    """Opens a media file for the length of the block; one that is open already is passed on, and left open.

    Args:
        path: the file.
        root: the media root: a folder that symbolic links may not lead out of; "" for a file its user named himself.

    Raises:
        MediaError: there is no such file, it lies outside the root, is no regular file, is empty or cannot be read.
    """
    if isinstance(path, MediaFile):
        yield path
        return
    with _stream_of(str(path), root) as stream:
        yield MediaFile(str(path), stream)


def check_present(path: str | Path, root: str | Path = "") -> None:
    """Raises MediaError unless there is a file that can be opened, with something in it; arguments of `media_file`."""
    with media_file(path, root):
        pass


@contextlib.contextmanager
def opened_container(path: str | Path | MediaFile) -> Iterator[av.container.InputContainer]:
    """Opens a file as a container and turns whatever is raised over its bytes inside the block into a MediaError.

    Raises:
        MediaError: as `media_file` does, or the file is no container of `CONTAINERS`, or damaged.
        MemoryError: it needs more memory than there is.
    """
    with media_file(path) as file:
        kind = signature_of(file.rewound().read(SIGNATURE_BYTES))
        if kind is not None and kind.mend:
            raise _refused(file, kind)
        try:
            container = _container(file)
        except MemoryError:
            raise
        except (av.error.FFmpegError, OSError, ValueError) as error:
            if kind is not None and isinstance(error, av.error.ArgumentError):
                raise _refused(file, kind) from error
            raise MediaError(
                file,
                "not_media",
                "a file in a format that is not read here"
                if isinstance(error, av.error.ArgumentError)
                else f"a file FFmpeg cannot open ({_words(error)})",
                f"a video or audio file with its header: {USUAL}",
                "Check what it is; an mp4 cut short lacks its header and must be made or copied again.",
            ) from error
        with container, _told_of(file):
            yield container


@contextlib.contextmanager
def opened_picture(path: str | Path | MediaFile) -> Iterator[Image.Image]:
    """Opens a file as a picture of one of `PICTURES`; no pixel is decoded yet.

    Raises:
        MediaError: as `media_file` does, or it is no such picture.
    """
    with media_file(path) as file:
        try:
            picture = Image.open(file.rewound(), formats=PICTURES)
        except UnidentifiedImageError:
            kind = signature_of(file.rewound().read(SIGNATURE_BYTES))
            what, reason = (kind.what, kind.reason) if kind and kind.mend else ("not an image", "not_media")
            mend = kind.mend if kind and kind.mend else "Check what the file really is, and save it as PNG or JPEG."
            raise MediaError(file, reason, what, "a PNG, JPEG, WebP or the like", mend) from None
        except Image.DecompressionBombError as error:
            raise MediaError(file, "bad_size", f"{error}", "a photograph", "Scale the picture down.") from None
        with picture:
            yield picture


def _container(file: MediaFile) -> av.container.InputContainer:
    stream = file.rewound()
    ending = _ENDING.search(file.path)
    stream.name = "clip" + (ending.group() if ending else "")  # all FFmpeg learns of the name: some formats go by it
    return av.open(
        stream,
        "r",
        container_options={"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "none"},
        buffer_size=BUFFER_BYTES,
        io_open=_no_other_file,
    )


def _no_other_file(url: str, flags: int, options: dict) -> None:
    raise PermissionError(errno.EPERM, "it names another file, and none is opened")


@contextlib.contextmanager
def _told_of(file: MediaFile) -> Iterator[None]:
    """Turns what FFmpeg raises in the block into a MediaError of the file."""
    try:
        yield
    except (MediaError, MemoryError):
        raise
    except (av.error.FFmpegError, OSError) as error:
        raise MediaError(
            file, "corrupt", f"data that fails to decode ({_words(error)})", "a whole file", "Copy or encode it again."
        ) from error


def _refused(file: MediaFile, kind: Signature) -> MediaError:
    mend = kind.mend or "List stills under `images`."
    return MediaError(file, kind.reason, kind.what, f"a clip of its own: {USUAL}", mend)


def _words(error: Exception) -> str:
    """The part of an FFmpeg message that says something."""
    return getattr(error, "strerror", None) or str(error)


def _stream_of(path: str, root: str | Path) -> io.FileIO:
    """Opens a regular file that lies under the root once its links are resolved."""
    try:
        top = os.path.realpath(root) if str(root) else "/"
        resolved = os.path.realpath(path)
        if os.path.commonpath([top, resolved]) != top:
            raise _outside(path, top, f"a path that leads to {resolved}")
        faults.here("media_path_resolved", path)
        stream = io.FileIO(_descriptor(path, top, os.path.relpath(resolved, top).split(os.sep)), "rb")
    except MediaError:
        raise
    except (OSError, ValueError) as error:
        raise _unopened(path, root, error) from error
    try:
        _check_status(path, os.fstat(stream.fileno()))
    except MediaError:
        stream.close()
        raise
    return stream


def _descriptor(path: str, top: str, names: list[str]) -> int:
    """Opens a file below a folder without following any link, so that what was checked is what is opened.

    Args:
        path: for messages.
        top: the folder, without links.
        names: the folders below it, and the file.
    """
    at = os.open(top, _FOLDER)
    try:
        for name in names[:-1]:
            if stat.S_ISLNK(os.stat(name, dir_fd=at, follow_symlinks=False).st_mode):
                raise OSError(errno.ELOOP, "a link")
            below = os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=at)
            os.close(at)
            at = below
        # Looked at before: opening a device can have effects of its own.
        _check_kind(path, os.stat(names[-1], dir_fd=at, follow_symlinks=False))
        return os.open(names[-1], _FILE, dir_fd=at)
    finally:
        os.close(at)


def _check_kind(path: str, status: os.stat_result) -> None:
    mode = status.st_mode
    if stat.S_ISREG(mode):
        return
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, "a link")
    if stat.S_ISDIR(mode):
        raise MediaError(path, "missing", "a folder", "a media file", "Check the path and data.media_root.")
    what = "a named pipe" if stat.S_ISFIFO(mode) else "a socket" if stat.S_ISSOCK(mode) else "a device"
    raise MediaError(path, "not_media", what, "a regular file", "Name a file on disk.")


def _check_status(path: str, status: os.stat_result) -> None:
    _check_kind(path, status)
    if status.st_size == 0:
        raise MediaError(path, "empty", "an empty file", "a media file", "Copy or make it again.")
    if status.st_size > MAX_BYTES:
        size, most = f"{status.st_size / 2**30:.1f} GiB", f"at most {MAX_BYTES >> 30} GiB"
        raise MediaError(path, "too_large", f"a file of {size}", most, "Cut the clip, or encode it smaller.")


def _outside(path: str, top: str, found: str) -> MediaError:
    mend = "Copy the file into data.media_root; a symbolic link may not leave it."
    return MediaError(path, "outside", found, f"a file inside the media root {top}", mend)


def _unopened(path: str, root: str | Path, error: Exception) -> MediaError:
    """Returns the error for a file that the system does not open."""
    code = getattr(error, "errno", None)
    if code == errno.ELOOP:
        return _outside(path, str(root) or "/", "a symbolic link that leads in a circle or was put there just now")
    if code == errno.ENAMETOOLONG:
        found = "no such file; the name is longer than a file system keeps"
        return MediaError(path, "missing", found, "a media file", "Check the path and data.media_root.")
    if code in (errno.ENOENT, errno.ENOTDIR) or isinstance(error, ValueError):
        mend = "Check the path and data.media_root."
        if other := other_spelling(path):
            mend = f"Beside it lies {other!r}, which differs in letter case or Unicode form only: name that one."
        return MediaError(path, "missing", "no such file", "a media file", mend)
    found = f"a file that cannot be read ({_words(error)})"
    return MediaError(path, "unreadable", found, "one that can", "Mend its permissions.")
