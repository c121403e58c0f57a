"""A clip on its way in: into a folder of its own, no larger and no slower than allowed, gone when it is answered."""

from __future__ import annotations

import asyncio
import pathlib
import re
import tempfile
from collections.abc import AsyncIterator

MEGABYTE = 1_000_000
_SUFFIX = re.compile(r"\.[a-z0-9]{1,5}")


class UploadError(Exception):
    """A clip that is not taken.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, status: int, message: str):
        super().__init__(message)
        self.status = status


class Upload:
    """A folder for one clip; `remove` deletes both.

    Args:
        root: folder in which it is made.
        name: what the clip's owner calls it; nothing of it is used but an ending, which some formats are told by.

    Raises:
        UploadError: there is no room.
    """

    def __init__(self, root: pathlib.Path, name: str):
        try:
            self._folder = tempfile.TemporaryDirectory(dir=root)
        except OSError as error:
            raise _no_room(error) from error
        suffix = pathlib.PurePath(name).suffix.lower()
        # No two clips have one name: whoever reads clips takes another content under a name for a mistake.
        folder = pathlib.Path(self._folder.name)
        self.path = folder / f"{folder.name}{suffix if _SUFFIX.fullmatch(suffix) else ''}"

    def remove(self) -> None:
        """Deletes the clip and its folder. Twice does no harm."""
        self._folder.cleanup()

    async def receive(self, body: AsyncIterator[bytes], max_bytes: int, seconds: float) -> None:
        """Writes the clip.

        Args:
            body: its bytes as they come.
            max_bytes, seconds: it may have, and take.

        Raises:
            UploadError: it is empty, too large or too slow, or there is no room for it.
        """
        size = 0
        try:
            with open(self.path, "xb") as file:
                async with asyncio.timeout(seconds):
                    async for piece in body:
                        size += len(piece)
                        if size > max_bytes:
                            raise too_large(f"more than {max_bytes / MEGABYTE:g} MB", max_bytes)
                        file.write(piece)
        except TimeoutError as error:
            raise UploadError(
                408,
                f"the clip: got {size / MEGABYTE:.1f} MB in {seconds:g} s, expected all by then; send a smaller one",
            ) from error
        except OSError as error:
            raise _no_room(error) from error
        if not size:
            raise UploadError(400, "the clip: got an empty file, expected a video or a sound; choose another")


def _no_room(error: OSError) -> UploadError:
    return UploadError(
        507,
        f"the clip: got no place for it on the machine that answers ({error.strerror}), expected room in its folder of "
        "temporary files; make some there, or name another folder as TMPDIR",
    )


def too_large(got: str, max_bytes: int) -> UploadError:
    """The refusal of a clip of that size."""
    return UploadError(
        413,
        f"the clip: got {got}, expected at most {max_bytes / MEGABYTE:g} MB; cut it, or start the page with a larger "
        "--max_mb",
    )
