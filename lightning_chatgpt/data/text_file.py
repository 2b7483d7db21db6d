"""A text file as it is read: unpacked, as UTF-8, and its faults told: UTF-16, Latin-1, NUL characters, a file that breaks off."""

from __future__ import annotations

import codecs
import contextlib
import gzip
import io
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from lightning_chatgpt.chat.faults import Faults
from lightning_chatgpt.errors import DataError

PACKED = (".gz", ".zst")
AGAIN = "fetch or write the file anew, or set data.on_fault to skip to use what stands before"

_CHUNK = 1 << 20


class TextFile:
    """A text file as UTF-8: unpacked, recoded where it was UTF-16, the mark at its start left out.

    Args:
        path: The file; packed, if its suffix is one of :data:`PACKED`.
        faults: What is done about faults.

    Attributes:
        start: The offset of the first byte of ``stream``.
        unit: What offsets count, where it is not the file's own bytes.
        cut: Why the file breaks off, where it does and nobody was told.
        stream: The bytes.

    Raises:
        DataError: A package to unpack it is missing, or it is UTF-16 and that is an error.
        SkipRecord: It is UTF-16 and left out.
    """

    def __init__(self, path: Path, *, faults: Faults) -> None:
        self.path = path
        self.faults = faults
        self.cut = ""
        self.unit = " of the uncompressed text" if path.suffix.lower() in PACKED else ""
        with contextlib.closing(self._unpacked()) as pieces:
            head = next(filter(None, pieces), b"")[:8]
        self._codec = _utf16(head)
        if self._codec:
            faults.place = str(path)
            faults.mend("wrong_encoding", "the file is UTF-16; save it as UTF-8, or set data.on_fault to fix to read it as UTF-16")
            self.unit = " of the text as UTF-8"
        self.start = len(codecs.BOM_UTF8) if head.startswith(codecs.BOM_UTF8) else 0
        self.rewind()

    def rewind(self) -> None:
        """Begin again."""
        self.cut = ""
        self.stream = io.BufferedReader(_Raw(self._recoded() if self._codec else self._unpacked()), _CHUNK)
        self.stream.read(self.start)

    def close(self) -> None:
        """Close it."""
        self.stream.close()

    def truncated(self, message: str) -> NoReturn:
        """Tell that the file ends in the middle of the record at hand.

        Raises:
            DataError: That is an error.
            SkipRecord: What is cut is left out.
        """
        why = f" ({self.cut})" if self.cut else ""
        self.cut = ""
        self.faults.refuse("truncated_file", f"{message}{why}; {AGAIN}")

    def check_whole(self) -> None:
        """Tell that the file breaks off, unless that was told; raises as :meth:`truncated` does."""
        if self.cut:
            self.faults.place = str(self.path)
            self.truncated("the compressed file breaks off")

    def decode(self, data: bytes, *, byte: int) -> str:
        """Bytes of a record to text, mended where they are not UTF-8 or hold NUL characters.

        Args:
            data: The bytes.
            byte: The offset of the first of them.

        Raises:
            DataError: They are not UTF-8 or hold NUL characters, and that is an error.
            SkipRecord: The same, and the record is left out.
        """
        try:
            text = data.decode()
        except UnicodeDecodeError as error:
            start = error.start
            like = _latin(data)[max(0, start - 12) : start + 12]
            self.faults.mend(
                "wrong_encoding",
                f"byte {byte + start}{self.unit} is 0x{data[start]:02X}, which is not UTF-8; it looks like Latin-1: {like!r}; "
                "save the file as UTF-8, or set data.on_fault to fix to read it as Latin-1",
            )
            text = _latin(data)
        if "\0" in text:
            where = f"byte {byte + data.index(0)}{self.unit}"
            self.faults.mend("nul_bytes", f"{where} is NUL, which no text holds; remove it, or set data.on_fault to fix to leave it out")
            text = text.replace("\0", "")
        return text

    def _unpacked(self) -> Generator[bytes, None, None]:
        suffix = self.path.suffix.lower()
        with self.path.open("rb") as file:
            pieces = _gunzip(file) if suffix == ".gz" else _unzstd(file) if suffix == ".zst" else iter(lambda: file.read(_CHUNK), b"")
            try:
                yield from pieces
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                self.cut = str(error).rstrip(".")

    def _recoded(self) -> Generator[bytes, None, None]:
        decoder = codecs.getincrementaldecoder(self._codec)("replace")
        for piece in self._unpacked():
            yield decoder.decode(piece).encode()
        yield decoder.decode(b"", final=True).encode()


class _Raw(io.RawIOBase):
    """A file of the pieces that an iterator gives."""

    def __init__(self, pieces: Generator[bytes, None, None]) -> None:
        self._pieces = pieces
        self._left = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._left:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._left = memoryview(piece)
        size = min(len(buffer), len(self._left))
        buffer[:size], self._left = self._left[:size], self._left[size:]
        return size

    def close(self) -> None:
        self._pieces.close()
        super().close()


def _gunzip(file: IO[bytes]) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unpacked:
        # read1 gives what there is before it meets a cut; read would throw that away.
        yield from iter(lambda: unpacked.read1(_CHUNK), b"")


def _unzstd(file: IO[bytes]) -> Iterator[bytes]:
    try:
        import zstandard
    except ImportError:
        raise DataError(f"{file.name}: .zst files need the package zstandard: pip install 'lightning-chatgpt[data]'") from None
    frame = None
    # zstandard's own reader takes a cut file for a whole one. A few bytes at a time, as they may unpack to thousands as many.
    while data := file.read(4096):
        while data:
            frame = frame or zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()
            try:
                yield frame.decompress(data)
            except zstandard.ZstdError as error:
                raise EOFError(str(error)) from None
            data = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame is not None:
        raise EOFError("Compressed file ended in the middle of a frame")


def _utf16(head: bytes) -> str:
    """Python's name of the UTF-16 that a file begins with, empty if it is none."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "utf-16"
    even, odd = head[::2], head[1::2]
    if len(head) >= 4 and all(even) and not any(odd):
        return "utf-16-le"
    return "utf-16-be" if len(head) >= 4 and all(odd) and not any(even) else ""


def _latin(data: bytes) -> str:
    try:
        return data.decode("cp1252")  # Latin-1 with quotes and dashes, as Windows writes it
    except UnicodeDecodeError:
        return data.decode("latin-1")
