"""One file from the internet into one folder: https only, capped, verified, with retries over mirrors.

pooch brings the temporary file, the check of the sha256 and the rename. Here are the parts that it leaves open: no
byte more than announced, no address without TLS even after a redirect, and which failures are worth a second try.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from oral4.errors import DataError

if TYPE_CHECKING:
    import requests

__all__ = ["download"]

_ROUNDS = 3
"""How often every url is tried."""
_PAUSE_SECONDS = 1.0
"""Wait before the second round; it doubles for the third."""
_TIMEOUT_SECONDS = (10.0, 60.0)
"""For the connection, and between two blocks."""


def download(
    urls: Sequence[str], num_bytes: int, sha256: str, folder: Path, *, insecure_server: str | None = None
) -> Path:
    """Return the path of the downloaded file in ``folder``, named as in the first url.

    Parameters
    ----------
    urls : sequence of str
        Mirrors of the same file, https, tried in turn. Those whose failure may pass are tried again.
    num_bytes : int
        The exact size; without ``sha256`` the most that is taken.
    sha256 : str
        64 hexadecimal digits; ``""`` for an archive that its server packs anew for everyone, whose content the
        caller then checks.
    folder : Path
        An existing folder.
    insecure_server : str, optional
        For tests only: the one address that may go without TLS, ``"http://127.0.0.1:<port>/"``.

    Raises
    ------
    DataError
        If no url gave the file; every url is listed with its reason.
    OSError
        If the folder cannot be written.
    """
    import pooch
    import requests

    fname = re.sub(r"[^\w.-]", "_", urls[0].rpartition("/")[2]) or "download"
    promising = list(urls)
    failures = {}
    with _session(insecure_server) as session, _quiet(pooch.get_logger()):

        def stream(url: str, output: str, _: object) -> None:
            _stream(url, output, num_bytes, session, exact=bool(sha256))

        for turn in range(_ROUNDS):
            if turn and promising:
                time.sleep(_PAUSE_SECONDS * 2 ** (turn - 1))
            for url in tuple(promising):
                try:
                    known = f"sha256:{sha256}" if sha256 else None
                    file = pooch.retrieve(url, known, fname=fname, path=folder, downloader=stream)
                except (requests.RequestException, ValueError) as error:
                    failures[url], may_pass = _reason(error)
                    if not may_pass:
                        promising.remove(url)
                else:
                    os.chmod(file, 0o644)  # pooch lets only its owner read it; a cache may be shared
                    return Path(file)
    raise DataError("\n".join(f"  {url}: {reason}" for url, reason in failures.items()))


def _session(insecure_server: str | None) -> requests.Session:
    """Return a session that knows https alone."""
    import requests

    session = requests.Session()
    # Without an adapter requests refuses an address, also when a server redirects to one.
    del session.adapters["http://"]
    if insecure_server is not None:
        if not re.fullmatch(r"http://127\.0\.0\.1:\d+/", insecure_server):
            raise ValueError(f"insecure_server={insecure_server!r} is not a server of this machine")
        session.mount(insecure_server, requests.adapters.HTTPAdapter())
    return session


def _stream(url: str, output: str, num_bytes: int, session: requests.Session, *, exact: bool) -> None:
    """Write what ``url`` gives to ``output``, never more than ``num_bytes`` and, if ``exact``, never less."""
    import requests
    from tqdm import tqdm

    headers = {"Accept-Encoding": "identity"}  # so that Content-Length is the size of the file
    try:
        response = session.get(url, stream=True, timeout=_TIMEOUT_SECONDS, headers=headers)
    except requests.RequestException:
        raise
    except OSError as error:  # certificates that cannot be read; not to be taken for a full disk
        raise requests.RequestException(str(error)) from error
    with response:
        response.raise_for_status()
        offered = response.headers.get("Content-Length", "")
        if exact and offered.isdecimal() and int(offered) != num_bytes and "Content-Encoding" not in response.headers:
            raise ValueError(f"the server offers {int(offered):,} bytes instead of {num_bytes:,}")
        received = 0
        small = num_bytes < 20_000_000  # a few seconds need no progress bar
        bar = tqdm(total=num_bytes, unit="B", unit_scale=True, leave=False, file=sys.stdout, disable=small)
        with open(output, "wb") as file, bar:
            for block in response.iter_content(1 << 16):
                received += len(block)
                if received > num_bytes:
                    raise ValueError(f"the server sends more than {num_bytes:,} bytes")
                file.write(block)
                bar.update(len(block))
    if exact and received < num_bytes:
        raise requests.ConnectionError(f"the connection ended after {received:,} of {num_bytes:,} bytes")


def _reason(error: Exception) -> tuple[str, bool]:
    """Say why a download failed, and whether trying again may help."""
    import requests

    if isinstance(error, requests.HTTPError) and error.response is not None:
        status = error.response.status_code
        return f"the server answers {status} {error.response.reason}", status in (408, 429) or status >= 500
    if isinstance(error, requests.exceptions.InvalidSchema):
        return "it leads to an address that is not https", False
    if isinstance(error, requests.Timeout):
        return "no answer in time", True
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        cause = getattr(error.args[0], "reason", error) if error.args else error
        # Without the "HTTPSConnection(...): " of urllib3.
        return re.sub(r"^(<.*?>|\w+\(.*?\)): ", "", str(cause)), True
    return str(error).split(". ")[0], False


@contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Keep pooch from announcing on standard error what has been announced already."""
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
