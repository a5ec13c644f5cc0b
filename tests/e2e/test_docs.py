"""Every example of the documents runs against the real server, in order, as `tests/documentation.py` says."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from pipelines.bundled import model_directory
from tests.documentation import LANGUAGES, sections
from tests.e2e.server import Server

pytestmark = pytest.mark.e2e

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
    """What the examples find where they run: a picture, and two adapters for the bundled model in `path/to`."""
    Image.radial_gradient("L").convert("RGB").save(tmp_path / "input.png")
    adapters = tmp_path / "path" / "to"
    adapters.mkdir(parents=True)
    for seed, name in enumerate("AB"):
        save_adapter(adapters / f"{name}.safetensors", seed)
    return tmp_path


def save_adapter(path: Path, seed: int) -> None:
    """A rank-2 adapter in PEFT's format for the queries of the bundled transformer's first block."""
    config = json.loads((model_directory() / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    random = np.random.default_rng(seed)
    layer = "transformer.blocks.0.attn1.to_q"
    save_file(
        {
            f"{layer}.lora_A.weight": random.normal(0, 0.1, (2, width)).astype(np.float32),
            f"{layer}.lora_B.weight": random.normal(0, 0.1, (width, 2)).astype(np.float32),
        },
        path,
    )


@pytest.mark.parametrize(("document", "title", "language"), EXAMPLES)
def test_the_example_runs(document: str, title: str, language: str, server: Server, folder: Path) -> None:
    documented = sections(document)
    program = documented[title].program(language)
    promised = set(PROMISED_FILE.findall(program)) - {"input.png"}
    if language == "python" and title != "Setup" and "Setup" in documented:
        program = f"{documented['Setup'].program(language)}\n{program}"
    program = program.replace("http://localhost:30000", server.base_url).replace("/path/to/", f"{folder}/path/to/")
    command = [sys.executable, "-"] if language == "python" else ["bash", "-euo", "pipefail", "-s"]
    done = subprocess.run(
        command,
        input=program,
        cwd=folder,
        # python3 in the shell examples is this Python, whatever the machine has.
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        text=True,
        capture_output=True,
        timeout=EXAMPLE_SECONDS,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{server.log.read_text()[-4000:]}"
    for name in promised:
        assert MAGIC[Path(name).suffix] in (folder / name).read_bytes()[:12]
