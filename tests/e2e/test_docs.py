"""Every example of the documents runs against the real server, in order, as `tests/documentation.py` describes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.documentation import LANGUAGES, REPOSITORY, sections
from tests.e2e.server import Server

EXAMPLES = [
    pytest.param(document, title, language, id=f"{document}: {title} ({language})")
    for document in ("docs/api.md", "README.md")
    for title, section in sections(document).items()
    for language in LANGUAGES
    if "localhost:30000" in section.program(language) or "client." in section.program(language)
]

PROMISED_FILE = re.compile(r"""(?:open\(|write_to_file\(|, |-o |> )["']?([\w-]+\.(?:png|webp|jpg|mp4))\b""")
"""A file that an example writes."""

MAGIC = {".png": b"\x89PNG", ".webp": b"RIFF", ".jpg": b"\xff\xd8", ".mp4": b"ftyp"}

EXAMPLE_SECONDS = 300.0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the examples run: with the image that they send, and `docs`, since README assumes the repository."""
    (tmp_path / "docs").symlink_to(REPOSITORY / "docs")
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "input.png")
    return tmp_path


@pytest.mark.parametrize(("document", "title", "language"), EXAMPLES)
def test_the_example_runs(
    document: str, title: str, language: str, server: Server, folder: Path, adapters: tuple[str, str]
) -> None:
    documented = sections(document)
    program = documented[title].program(language)
    promised = set(PROMISED_FILE.findall(program)) - {"input.png"}
    if language == "python" and title != "Setup" and "Setup" in documented:
        program = f"{documented['Setup'].program(language)}\n{program}"
    program = program.replace("http://localhost:30000", server.base_url)
    program = program.replace("/path/to/", f"{Path(adapters[0]).parent}/")
    command = [sys.executable, "-"] if language == "python" else ["bash", "-euo", "pipefail", "-s"]
    done = subprocess.run(
        command,
        input=program,
        cwd=folder,
        # python3 in the shell examples is this Python, whichever the machine has.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        timeout=EXAMPLE_SECONDS,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log.read_text()[-4000:]}"
    for name in promised:
        assert MAGIC[Path(name).suffix] in (folder / name).read_bytes()[:12]
