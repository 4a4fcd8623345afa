"""The one way in which sound and video files are opened: listed formats and codecs, and nothing but the file itself.

FFmpeg would otherwise follow what a file points to: playlists, lists of parts and some containers name other files and
addresses, and its list of formats reaches to screens and networks. Here the format is recognised by content among those
that the caller lists, every attempt to open anything else is refused, and one thread decodes.
"""

import io
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import av
from av.container import InputContainer

from omniform.tokenizers.base import TokenizerError

# How files of the listed formats begin, to tell a damaged one from one of another kind.
_SIGNATURES = re.compile(
    rb"RIFF|RF64|fLaC|OggS|ID3|\xff[\xe2-\xff]|....(ftyp|moov|mdat|free|skip|wide)|\x1a\x45\xdf\xa3|GIF8", re.DOTALL
)


class MediaFileError(TokenizerError):
    """A sound or video file that cannot be read or written, with the reason by which such files are counted."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


@contextmanager
def open_container(
    source: bytes | Path,
    kind: str,
    formats: Sequence[str],
    codecs: Sequence[str],
    error: type[MediaFileError],
    options: dict[str, str],
) -> Iterator[InputContainer]:
    """Yield an opened file; whatever FFmpeg raises inside of the block becomes `error`.

    Args:
        kind: what the file should be ("sound", "video"), for messages.
        formats: names of FFmpeg's demuxers that may read it.
        codecs: names of FFmpeg's decoders that may run.
        options: bounds for every decoder, such as max_pixels.

    Raises:
        MediaFileError: (as `error`) no such file, an empty one, one of another format, or a damaged one.
    """
    what = f"{len(source)} bytes" if isinstance(source, bytes) else repr(source.name)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else _open_nameless(source)
    except OSError as cause:
        raise error("cannot be opened", f"{what} cannot be opened: {cause.strerror}") from cause
    with file:
        head = file.read(12)
        if not head:
            raise error("empty file", f"0 bytes are not a {kind} file: the file is empty")
        file.seek(0)
        restrictions = {
            "format_whitelist": ",".join(formats),
            "codec_whitelist": ",".join(codecs),
            "protocol_whitelist": "none",
        }
        try:
            with av.open(file, options=options, container_options=restrictions, io_open=_refuse_to_open) as container:
                yield container
        except _OpensAnotherFile as cause:
            raise error(
                "points to another file", f"{what} ask for {cause} to be opened: only itself is read"
            ) from cause
        except (av.FFmpegError, ValueError, ArithmeticError, RuntimeError, MemoryError) as cause:
            if isinstance(cause, MediaFileError):
                raise
            if isinstance(cause, av.error.ArgumentError) or not _SIGNATURES.match(head):
                raise error(
                    f"not a {kind} file of a known format",
                    f"{what} are not a {kind} file of a known format ({', '.join(formats)}): they begin with {head!r}; "
                    "convert other formats first",
                ) from cause
            raise error("damaged file", f"{what} are not a whole {kind} file: {cause}") from cause


class _OpensAnotherFile(Exception):
    """A file asked for another one."""


def _open_nameless(path: Path) -> io.BufferedReader:
    """Open a file by its descriptor: FFmpeg gets no name from which to guess a format."""
    return os.fdopen(os.open(path, os.O_RDONLY), "rb")


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise _OpensAnotherFile(repr(url))
