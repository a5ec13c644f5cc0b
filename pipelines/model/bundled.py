"""Where the model is that is served when no `model_path` is given: small, trained, part of the package."""

from __future__ import annotations

from pathlib import Path


def model_directory() -> Path:
    """The bundled model in the standard diffusers layout; `pipelines/bundled/MODEL_CARD.md` describes it."""
    return Path(__file__).parents[1] / "bundled" / "weights"
