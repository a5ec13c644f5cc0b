"""The model that is served when no `model_path` is given: small, made on first use, kept in the user's cache."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from hashlib import sha256
from importlib import resources
from pathlib import Path


def model_directory() -> Path:
    """The bundled model in the standard diffusers layout, built if this version of it is not cached yet.

    Needs torch only to build. Any number of processes may call it at once.
    """
    sources = resources.files(__name__)
    version = sha256(b"".join(sources.joinpath(name).read_bytes() for name in ("builder.py", "ditserve.yaml")))
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ditserve"
    return make_directory_once(cache / f"bundled-{version.hexdigest()[:12]}", _save)


def make_directory_once(directory: Path, fill: Callable[[Path], None]) -> Path:
    """Make `directory` whole or not at all: `fill` writes a private one, which a single rename puts in place.

    Of several processes that race, one wins; its directory is what all of them return.
    """
    if directory.exists():
        return directory
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}-") as private:
        filled = Path(private, directory.name)
        filled.mkdir()
        fill(filled)
        try:
            filled.rename(directory)
        except OSError:  # a directory cannot replace one that is not empty: another process was first
            if not directory.exists():
                raise
    return directory


def _save(directory: Path) -> None:
    from pipelines.bundled.builder import build

    build().save_pretrained(directory)
    with resources.as_file(resources.files(__name__).joinpath("ditserve.yaml")) as overrides:
        shutil.copy(overrides, directory)
