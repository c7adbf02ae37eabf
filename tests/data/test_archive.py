"""unpack writes what the list allows, below the folder, within the caps; or nothing at all."""

import bz2
import gzip
import hashlib
import io
import lzma
import os
import random
import shutil
import stat
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from oral4.data.archive import tree_sha256, unpack
from oral4.data.limits import Limits
from oral4.errors import DataError

TREE = {"top/a.wav": b"aaaa" * 100, "top/sub/b.wav": b"b" * 5000, "top/readme.txt": b"text"}


def make_zip(tree, **changes):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, body in tree.items():
            info = zipfile.ZipInfo(name)
            info.compress_type = zipfile.ZIP_DEFLATED
            for key, value in changes.items():
                setattr(info, key, value)
            file.writestr(info, body)
    return buffer.getvalue()


def make_tar(tree, **changes):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for name, body in tree.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            for key, value in changes.items():
                setattr(info, key, value)
            file.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


MAKERS = {
    "zip": make_zip,
    "tar": make_tar,
    "tar.gz": lambda tree, **changes: gzip.compress(make_tar(tree, **changes)),
    "tar.bz2": lambda tree, **changes: bz2.compress(make_tar(tree, **changes)),
    "tar.xz": lambda tree, **changes: lzma.compress(make_tar(tree, **changes)),
}
every_format = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
zip_and_tar = pytest.mark.parametrize("make", [make_zip, make_tar], ids=["zip", "tar"])


def attempt(work, body, **options):
    """Unpack and return the files written; also check that nothing lies elsewhere."""
    archive = work / "in/toy.archive"
    archive.parent.mkdir(exist_ok=True)
    archive.write_bytes(body)
    before = sorted(work.rglob("*"))
    try:
        written = unpack(archive, work / "out/deep/folder", **{"members": ("*",), **options})
    except DataError as error:
        assert str(error).count("toy.archive: ") == 1
        assert not (work / "out/deep/folder").exists()
        shutil.rmtree(work / "out")
        assert sorted(work.rglob("*")) == before, "a refused archive left something behind"
        raise
    folder = work / "out/deep/folder"
    found = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if not path.is_dir()}
    assert sorted(written) == sorted(found)
    assert all(path.is_file() and not path.is_symlink() for path in found.values())
    outside = (
        set(work.rglob("*")) - set(folder.rglob("*")) - set(before) - {folder, folder.parent, folder.parent.parent}
    )
    assert outside == set()
    return {name: path.read_bytes() for name, path in found.items()}


@every_format
def test_all_members(make, tmp_path):
    assert attempt(tmp_path, make(TREE)) == TREE


@every_format
def test_only_what_the_list_allows(make, tmp_path):
    assert attempt(tmp_path, make(TREE), members=("*.wav",), strip=1) == {
        "a.wav": TREE["top/a.wav"],
        "sub/b.wav": TREE["top/sub/b.wav"],
    }


@zip_and_tar
def test_the_list_is_compared_with_the_stripped_path_and_its_case(make, tmp_path):
    tree = {"top/A.wav": b"1", "top/a.wav": b"2", "a.wav": b"3"}
    assert attempt(tmp_path, make(tree), members=("a.wav",), strip=1) == {"a.wav": b"2"}


@zip_and_tar
def test_folders_and_dots_in_names(make, tmp_path):
    assert attempt(tmp_path, make({"./x//y.txt": b"1"})) == {"x/y.txt": b"1"}


