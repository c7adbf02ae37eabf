"""The repository's address is written in settings.ini; what must repeat it agrees with it."""

import re
import subprocess
from pathlib import Path

from notebook import address

ROOT = Path(__file__).parents[1]
BINARY = {".png", ".webp", ".npz", ".safetensors"}
GENERATED = {"_modidx.py"}  # written by nbdev from settings.ini
BY_HAND = {"README.md", "CITATION.cff", "settings.ini", "CONTRIBUTING.md"}  # read where nothing can fill in a value


def tracked() -> list[Path]:
    out = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / line for line in out.splitlines() if (ROOT / line).is_file()]


def mentions(text: str) -> set[str]:
    own = re.escape(address()["repo"])
    return set(re.findall(rf"(?:github\.com/[\w.-]+/{own}\b|[\w-]+\.github\.io/{own}\b)", text))


def test_only_settings_and_hand_written_pages_name_the_address():
    for path in tracked():
        if (
            path.name in BY_HAND | GENERATED
            or path.suffix in (".png", ".webp", ".npz", ".safetensors")
            or path == Path(__file__)
        ):
            continue
        assert not mentions(path.read_text(encoding="utf8", errors="replace")), (
            f"{path.relative_to(ROOT)}: derive the address from settings.ini"
        )


def test_hand_written_pages_agree_with_settings():
    allowed = {
        address()["repo_url"].removeprefix("https://"),
        address()["site_url"].removeprefix("https://").rstrip("/"),
    }
    for name in BY_HAND - {"settings.ini"}:
        assert mentions((ROOT / name).read_text(encoding="utf8")) <= allowed, name
    assert mentions((ROOT / "README.md").read_text(encoding="utf8"))


def test_version_agrees():
    import oral4

    assert oral4.__version__ == address()["version"]
    assert f"version: {address()['version']}" in (ROOT / "CITATION.cff").read_text(encoding="utf8")
