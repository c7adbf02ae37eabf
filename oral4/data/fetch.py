"""Files by name: from your own folder, else from the cache, else from the internet, and always checked.

``fetch("ett/ETTh1.csv")`` returns a path whose size and sha256 are those of the registry
(``registry.toml`` beside this file). It looks below ``$ORAL4_DATA``, then below
:func:`oral4.settings.cache_dir`, and only then downloads: by https, never more bytes than registered,
into a temporary file that is renamed once it is verified. A failure leaves nothing behind and raises
:class:`~oral4.errors.DataError` with what you need to put the file there yourself.

>>> describe("ett/ETTh1.csv").licence
'CC BY-ND 4.0'
>>> fetch("ett/ETTh1")
Traceback (most recent call last):
    ...
oral4.errors.DataError: 'ett/ETTh1' is not registered; did you mean ett/ETTh1.csv, ett/ETTh2.csv?
"""

from __future__ import annotations

import difflib
import errno
import hashlib
import os
import re
import tempfile
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path, PurePosixPath

from oral4 import settings
from oral4.data.archive import tree_sha256, unpack
from oral4.data.download import download
from oral4.errors import DataError

__all__ = ["Entry", "available", "describe", "fetch", "names"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What the registry knows about one name."""

    name: str
    """Path below ``$ORAL4_DATA`` and below the cache."""
    urls: tuple[str, ...]
    """Where to download, in the order of trying."""
    bytes: int
    """Size of the file, or of the archive; an upper bound for an archive without ``sha256``."""
    title: str
    home: str
    licence: str
    citation: str
    sha256: str = ""
    """Of the file, or of the archive. An archive that its server packs anew, whose bytes may change while its
    content does not, has none: there ``tree_sha256`` alone decides."""
    members: tuple[str, ...] = ()
    """For an archive, what is unpacked; see :func:`oral4.data.archive.unpack`."""
    strip: int = 0
    """For an archive, the number of leading folders to drop."""
    tree_sha256: str = ""
    """For an archive, of the folder; see :func:`oral4.data.archive.tree_sha256`."""

    def __post_init__(self) -> None:
        path = PurePosixPath(self.name)
        if path.is_absolute() or ".." in path.parts or str(path) != self.name or self.name == ".":
            raise ValueError(f"registry: {self.name!r} is not a relative path in its shortest form")
        hashes = [self.tree_sha256, *([self.sha256] if self.sha256 else [])] if self.members else [self.sha256]
        if not all(re.fullmatch("[0-9a-f]{64}", value) for value in hashes):
            raise ValueError(f"registry: {self.name} needs sha256 (an archive also tree_sha256), 64 hexadecimal digits")
        if self.bytes < 1 or not self.urls or not self.licence:
            raise ValueError(f"registry: {self.name} needs bytes, urls and a licence")

    def __str__(self) -> str:
        checked = ("sha256", self.sha256) if self.sha256 else ("tree", self.tree_sha256)
        rows = [("url", url) for url in self.urls] + [("bytes", f"{self.bytes:,}"), checked]
        rows += [("licence", self.licence), ("from", f"{self.title}, {self.home}"), ("cite", self.citation)]
        return "\n".join([self.name, *(f"  {label:8}{value}" for label, value in rows)])


def fetch(name: str, *, offline: bool | None = None) -> Path:
    """Return the path of a registered file, downloading it if it is nowhere at hand.

    Before a download one line on standard output says the name, the size, the server and the licence.

    Parameters
    ----------
    name : str
        One of :func:`names`, for example ``"ett/ETTh1.csv"``.
    offline : bool, optional
        True forbids the download; by default ``$ORAL4_OFFLINE`` decides.

    Returns
    -------
    Path
        A file, or for an archive the folder that it was unpacked to. Do not write to it.

    Raises
    ------
    DataError
        If the name is unknown; if your own file is damaged; if there is no file and downloads are off; if
        every download failed or gave wrong bytes; if the cache cannot be written.

    Guarantees
    ----------
    The size and sha256 of what is returned are the registry's, checked on every call. A file below
    ``$ORAL4_DATA`` is never changed; a damaged one below the cache is replaced.
    """
    return _fetch(describe(name), offline=settings.offline(offline))


def available(name: str) -> bool:
    """Return whether ``fetch(name)`` needs no network: the file is at hand and intact.

    Raises
    ------
    DataError
        If the name is unknown.
    """
    entry = describe(name)
    first = next((path for path in _places(entry) if os.path.exists(path)), None)
    return first is not None and _fault(first, entry) is None


def describe(name: str) -> Entry:
    """Return urls, size, sha256, licence, home and citation of a registered file; ``print`` shows them.

    Raises
    ------
    DataError
        If the name is unknown; the message lists close matches.
    """
    registry = _registry()
    if name not in registry:
        close = difflib.get_close_matches(str(name), registry, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else f"choose one of {', '.join(registry)}"
        raise DataError(f"{name!r} is not registered; {hint}")
    return registry[name]


def names() -> tuple[str, ...]:
    """Return all registered names.

    >>> "pjm/PJME_hourly.csv" in names()
    True
    """
    return tuple(_registry())


@lru_cache
def _registry() -> dict[str, Entry]:
    return _parse(resources.files("oral4.data").joinpath("registry.toml").read_text(encoding="utf-8"))


def _parse(text: str) -> dict[str, Entry]:
    """Return the entries of a registry; see the head of ``registry.toml`` for its form."""
    table = tomllib.loads(text)
    entries = {}
    for name, file in table["files"].items():
        try:
            source = dict(table["sources"][file.pop("source")])
            path = file.pop("path", name.partition("/")[2] or name)
            urls = tuple(prefix + path for prefix in source.pop("urls"))
            entries[name] = Entry(name=name, urls=urls, members=tuple(file.pop("members", ())), **source, **file)
        except (KeyError, TypeError) as error:
            raise ValueError(f"registry: {name}: {error}") from error
        if not all(url.startswith("https://") for url in urls):
            raise ValueError(f"registry: {name} has a url that is not https: {', '.join(urls)}")
    return entries


def _places(entry: Entry) -> list[Path]:
    folders = [folder for folder in (settings.data_dir(), settings.cache_dir()) if folder is not None]
    return [folder / entry.name for folder in folders]


def _fault(path: Path, entry: Entry) -> str | None:
    """Say what is wrong with what lies at ``path``, or return None."""
    try:
        if entry.members:
            found = tree_sha256(path, entry.members) if path.is_dir() else "not a folder"
            return None if found == entry.tree_sha256 else f"its files differ from the registered ones (tree {found})"
        if not path.is_file():
            return "it is not a file"
        size = path.stat().st_size
        if size != entry.bytes:
            return f"it has {size:,} bytes instead of {entry.bytes:,}"
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return None if digest == entry.sha256 else f"its sha256 is {digest} instead of {entry.sha256}"
    except OSError as error:
        return f"it cannot be read: {error.strerror}"


def _fetch(entry: Entry, *, offline: bool, insecure_server: str | None = None) -> Path:
    """Do what :func:`fetch` says. ``insecure_server`` is for tests, see :func:`~oral4.data.download.download`."""
    *own, cached = _places(entry)
    for path in own:
        if os.path.exists(path):
            if fault := _fault(path, entry):
                raise DataError(f"{path} is damaged: {fault}. Replace it or take it away.\n{_by_hand(entry)}")
            return path
    state = "is not at hand"
    if os.path.exists(cached):
        fault = _fault(cached, entry)
        if fault is None:
            return cached
        state = f"at {cached} is damaged ({fault})"
    if offline:
        raise DataError(f"{entry.name} {state}; downloads are off (offline=True or ORAL4_OFFLINE).\n{_by_hand(entry)}")
    host = entry.urls[0].split("/")[2]
    print(f"oral4: downloading {entry.name}, {entry.bytes:,} bytes, from {host}; licence: {entry.licence}", flush=True)
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(prefix=".oral4-", dir=cached.parent) as work:
            try:
                file = download(entry.urls, entry.bytes, entry.sha256, Path(work), insecure_server=insecure_server)
            except DataError as error:
                raise DataError(f"{entry.name} could not be downloaded:\n{error}\n{_by_hand(entry)}") from error
            _publish(_unpacked(entry, file) if entry.members else file, cached, entry)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
        room = f"{entry.bytes:,} bytes free{' and room to unpack' if entry.members else ''}"
        raise DataError(
            f"{entry.name} cannot be stored at {cached}: {'the disk is full' if full else error}. "
            f"Set ORAL4_CACHE to a folder that you may write, with {room}."
        ) from error
    return cached


def _unpacked(entry: Entry, archive: Path) -> Path:
    folder = archive.with_name("unpacked")
    unpack(archive, folder, members=entry.members, strip=entry.strip)
    if fault := _fault(folder, entry):
        raise DataError(f"{entry.name}: the archive is the registered one, but {fault}")
    return folder


def _publish(new: Path, cached: Path, entry: Entry) -> None:
    """Rename ``new`` to ``cached`` in one step, in the place of a damaged copy if there is one."""
    try:
        os.replace(new, cached)
    except OSError:
        # A file replaces a file, but a folder that holds something stands in the way.
        if not cached.exists():
            raise
        if _fault(cached, entry) is not None:  # else another process was faster, and did the same
            cached.rename(new.with_name("replaced"))
            os.replace(new, cached)


def _by_hand(entry: Entry) -> str:
    """Say what the file is and where to put it."""
    what = f"unpack {', '.join(entry.members)} of it so that the folder is" if entry.members else "put it at"
    places = " or ".join(str(path) for path in _places(entry))
    own = settings.data_dir()
    if own is None:
        hint = f"; or set ORAL4_DATA to a folder that holds {entry.name}"
    else:
        hint = "" if own.is_dir() else f"; ORAL4_DATA={own} is not a folder"
    return f"{entry}\n  By hand: {what} {places}{hint}."