def test_folder_entries_are_skipped(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        info = tarfile.TarInfo("a.txt")
        info.type = tarfile.DIRTYPE
        file.addfile(info)
        file.addfile(tarfile.TarInfo("b.txt"), io.BytesIO())
    assert attempt(tmp_path, buffer.getvalue(), members=("*.txt",)) == {"b.txt": b""}


@zip_and_tar
def test_nothing_that_is_wanted(make, tmp_path):
    with pytest.raises(DataError, match=r"toy\.archive: holds none of \*\.flac, \*\.mp3"):
        attempt(tmp_path, make(TREE), members=("*.flac", "*.mp3"))


HOSTILE = [
    "../up",
    "a/../../up",
    "/etc/passwd",
    "//server/x",
    "..",
    "a/..",
    "C:\\x",
    "C:x",
    "a\\..\\b",
    "line\nbreak",
    "a\x1b[31m",
    "a\x7f",
]


@pytest.mark.parametrize("name", HOSTILE)
@zip_and_tar
def test_names_outside_the_folder(make, name, tmp_path):
    """Refused even if the list would pass the member over: such an archive is not what it claims to be."""
    for members in (("*",), ("fine",)):
        with pytest.raises(DataError, match="outside the folder"):
            attempt(tmp_path, make({"fine": b"1", name: b"x"}), members=members)


@pytest.mark.parametrize("kind", ["SYMTYPE", "LNKTYPE", "CHRTYPE", "BLKTYPE", "FIFOTYPE"])
def test_links_and_devices_in_a_tar(kind, tmp_path):
    body = make_tar({"x": b""}, type=getattr(tarfile, kind), linkname="/etc/passwd")
    with pytest.raises(DataError, match="link or a device"):
        attempt(tmp_path, body)


@pytest.mark.parametrize("kind", [stat.S_IFLNK, stat.S_IFIFO, stat.S_IFCHR])
def test_links_and_devices_in_a_zip(kind, tmp_path):
    body = make_zip({"x": b"/etc/passwd"}, create_system=3, external_attr=(kind | 0o777) << 16)
    with pytest.raises(DataError, match="link or a device"):
        attempt(tmp_path, body)


def test_writing_through_a_link_is_impossible(tmp_path):
    """The classic: a link to a folder elsewhere, then a file below the link."""
    (tmp_path / "elsewhere").mkdir()
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "elsewhere")
        file.addfile(link)
        info = tarfile.TarInfo("link/file.wav")
        info.size = 1
        file.addfile(info, io.BytesIO(b"x"))
    assert attempt(tmp_path, buffer.getvalue(), members=("*.wav",)) == {"link/file.wav": b"x"}
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_link_that_is_not_wanted_does_no_harm(tmp_path):
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        link = tarfile.TarInfo("link")
        link.type, link.linkname = tarfile.SYMTYPE, "/"
        file.addfile(link)
        file.addfile(tarfile.TarInfo("a.wav"), io.BytesIO())
    assert attempt(tmp_path, buffer.getvalue(), members=("*.wav",)) == {"a.wav": b""}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("names", [("a", "a"), ("a", "./a"), ("a", "a/b"), ("a", "a/b/c"), ("a/b", "a")], ids=str)
@zip_and_tar
def test_a_name_that_comes_twice(make, names, tmp_path):
    """Also a file that would have to be a folder too."""
    first, second = make({names[0]: b"1"}), make({names[1]: b"2"})
    if make is make_tar:
        body = first[:1024] + second
    else:
        buffer = io.BytesIO(first)
        with zipfile.ZipFile(buffer, "a") as file:
            file.writestr(names[1], b"2")
        body = buffer.getvalue()
    with pytest.raises(DataError, match="comes twice"):
        attempt(tmp_path, body)


# --- caps -------------------------------------------------------------------------------------------------------


@every_format
def test_too_many_members(make, tmp_path):
    tree = {f"{i}.txt": b"" for i in range(11)}
    with pytest.raises(DataError, match="11 members, the limit is 10"):
        attempt(tmp_path, make(tree), limits=Limits(archive_members=10))
    assert len(attempt(tmp_path, make(tree), limits=Limits(archive_members=11))) == 11


@every_format
def test_too_many_bytes(make, tmp_path):
    tree = {"a": random.Random(0).randbytes(300_000), "b": random.Random(1).randbytes(300_000)}
    with pytest.raises(DataError, match="bytes unpacked, the limit is 500000"):
        attempt(tmp_path, make(tree), limits=Limits(archive_bytes=500_000))
    assert attempt(tmp_path, make(tree), limits=Limits(archive_bytes=700_000)) == tree  # tar adds some padding


@pytest.mark.parametrize("kind", ["zip", "tar.gz", "tar.bz2", "tar.xz"])
def test_a_bomb(kind, tmp_path):
    with pytest.raises(DataError, match="times its packed size, the limit is 200"):
        attempt(tmp_path, MAKERS[kind]({"zeros": bytes(30_000_000)}))


def test_a_bomb_in_what_is_skipped(tmp_path):
    """To skip a member of a compressed tar it must be decompressed: that counts too."""
    body = MAKERS["tar.gz"]({"zeros": bytes(30_000_000), "a.wav": b"x"})
    with pytest.raises(DataError, match="times its packed size"):
        attempt(tmp_path, body, members=("*.wav",))


def test_a_bomb_in_a_header(tmp_path):
    """An extended header is read into memory whole: the cap holds for it as well."""
    header = tarfile.TarInfo("x")
    header.type, header.size = tarfile.XHDTYPE, 30_000_000
    body = gzip.compress(header.tobuf() + bytes(30_000_000) + make_tar({"a": b"1"}))
    with pytest.raises(DataError, match="times its packed size"):
        attempt(tmp_path, body)


