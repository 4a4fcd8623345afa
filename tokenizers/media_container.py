"""The one way in which sound and video files are opened: listed formats and codecs, and nothing but the file itself.

FFmpeg would otherwise follow what a file points to: playlists, lists of parts and some containers name other files and
addresses, and its list of formats reaches to screens and networks. Here the format is recognised by content among those
that the caller lists, every attempt to open anything else is refused, and one thread decodes.
"""

import io
import os
import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NoReturn

import av
from av.container import InputContainer

from omniform.tokenizers.base import TokenizerError

# How files of the listed formats begin, to tell a damaged one from one of another kind.
_SIGNATURES = re.compile(
    rb"RIFF|RF64|fLaC|OggS|ID3|\xff[\xe2-\xff]|....(ftyp|moov|mdat|free|skip|wide)|\x1a\x45\xdf\xa3|GIF8", re.DOTALL
)


_UNKNOWN_SIZE = 0x7FFF0000  # streams say as much or more, for they cannot know


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
        if _is_cut_short(file):
            raise error("cut short", f"{what} are not a whole {kind} file: its end is missing")
        file.seek(0)
        restrictions = {
            "format_whitelist": ",".join(formats),
            "codec_whitelist": ",".join(codecs),
            "protocol_whitelist": "none",
        }
        try:
            container = av.open(file, "r", options=options, container_options=restrictions, io_open=_refuse_to_open)
        except (av.FFmpegError, ValueError, _OpensAnotherFile) as cause:
            # FFmpeg answers that its argument is invalid where the format is not listed.
            if isinstance(cause, av.error.ArgumentError) or not _SIGNATURES.match(head):
                raise error(
                    f"not a {kind} file of a known format",
                    f"{what} are not a {kind} file of a known format ({', '.join(formats)}): they begin with {head!r}; "
                    "convert other formats first",
                ) from cause
            raise error("damaged file", f"{what} are not a whole {kind} file: {cause}") from cause
        try:
            with container:
                yield container
        except MediaFileError:
            raise
        except (av.FFmpegError, ValueError, ArithmeticError, RuntimeError, MemoryError) as cause:
            raise error("damaged file", f"{what} are not a whole {kind} file: {cause}") from cause


class _OpensAnotherFile(Exception):
    """A file asked for another one to be opened."""


def _open_nameless(path: Path) -> io.BufferedReader:
    """Open a file by its descriptor: FFmpeg gets no name from which to guess a format."""
    return os.fdopen(os.open(path, os.O_RDONLY), "rb")


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise _OpensAnotherFile(repr(url))


def _is_cut_short(file: BinaryIO) -> bool:
    """Whether the end is missing of a file whose parts state their sizes and which FFmpeg reads as far as it goes."""
    n_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    head = file.read(12)
    if head.startswith(b"RIFF") and head.endswith(b"WAVE"):
        return _wav_end(file, n_bytes) > n_bytes
    if head.startswith(b"RIFF") and head.endswith(b"AVI "):
        return 8 + int.from_bytes(head[4:8], "little") > n_bytes
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska_end(file) > n_bytes
    if head[4:8] == b"ftyp":
        return _mp4_end(file, n_bytes) > n_bytes
    return head.startswith(b"GIF") and _gif_end(file) > n_bytes


def _wav_end(file: BinaryIO, n_bytes: int) -> int:
    """Return where the samples of a WAV should end, 0 where it does not say."""
    place = 12
    while place + 8 <= n_bytes:
        file.seek(place)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            return place + 8 + size if size < _UNKNOWN_SIZE else 0
        place += 8 + size + size % 2
    return 0


def _mp4_end(file: BinaryIO, n_bytes: int) -> int:
    """Return where the last box of an MP4 should end, 0 where it does not say."""
    place = 0
    while place + 8 <= n_bytes:
        file.seek(place)
        size = int.from_bytes(file.read(4))
        if size == 1:
            file.seek(4, io.SEEK_CUR)
            size = int.from_bytes(file.read(8))
        if size < 8:
            return 0  # up to the end, or damaged: FFmpeg judges
        place += size
    return place


def _matroska_end(file: BinaryIO) -> int:
    """Return where the segment of a Matroska file should end, 0 where it does not say."""
    file.seek(4)
    file.seek(_matroska_size(file) or 0, io.SEEK_CUR)
    if file.read(4) != b"\x18\x53\x80\x67":
        return 0
    size = _matroska_size(file)
    return 0 if size is None else file.tell() + size


def _matroska_size(file: BinaryIO) -> int | None:
    """Read a size: as many bytes as the first one has leading zeros, and one; all ones stand for an unknown size."""
    first = int.from_bytes(file.read(1))
    n_following = 8 - first.bit_length()
    value = int.from_bytes(bytes([first & (0x7F >> n_following)]) + file.read(min(n_following, 7)))
    return None if value == (1 << 7 * (n_following + 1)) - 1 else value


def _gif_end(file: BinaryIO) -> int:
    """Return where a GIF ends: after its trailer, or after a block that its bytes do not hold."""
    file.seek(10)
    flags = file.read(3)
    file.seek(_palette_bytes(flags[:1]), io.SEEK_CUR)
    while mark := file.read(1):
        if mark == b",":
            file.seek(_palette_bytes(file.read(9)[8:]) + 1, io.SEEK_CUR)
        elif mark == b"!":
            file.seek(1, io.SEEK_CUR)
        else:
            return file.tell()  # the trailer, or no block at all: FFmpeg judges
        while size := int.from_bytes(file.read(1)):
            file.seek(size, io.SEEK_CUR)
    return file.tell() + 1


def _palette_bytes(flags: bytes) -> int:
    return 3 << (flags[0] % 8 + 1) if flags and flags[0] & 128 else 0
