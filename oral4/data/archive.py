"""Unpacking of archives that are not trusted, and the one number that says a folder holds what it should.

An archive may name files outside the folder, hold links, lie about its sizes, or unpack to terabytes.
:func:`unpack` writes only plain files that an allow-list names, below the folder, and counts the bytes
as they come. Python's own ``extractall`` has no allow-list and no cap.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import re
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from oral4.data.limits import DEFAULT, Limits, check_archive
from oral4.errors import DataError

__all__ = ["tree_sha256", "unpack"]

_OPENERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}


def tree_sha256(folder: Path, members: Sequence[str] = ("*",)) -> str:
    """Return the sha256 of the list of files below ``folder`` and of their own sha256.

    The list is what ``sha256sum`` prints for the relative paths in the order of their bytes, so that in
    the folder itself this shell line gives the same number::

        find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum

    Parameters
    ----------
    folder : Path
        The folder.
    members : sequence of str
        Patterns of relative paths as in :func:`unpack`; other files do not count.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    listing = hashlib.sha256()
    for name in sorted((name for name in paths if _wanted(name, members)), key=str.encode):
        with paths[name].open("rb") as file:
            listing.update(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  ./{name}\n".encode())
    return listing.hexdigest()


def unpack(
    archive: Path, folder: Path, *, members: Sequence[str], strip: int = 0, limits: Limits = DEFAULT
) -> list[str]:
    """Unpack the allowed members of a zip or tar archive into a new folder and return their relative paths.

    Parameters
    ----------
    archive : Path
        A zip, or a tar that is plain or compressed by gzip, bzip2 or xz; told by its first bytes.
    folder : Path
        Must not exist yet. It is removed again if anything fails.
    members : sequence of str
        Patterns of the relative paths to write, after ``strip``. ``*`` stands for any characters, slashes too.
        All other members are left alone.
    strip : int
        Number of leading folders to drop from every name; archives made by GitHub need 1.
    limits : Limits
        Caps on members, bytes and compression ratio.

    Raises
    ------
    DataError
        If the archive is damaged, is over a limit, names a path outside the folder, or if an allowed
        member is a link, a device or comes twice, or if no member is allowed.
    OSError
        If the folder cannot be written.
    """
    folder.mkdir(parents=True)
    written: list[str] = []
    try:
        with closing(_plain_files(archive, members, strip, limits)) as plain_files:
            for name, source in plain_files:
                target = folder / name
                try:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("xb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
                except (FileExistsError, NotADirectoryError) as error:
                    raise DataError(f"{archive.name}: {name} comes twice") from error
                written.append(name)
        if not written:
            raise DataError(f"{archive.name}: holds none of {', '.join(members)}")
    except BaseException:
        shutil.rmtree(folder)
        raise
    return written


@contextmanager
def _reading(archive: Path) -> Iterator[None]:
    """Turn whatever the decoders raise into ``DataError``; errors of writing do not pass through here."""
    try:
        yield
    except (DataError, MemoryError):
        raise
    except (RuntimeError, NotImplementedError) as error:  # a password, a rare compression
        raise DataError(f"{archive.name}: cannot be unpacked: {error}") from error
    except Exception as error:  # on damage they also raise OSError, ValueError, IndexError and more
        raise DataError(f"{archive.name}: the archive is damaged: {error or type(error).__name__}") from error


class _Meter:
    """Counts what one archive has given so far and stops at the limits."""

    def __init__(self, archive: Path, limits: Limits):
        self.archive, self.packed, self.limits = archive, archive.stat().st_size, limits
        self.members = self.bytes = 0

    def add(self, members: int = 0, num_bytes: int = 0) -> None:
        self.members += members
        self.bytes += num_bytes
        try:
            check_archive(self.members, self.bytes, self.packed, limits=self.limits)
        except DataError as error:
            raise DataError(f"{self.archive.name}: {error}") from None


class _Stream:
    """A stream of an archive whose errors are ``DataError``, and whose bytes are counted unless told otherwise."""

    def __init__(self, stream: Any, meter: _Meter, counted: bool = True):
        self.stream, self.meter, self.counted = stream, meter, counted

    def read(self, size: int) -> bytes:
        with _reading(self.meter.archive):
            block = self.stream.read(size)
        if self.counted:
            self.meter.add(num_bytes=len(block))
        return block


def _plain_files(archive: Path, members: Sequence[str], strip: int, limits: Limits) -> Generator[tuple[str, Any]]:
    """Yield the relative path and the bytes of every allowed member."""
    meter = _Meter(archive, limits)
    with _reading(archive), ExitStack() as stack:
        raw = stack.enter_context(archive.open("rb"))
        magic = raw.read(6)
        raw.seek(0)
        if magic.startswith(b"PK"):
            zipped = stack.enter_context(zipfile.ZipFile(raw))
            for info in zipped.infolist():
                meter.add(members=1)
                # Systems other than Unix leave the file type at 0.
                is_plain = stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)
                if name := _allowed(info.filename, info.is_dir(), is_plain, archive, members, strip):
                    with zipped.open(info) as stream:
                        yield name, _Stream(stream, meter)
            return
        opener: Any = next((opener for start, opener in _OPENERS.items() if magic.startswith(start)), None)
        plain: Any = stack.enter_context(opener(raw)) if opener else raw
        # The meter sits below tarfile: what it skips, and headers of any length, count as well.
        metered: Any = _Stream(plain, meter)
        tar = stack.enter_context(tarfile.open(fileobj=metered, mode="r|"))
        for member in tar:
            meter.add(members=1)
            is_plain = member.isfile() and not member.issparse()
            if name := _allowed(member.name, member.isdir(), is_plain, archive, members, strip):
                yield name, _Stream(tar.extractfile(member), meter, counted=False)


def _allowed(name: str, is_folder: bool, is_plain: bool, archive: Path, members: Sequence[str], strip: int) -> str:
    """Return the path to write, or nothing if the member is a folder or not on the list."""
    parts = name.split("/")
    if name.startswith("/") or ".." in parts or re.search(r"[\x00-\x1f\x7f\\:]", name):
        raise DataError(f"{archive.name}: refused, it names {name!r}, which may lie outside the folder")
    path = "/".join([part for part in parts if part not in ("", ".")][strip:])
    if not path or is_folder or not _wanted(path, members):
        return ""
    if not is_plain:
        raise DataError(f"{archive.name}: refused, {name!r} is a link or a device, not a plain file")
    return path


def _wanted(path: str, members: Sequence[str]) -> bool:
    return any(fnmatchcase(path, pattern) for pattern in members)