def test_a_zip_that_lies_about_its_sizes(tmp_path):
    """The size in the list says one byte; what counts is what comes out, and it ends as damage or at the cap."""
    body = bytearray(make_zip({"a": bytes(3_000_000)}))
    start = body.rfind(b"PK\x01\x02")
    body[start + 24 : start + 28] = (1).to_bytes(4, "little")
    with pytest.raises(DataError, match=r"damaged|times its packed size"):
        attempt(tmp_path, bytes(body))


def test_a_sparse_file(tmp_path):
    """A few bytes that claim to be a terabyte of zeros."""
    with pytest.raises(DataError, match="refused"):
        attempt(tmp_path, make_tar({"x": b""}, type=tarfile.GNUTYPE_SPARSE))


def test_a_zip_with_a_password(tmp_path):
    body = bytearray(make_zip({"a": b"secret"}))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        body[body.find(mark) + offset] |= 1
    with pytest.raises(DataError, match=r"cannot be unpacked.*(password|encrypted)"):
        attempt(tmp_path, bytes(body))


# --- damage -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "body", [b"", b"PK", b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ\x00", b"hello" * 1000], ids=repr
)
def test_no_archive_at_all(body, tmp_path):
    with pytest.raises(DataError, match=r"damaged|holds none"):
        attempt(tmp_path, body)


@every_format
def test_an_archive_that_is_cut(make, tmp_path):
    body = make({"a": random.Random(0).randbytes(50_000)})
    for length in (10, 600, len(body) // 2):
        with pytest.raises(DataError, match="damaged"):
            attempt(tmp_path, body[:length])


BODIES = [make(TREE) for make in MAKERS.values()]


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    body=st.sampled_from(BODIES),
    changes=st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=8)), min_size=1, max_size=6
    ),
)
def test_any_change_of_bytes_ends_well(body, changes):
    """Either files below the folder or a DataError, and never anything else (``attempt`` checks the places)."""
    body = bytearray(body)
    for where, new in changes:
        start = int(where * len(body))
        body[start : start + len(new)] = new
    with tempfile.TemporaryDirectory() as work:
        try:
            attempt(Path(work), bytes(body))
        except DataError:
            pass


def test_an_existing_folder_is_not_touched(tmp_path):
    (tmp_path / "toy.zip").write_bytes(make_zip(TREE))
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/mine").write_text("mine")
    with pytest.raises(FileExistsError):
        unpack(tmp_path / "toy.zip", tmp_path / "folder", members=("*",))
    assert (tmp_path / "folder/mine").read_text() == "mine"


# --- the number of a folder -------------------------------------------------------------------------------------


def fill(folder, tree):
    for name, body in tree.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(body)
    return folder


def test_tree_sha256_is_the_documented_sum(tmp_path):
    fill(tmp_path, TREE)
    lines = "".join(f"{hashlib.sha256(TREE[name]).hexdigest()}  ./{name}\n" for name in sorted(TREE))
    assert tree_sha256(tmp_path) == hashlib.sha256(lines.encode()).hexdigest()


@pytest.mark.skipif(not shutil.which("sha256sum") or os.name != "posix", reason="needs sha256sum and a shell")
def test_tree_sha256_is_what_the_shell_says(tmp_path):
    fill(tmp_path, TREE | {"é x": b"1", "Z": b"2", "a-b": b"3", "a/b": b"4"})
    line = "find . -type f -print0 | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
    assert line in tree_sha256.__doc__
    told = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert told.split()[0] == tree_sha256(tmp_path)


@pytest.mark.parametrize("change", ["content", "name", "more", "less", "swap"])
def test_tree_sha256_sees_every_change(change, tmp_path):
    fill(tmp_path, TREE)
    before = tree_sha256(tmp_path)
    assert before == tree_sha256(tmp_path)
    match change:
        case "content":
            (tmp_path / "top/a.wav").write_bytes(b"other")
        case "name":
            (tmp_path / "top/a.wav").rename(tmp_path / "top/c.wav")
        case "more":
            (tmp_path / "new").write_bytes(b"")
        case "less":
            (tmp_path / "top/a.wav").unlink()
        case "swap":
            fill(tmp_path, {"top/a.wav": TREE["top/readme.txt"], "top/readme.txt": TREE["top/a.wav"]})
    assert tree_sha256(tmp_path) != before


def test_tree_sha256_leaves_out_what_is_not_listed(tmp_path):
    fill(tmp_path, TREE)
    before = tree_sha256(tmp_path, ("*.wav",))
    fill(tmp_path, {"notes.txt": b"mine", "top/readme.txt": b"changed"})
    assert tree_sha256(tmp_path, ("*.wav",)) == before
