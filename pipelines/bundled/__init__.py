"""The model served when no `model_path` is given: small, trained, part of the package (see `MODEL_CARD.md`)."""

from __future__ import annotations

from pathlib import Path


def model_directory() -> Path:
    """The bundled model in the standard diffusers layout."""
    return Path(__file__).parent / "weights"
