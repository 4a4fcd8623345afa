"""The one way in which sound and video files are opened: listed formats and codecs, and nothing but the file itself.

FFmpeg would otherwise follow what a file points to: playlists, lists of parts and some containers name other files and
addresses, and its list of formats reaches to screens and networks. Here the format is recognised by content among those
that the caller lists, every attempt to open anything else is refused, and one thread decodes.
"""

import io
import itertools
import os
import re
import stat
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
MAX_BYTES = 2**32  # of a file: what a WAV can hold
_MAX_PARTS = 2**20  # that are looked at for where a file should end: of 255 bytes each in a GIF
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
        MediaFileError: (as `error`) no such file, no regular file, an empty one, one above MAX_BYTES, one of another
            format, or a damaged one.
    """
    what = f"{len(source)} bytes" if isinstance(source, bytes) else repr(source.name)
    try:
        file = io.BytesIO(source) if isinstance(source, bytes) else _open_nameless(source)
    except (OSError, ValueError) as cause:  # a name with a zero byte is a ValueError
        raise error("cannot be opened", f"{what} cannot be opened: {cause}") from cause
    with file:
        try:
            n_bytes = file.seek(0, io.SEEK_END)
            file.seek(0)
            head = file.read(12)
            cut_short = n_bytes <= MAX_BYTES and _is_cut_short(file, n_bytes)
            file.seek(0)
        except (OSError, ValueError) as cause:
            raise error("damaged file", f"{what} are not a whole {kind} file: {cause}") from cause
        if not head:
            raise error("empty file", f"0 bytes are not a {kind} file: the file is empty")
        if n_bytes > MAX_BYTES:
            raise error("file too large", f"a {kind} file of {n_bytes} bytes, expected at most {MAX_BYTES}: cut it")
        if cut_short:
            raise error("cut short", f"{what} are not a whole {kind} file: its end is missing")
        restrictions = {
            "format_whitelist": ",".join(formats),
            "codec_whitelist": ",".join(codecs),
            "protocol_whitelist": "none",
        }
        try:
            container = av.open(
                file,
                "r",
                options=options,
                container_options=restrictions,
                metadata_errors="replace",  # tags are often in Latin-1, and nobody reads them here
                io_open=_refuse_to_open,
            )
        except (av.FFmpegError, OSError, ValueError, _OpensAnotherFile) as cause:
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
        except (av.FFmpegError, OSError, ValueError, ArithmeticError, RuntimeError, MemoryError) as cause:
            raise error("damaged file", f"{what} are not a whole {kind} file: {cause}") from cause


class _OpensAnotherFile(Exception):
    """A file asked for another one to be opened."""


def _open_nameless(path: Path) -> io.BufferedReader:
    """Open a regular file by its descriptor: FFmpeg gets no name from which to guess a format."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a named pipe would wait for its writer
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError("it is no regular file")
    return os.fdopen(descriptor, "rb")


def _refuse_to_open(url: str, flags: int, options: dict[str, str]) -> NoReturn:
    raise _OpensAnotherFile(repr(url))


def _is_cut_short(file: BinaryIO, n_bytes: int) -> bool:
    """Whether the end is missing of a file whose parts state their sizes and which FFmpeg reads as far as it goes."""
    file.seek(0)
    head = file.read(12)
    if head.startswith(b"RIFF") and head.endswith(b"WAVE"):
        return _wav_end(file, n_bytes) > n_bytes
    if head.startswith(b"RIFF") and head.endswith(b"AVI "):
        return 8 + int.from_bytes(head[4:8], "little") > n_bytes
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return _matroska_end(file, n_bytes) > n_bytes
    if head[4:8] == b"ftyp":
        return _mp4_end(file, n_bytes) > n_bytes
    return head.startswith(b"GIF") and _gif_end(file) > n_bytes


def _parts() -> Iterator[None]:
    """Count the parts that are looked at.

    Raises:
        ValueError: there are more than _MAX_PARTS.
    """
    yield from itertools.repeat(None, _MAX_PARTS)
    raise ValueError(f"it has more than {_MAX_PARTS} parts")


def _wav_end(file: BinaryIO, n_bytes: int) -> int:
    """Return where the samples of a WAV should end, 0 where it does not say."""
    place = 12
    for _ in _parts():
        if place + 8 > n_bytes:
            break
        file.seek(place)
        name, size = struct.unpack("<4sI", file.read(8))
        if name == b"data":
            return place + 8 + size if size < _UNKNOWN_SIZE else 0
        place += 8 + size + size % 2
    return 0


def _mp4_end(file: BinaryIO, n_bytes: int) -> int:
    """Return where the last box of an MP4 should end, 0 where it does not say. What follows the film and its samples
    and has no name of a box is no part of them."""
    place = 0
    seen: set[bytes] = set()
    for _ in _parts():
        if place + 8 > n_bytes:
            break
        file.seek(place)
        size, name = struct.unpack(">I4s", file.read(8))
        if {b"moov", b"mdat"} <= seen and not all(0x20 <= letter < 0x7F for letter in name):
            break
        seen.add(name)
        if size == 1:
            size = int.from_bytes(file.read(8))
        if size < 8:
            return 0  # up to the end, or damaged: FFmpeg judges
        place += size
    return place


def _matroska_end(file: BinaryIO, n_bytes: int) -> int:
    """Return where the segment of a Matroska file should end, 0 where it does not say."""
    file.seek(4)
    header = _matroska_size(file) or 0
    segment = file.tell() + header
    if segment > n_bytes:
        return segment
    file.seek(segment)
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
    parts = _parts()
    for _ in parts:
        mark = file.read(1)
        if not mark:
            break
        if mark == b",":
            file.seek(_palette_bytes(file.read(9)[8:]) + 1, io.SEEK_CUR)
        elif mark == b"!":
            file.seek(1, io.SEEK_CUR)
        else:
            return file.tell()  # the trailer, or no block at all: FFmpeg judges
        for _ in parts:
            size = int.from_bytes(file.read(1))
            if not size:
                break
            file.seek(size, io.SEEK_CUR)
    return file.tell() + 1


def _palette_bytes(flags: bytes) -> int:
    return 3 << (flags[0] % 8 + 1) if flags and flags[0] & 128 else 0
