"""fetch: what it returns is always the registered file, and what goes wrong is said and leaves nothing behind.

The downloads go to a server in a thread of this process; nothing here needs a network.
"""

import errno
import gzip
import hashlib
import importlib
import io
import os
import shutil
import socket
import threading
import time
import zipfile
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from oral4 import settings
from oral4.data import available, describe, fetch, names
from oral4.data.archive import tree_sha256
from oral4.data.fetch import Entry
from oral4.errors import DataError

fetching = importlib.import_module("oral4.data.fetch")  # oral4.data.fetch is the function of the same name
downloading = importlib.import_module("oral4.data.download")

BODY = bytes(range(256)) * 1000
PLAIN = {"name": "toy/file.bin", "title": "Toy", "home": "https://example.org", "licence": "CC0", "citation": "None."}


def entry(*urls, body=BODY, **changes):
    sha256 = hashlib.sha256(body).hexdigest()
    return fetching.Entry(**{**PLAIN, "urls": urls, "bytes": len(body), "sha256": sha256, **changes})


class Server:
    """Answers each path by the function that the test has put into ``routes``."""

    def __init__(self):
        server = self
        self.routes, self.hits = {}, []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                server.hits.append(self.path)
                try:
                    server.routes[self.path](self)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client has hung up, as it should when it has seen enough

            def log_message(self, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.address = f"http://127.0.0.1:{self.http.server_port}/"

    def serve(self, path, answer):
        self.routes["/" + path] = answer
        return self.address + path

    def get(self, item, **options):
        return fetching._fetch(item, offline=False, insecure_server=self.address, **options)


def send(body=BODY, status=200, length=True, **headers):
    def answer(handler):
        handler.send_response(status)
        if length:
            handler.send_header("Content-Length", str(len(body)) if length is True else str(length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def in_turn(*answers):
    rest = list(answers)
    return lambda handler: rest.pop(0)(handler)


@pytest.fixture
def server():
    server = Server()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.http.shutdown()
    server.http.server_close()
    thread.join()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An own, empty cache; no folder of data; no proxy; no pauses."""
    for name in ("ORAL4_DATA", "ORAL4_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("ORAL4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setattr(downloading, "_PAUSE_SECONDS", 0.0)
    return tmp_path / "cache"


@pytest.fixture
def own(tmp_path, monkeypatch):
    monkeypatch.setenv("ORAL4_DATA", str(tmp_path / "own"))
    return tmp_path / "own"


def put(folder, body=BODY, name="toy/file.bin"):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    return path


def files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir())


# --- what goes well ---------------------------------------------------------------------------------------------


def test_downloads_once_announces_it_and_leaves_only_the_file(server, cache, capfd):
    item = entry(server.serve("file.bin", send()))
    path = server.get(item)
    assert path == cache / "toy/file.bin" and path.read_bytes() == BODY
    out, err = capfd.readouterr()
    assert "toy/file.bin" in out and "256,000 bytes" in out and "CC0" in out and "127.0.0.1" in out
    assert err == ""
    assert server.get(item) == path
    assert server.hits == ["/file.bin"]
    assert files(cache) == ["toy/file.bin"]
    assert capfd.readouterr().out == ""


@pytest.mark.skipif(os.name != "posix", reason="permission bits are of Unix")
def test_others_may_read_the_cache(server):
    assert server.get(entry(server.serve("f", send()))).stat().st_mode & 0o777 == 0o644


def test_the_logger_of_pooch_is_as_before(server, monkeypatch):
    import pooch

    monkeypatch.setattr(pooch.get_logger(), "level", 17)
    server.get(entry(server.serve("f", send())))
    assert pooch.get_logger().level == 17


def test_own_folder_comes_first_then_cache(server, cache, own):
    item = entry(server.serve("f", send()))
    in_cache = put(cache)
    assert server.get(item) == in_cache
    in_own = put(own)
    assert server.get(item) == in_own
    assert server.hits == []


def test_a_server_that_compresses_unasked_is_understood(server):
    packed = gzip.compress(BODY)
    assert server.get(entry(server.serve("f", send(packed, Content_Encoding="gzip")))).read_bytes() == BODY


def test_the_plain_file_is_asked_for(server):
    asked = []

    def answer(handler):
        asked.append(handler.headers["Accept-Encoding"])
        send()(handler)

    server.get(entry(server.serve("f", answer)))
    assert asked == ["identity"]


def test_the_temporary_file_is_beside_its_final_place(server, monkeypatch):
    """A rename between two file systems would be a copy, which can be seen half done."""
    monkeypatch.setattr(fetching.tempfile, "tempdir", "/no/such/folder")
    assert server.get(entry(server.serve("f", send()))).exists()


def test_a_server_that_does_not_say_the_length_is_understood(server):
    assert server.get(entry(server.serve("f", send(length=False)))).read_bytes() == BODY


def test_four_at_once(server, cache):
    item = entry(server.serve("f", send()))
    results = []
    threads = [threading.Thread(target=lambda: results.append(server.get(item).read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [BODY] * 4
    assert files(cache) == ["toy/file.bin"]


# --- mirrors and second tries -----------------------------------------------------------------------------------


def test_a_mirror_helps_and_a_missing_page_is_not_asked_again(server):
    bad, good = server.serve("bad", send(b"", 404)), server.serve("good", in_turn(send(b"", 503), send()))
    assert server.get(entry(bad, good)).read_bytes() == BODY
    assert server.hits == ["/bad", "/good", "/good"]


@pytest.mark.parametrize(
    "first",
    [send(b"", 503), send(b"", 429), send(BODY[:1000], length=len(BODY)), send(BODY[:1000], length=False)],
    ids=["503", "429", "cut, length told", "cut, length not told"],
)
def test_a_passing_failure_is_tried_again(server, first):
    item = entry(server.serve("f", in_turn(first, send())))
    assert server.get(item).read_bytes() == BODY
    assert server.hits == ["/f", "/f"]


def test_the_pause_grows(server, monkeypatch):
    pauses = []
    monkeypatch.setattr(downloading, "_PAUSE_SECONDS", 1.0)
    monkeypatch.setattr(downloading.time, "sleep", pauses.append)
    with pytest.raises(DataError, match="503"):
        server.get(entry(server.serve("f", send(b"", 503))))
    assert pauses == [1.0, 2.0]
    assert len(server.hits) == 3


# --- what goes wrong --------------------------------------------------------------------------------------------


def endless(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(BODY)


@pytest.mark.parametrize(
    "answer, reason, hits",
    [
        (send(b"", 404), "404", 1),
        (send(b"", 500), "500", 3),
        (send(BODY[::-1]), "does not match", 1),
        (send(BODY + b"x"), "offers 256,001 bytes instead of 256,000", 1),
        (send(BODY + b"x", length=False), "more than 256,000 bytes", 1),
        (send(BODY[:-1], length=False), "ended after 255,999 of 256,000 bytes", 3),
        (endless, "more than 256,000 bytes", 1),
        (send(gzip.compress(bytes(10**8)), Content_Encoding="gzip"), "more than 256,000 bytes", 1),
        (send(b"<html>log in</html>"), "offers 19 bytes", 1),
    ],
    ids=[
        "404",
        "500",
        "wrong checksum",
        "too long",
        "too long, untold",
        "too short",
        "endless",
        "gzip bomb",
        "login page",
    ],
)
def test_a_failed_download_says_why_and_leaves_nothing(server, cache, answer, reason, hits):
    url = server.serve("f", answer)
    with pytest.raises(DataError) as caught:
        server.get(entry(url))
    message = str(caught.value)
    assert reason in message and url in message
    assert hashlib.sha256(BODY).hexdigest() in message and str(cache / "toy/file.bin") in message
    assert len(server.hits) == hits
    assert files(cache) == []


def test_nobody_listens(cache):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{free.getsockname()[1]}/"
    with pytest.raises(DataError, match="refused"):
        fetching._fetch(entry(address + "f"), offline=False, insecure_server=address)
    assert files(cache) == []


def test_a_server_that_hangs(server, cache, monkeypatch):
    monkeypatch.setattr(downloading, "_TIMEOUT_SECONDS", (0.1, 0.1))
    monkeypatch.setattr(downloading, "_ROUNDS", 1)
    with pytest.raises(DataError, match="no answer in time"):
        server.get(entry(server.serve("f", lambda handler: time.sleep(0.5))))
    assert files(cache) == []


def test_without_tls_nothing_is_asked(server, cache):
    item = entry(server.serve("f", send()))
    with pytest.raises(DataError, match="not https"):
        fetching._fetch(item, offline=False)
    assert server.hits == [] and files(cache) == []


def test_a_redirect_may_not_leave_tls(server, cache):
    aim = server.serve("aim", send()).replace("127.0.0.1", "localhost")
    item = entry(server.serve("f", send(b"", 302, Location=aim)))
    with pytest.raises(DataError, match="not https"):
        server.get(item)
    assert server.hits == ["/f"] and files(cache) == []


@pytest.mark.parametrize(
    "address", ["http://example.org/", "http://127.0.0.1:80@example.org/", "http://127.0.0.1/", "http://"]
)
def test_the_hole_for_tests_is_this_machine_alone(address):
    with pytest.raises(ValueError, match="not a server of this machine"):
        downloading._session(address)


def test_certificates_are_checked():
    session = downloading._session(None)
    assert session.verify is True
    assert list(session.adapters) == ["https://"]


def test_unreadable_certificates_are_not_taken_for_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "absent.pem"))
    with pytest.raises(DataError, match=r"could not be downloaded[\s\S]*absent\.pem"):
        fetching._fetch(entry("https://127.0.0.1:9/f"), offline=False)


@pytest.mark.parametrize("number, reason", [(errno.ENOSPC, "the disk is full"), (errno.EIO, os.strerror(errno.EIO))])
def test_a_full_disk(server, cache, monkeypatch, number, reason):
    class Full(io.FileIO):
        def write(self, data):
            raise OSError(number, os.strerror(number))

    monkeypatch.setattr(downloading, "open", lambda path, mode: Full(path, mode), raising=False)
    item = entry(server.serve("f", send()), server.serve("mirror", send()))
    with pytest.raises(DataError, match=f"{reason}.*ORAL4_CACHE.*256,000 bytes free"):
        server.get(item)
    assert server.hits == ["/f"], "another server does not help against a full disk"
    assert files(cache) == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "denied"), OSError(errno.EROFS, "read-only")], ids=str)
def test_a_cache_that_cannot_be_written(server, cache, monkeypatch, error):
    def refuse(*args, **options):
        raise error

    monkeypatch.setattr(fetching.tempfile, "TemporaryDirectory", refuse)
    with pytest.raises(DataError, match=r"cannot be stored.*Set ORAL4_CACHE"):
        server.get(entry(server.serve("f", send())))
    assert server.hits == [] and files(cache) == []


def test_a_rename_that_is_refused(server, cache, monkeypatch):
    def refuse(*args):
        raise PermissionError(errno.EACCES, "denied by the test")

    monkeypatch.setattr(fetching.os, "replace", refuse)
    with pytest.raises(DataError, match=r"cannot be stored.*denied by the test"):
        server.get(entry(server.serve("f", send())))
    assert files(cache) == []


def test_a_cache_that_is_a_file(server, cache):
    cache.write_text("in the way")
    with pytest.raises(DataError, match=r"cannot be stored"):
        server.get(entry(server.serve("f", send())))
    assert cache.read_text() == "in the way"


def test_an_interrupt_leaves_nothing(server, cache, monkeypatch):
    class Interrupted(io.FileIO):
        def write(self, data):
            super().write(data)
            raise KeyboardInterrupt

    monkeypatch.setattr(downloading, "open", lambda path, mode: Interrupted(path, mode), raising=False)
    with pytest.raises(KeyboardInterrupt):
        server.get(entry(server.serve("f", send())))
    assert files(cache) == []


# --- damaged and absent files -----------------------------------------------------------------------------------

DAMAGED = [b"", BODY[:-1], BODY[::-1], BODY + b"x"]


@pytest.mark.parametrize("body", DAMAGED, ids=["empty", "cut", "changed", "longer"])
def test_a_damaged_copy_in_the_cache_is_replaced(server, cache, body):
    put(cache, body)
    item = entry(server.serve("f", send()))
    with pytest.raises(DataError, match="damaged"):
        fetching._fetch(item, offline=True)
    assert server.get(item).read_bytes() == BODY
    assert files(cache) == ["toy/file.bin"]


@pytest.mark.parametrize(
    "body, fault",
    [(BODY[:-1], "it has 255,999 bytes instead of 256,000"), (BODY[::-1], "its sha256 is [0-9a-f]{64} instead of")],
)
def test_the_damage_is_named(cache, body, fault):
    put(cache, body)
    with pytest.raises(DataError, match=fault):
        fetching._fetch(entry("https://one.example/f"), offline=True)


def test_a_failed_download_keeps_what_was_there(server, cache):
    damaged = put(cache, BODY[::-1])
    with pytest.raises(DataError):
        server.get(entry(server.serve("f", send(b"", 404))))
    assert damaged.read_bytes() == BODY[::-1]


def test_a_folder_in_the_place_of_the_file_is_replaced(server, cache):
    put(cache, name="toy/file.bin/inside")
    assert server.get(entry(server.serve("f", send()))).read_bytes() == BODY
    assert files(cache) == ["toy/file.bin"]


@pytest.mark.parametrize("body", DAMAGED, ids=["empty", "cut", "changed", "longer"])
def test_your_own_damaged_file_is_refused_and_left_alone(server, cache, own, body):
    put(cache)
    path = put(own, body)
    with pytest.raises(DataError, match="damaged") as caught:
        server.get(entry(server.serve("f", send())))
    assert str(path) in str(caught.value)
    assert path.read_bytes() == body and server.hits == []


def test_offline_says_everything_that_is_needed(cache, monkeypatch):
    item = entry("https://one.example/f", "https://two.example/f")
    monkeypatch.setattr(fetching, "_registry", lambda: {item.name: item})
    monkeypatch.setenv("ORAL4_OFFLINE", "1")
    with pytest.raises(DataError) as caught:
        fetch(item.name)
    needed = (item.name, *item.urls, "256,000", item.sha256, str(cache / item.name), "ORAL4_DATA", "ORAL4_OFFLINE")
    assert [part for part in needed if part not in str(caught.value)] == []
    monkeypatch.setenv("ORAL4_OFFLINE", "0")
    with pytest.raises(DataError, match="downloads are off"):
        fetch(item.name, offline=True)
    put(cache)
    assert fetch(item.name, offline=True) == cache / item.name


def test_a_folder_of_data_that_does_not_exist_is_mentioned(own):
    with pytest.raises(DataError, match=r"ORAL4_DATA=.*own is not a folder"):
        fetching._fetch(entry("https://one.example/f"), offline=True)


def test_available_tells_what_fetch_would_do_offline(cache, own, monkeypatch):
    item = entry("https://one.example/f")
    monkeypatch.setattr(fetching, "_registry", lambda: {item.name: item})
    for in_own in (None, BODY, BODY[::-1]):
        for in_cache in (None, BODY, BODY[::-1]):
            shutil.rmtree(own, ignore_errors=True)
            shutil.rmtree(cache, ignore_errors=True)
            if in_own is not None:
                put(own, in_own)
            if in_cache is not None:
                put(cache, in_cache)
            try:
                works = fetch(item.name, offline=True).exists()
            except DataError:
                works = False
            assert available(item.name) is works
            assert works == (in_own == BODY or (in_own is None and in_cache == BODY))


# --- archives ---------------------------------------------------------------------------------------------------

TREE = {"recordings/a.wav": b"a" * 1000, "recordings/b.wav": b"b" * 2000}


def zipped(tree):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, body in tree.items():
            file.writestr(name, body)
    return buffer.getvalue()


@pytest.fixture
def archive_entry(server, tmp_path):
    body = zipped({"toy-v1/readme.txt": b"not wanted"} | {f"toy-v1/{name}": data for name, data in TREE.items()})
    for name, data in TREE.items():
        put(tmp_path / "reference", data, name)
    tree = tree_sha256(tmp_path / "reference")
    url = server.serve("toy-v1.zip", send(body))
    return entry(url, body=body, name="toy", members=("recordings/*.wav",), strip=1, tree_sha256=tree)


def test_an_archive_becomes_a_folder(server, cache, archive_entry):
    folder = server.get(archive_entry)
    assert folder == cache / "toy"
    assert {name: (folder / name).read_bytes() for name in files(folder)} == TREE
    assert files(cache) == [f"toy/{name}" for name in TREE]
    assert server.get(archive_entry) == folder and len(server.hits) == 1
    put(folder, b"yours", "notes.txt")  # what the registry does not name does not count
    assert server.get(archive_entry) == folder and len(server.hits) == 1


def test_a_damaged_folder_is_unpacked_anew(server, cache, archive_entry):
    folder = server.get(archive_entry)
    (folder / "recordings/a.wav").write_bytes(b"")
    with pytest.raises(
        DataError, match=r"damaged[\s\S]*By hand: unpack recordings/\*\.wav of it so that the folder is"
    ):
        fetching._fetch(archive_entry, offline=True)
    server.get(archive_entry)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == TREE
    (folder / "recordings/b.wav").unlink()
    server.get(archive_entry)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == TREE


def test_an_unpacked_folder_of_your_own(server, own, archive_entry):
    for name, data in TREE.items():
        put(own / "toy", data, name)
    assert server.get(archive_entry) == own / "toy" and server.hits == []
    (own / "toy/recordings/a.wav").write_bytes(b"")
    with pytest.raises(DataError, match="damaged"):
        server.get(archive_entry)


def test_four_unpack_at_once(server, cache, archive_entry):
    results = []
    threads = [threading.Thread(target=lambda: results.append(server.get(archive_entry))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [cache / "toy"] * 4
    assert files(cache) == [f"toy/{name}" for name in TREE]


def test_an_archive_with_other_files_than_registered(server, cache, archive_entry):
    with pytest.raises(DataError, match="the archive is the registered one, but its files differ"):
        server.get(replace(archive_entry, tree_sha256="0" * 64))
    assert files(cache) == []


@pytest.mark.parametrize(
    "body, reason",
    [
        (zipped({"../escape.wav": b"x"}), "outside the folder"),
        (b"PK no archive", "damaged"),
        (zipped({"other": b"x"}), "holds none"),
    ],
    ids=["hostile", "broken", "nothing wanted"],
)
def test_a_bad_archive_leaves_nothing(server, cache, body, reason):
    url = server.serve("f.zip", send(body))
    with pytest.raises(DataError, match=reason):
        server.get(entry(url, body=body, name="toy", members=("*.wav",), tree_sha256="0" * 64))
    assert files(cache) == [] and files(cache.parent) == []


def test_the_disk_is_full_while_unpacking(server, cache, archive_entry, monkeypatch):
    def full(*args):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("oral4.data.archive.shutil.copyfileobj", full)
    with pytest.raises(DataError, match=r"the disk is full.*room to unpack"):
        server.get(archive_entry)
    assert files(cache) == []


# --- the registry -----------------------------------------------------------------------------------------------


def test_an_unknown_name_lists_close_ones():
    for call in (fetch, available, describe):
        with pytest.raises(DataError, match=r"did you mean ett/ETTh1.csv"):
            call("ett/ETTh1")
        with pytest.raises(DataError, match=r"choose one of ett/ETTh1.csv, "):
            call("zzzzzzzz")


@pytest.mark.parametrize(
    "name", ["../secret", "/etc/passwd", "ett/../ett/ETTh1.csv", "ett//ETTh1.csv", "", ".", None, 3]
)
def test_only_registered_names_are_looked_up(name):
    with pytest.raises(DataError, match="is not registered"):
        fetch(name, offline=True)


def test_describe_prints_terms_and_source():
    text = str(describe("ett/ETTh2.csv"))
    for part in ("2,417,960", "CC BY-ND 4.0", "Informer", "github.com/zhouhaoyi/ETDataset"):
        assert part in text


def test_the_registry_names_what_the_book_uses():
    regions = ("AEP", "COMED", "DAYTON", "DEOK", "DOM", "EKPC", "FE", "PJME", "PJMW")
    assert {"ett/ETTh1.csv", "ett/ETTh2.csv"} | {f"pjm/{region}_hourly.csv" for region in regions} <= set(names())


@pytest.mark.parametrize("name", names())
def test_registered_urls_are_pinned(name):
    """A branch moves; a commit or a version does not."""
    import re

    for url in describe(name).urls:
        assert url.startswith("https://") and re.search(r"[0-9a-f]{40}|[/@]v?\d+(\.\d+)+", url), url


GOOD = """
[sources.toy]
title = "Toy"
home = "https://example.org"
licence = "CC0"
citation = "None."
urls = ["https://one.example/v1.0/", "https://two.example/v1.0/"]

[files."toy/sub/file.csv"]
source = "toy"
bytes = 3
sha256 = "{sha}"
""".replace("{sha}", "a" * 64)


def test_a_file_is_four_lines():
    item = fetching._parse(GOOD)["toy/sub/file.csv"]
    assert item.urls == ("https://one.example/v1.0/sub/file.csv", "https://two.example/v1.0/sub/file.csv")
    assert (item.bytes, item.sha256, item.licence, item.members) == (3, "a" * 64, "CC0", ())


def test_an_archive_is_three_more():
    text = GOOD + f'path = "toy.zip"\nmembers = ["*.wav"]\nstrip = 1\ntree_sha256 = "{"b" * 64}"\n'
    item = fetching._parse(text)["toy/sub/file.csv"]
    assert item.urls[0] == "https://one.example/v1.0/toy.zip"
    assert (item.members, item.strip, item.tree_sha256) == (("*.wav",), 1, "b" * 64)


@pytest.mark.parametrize(
    "old, new, reason",
    [
        ("https://two", "http://two", "not https"),
        ("a" * 64, "a" * 63, "64 hexadecimal"),
        ("a" * 64, "A" * 64, "64 hexadecimal"),
        ("bytes = 3", "bytes = 0", "needs bytes"),
        ("bytes = 3", "", "bytes"),
        ("bytes = 3", 'bytes = 3\nmembers = ["*"]', "tree_sha256"),
        ("bytes = 3", "bytes = 3\nbites = 4", "bites"),
        ('source = "toy"', 'source = "absent"', "absent"),
        ('licence = "CC0"', 'licence = ""', "licence"),
        ("toy/sub/file.csv", "toy/../file.csv", "relative path"),
        ("toy/sub/file.csv", "/toy/file.csv", "relative path"),
        ("toy/sub/file.csv", "toy//file.csv", "relative path"),
    ],
)
def test_a_wrong_registry_is_refused(old, new, reason):
    assert old in GOOD
    with pytest.raises(ValueError, match=reason):
        fetching._parse(GOOD.replace(old, new))


# --- the real files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", names())
def test_every_registered_file_at_hand_is_intact(name, monkeypatch):
    folder = REAL_DATA
    if not folder or not (Path(folder) / name).exists():
        pytest.skip("ORAL4_DATA is unset or does not hold this file")
    monkeypatch.setenv("ORAL4_DATA", folder)
    assert fetch(name, offline=True) == Path(folder).absolute() / name
    assert available(name)


REAL_DATA = os.environ.get("ORAL4_DATA")


def test_settings_name_the_places(cache, own):
    assert settings.cache_dir() == cache and settings.data_dir() == own


def test_an_archive_that_its_server_packs_anew_is_judged_by_its_content(server, archive_entry):
    packed = replace(archive_entry, sha256="", bytes=archive_entry.bytes + 1000)
    assert sorted(path.name for path in (server.get(packed) / "recordings").iterdir())
    with pytest.raises(DataError, match="its files differ"):
        server.get(replace(packed, name="other", tree_sha256="0" * 64))
    with pytest.raises(DataError, match=r"more than 10 bytes"):
        server.get(replace(packed, name="small", bytes=10))


def test_a_plain_file_needs_its_sha256():
    with pytest.raises(ValueError, match="needs sha256"):
        Entry(name="a/b.csv", urls=("https://x/",), bytes=1, title="", home="", licence="x", citation="")
