"""Where an adapter's weights are: from what a client names to one safetensors file, without loading it."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError

CONFIG_NAME = "adapter_config.json"
"""PEFT's: holds alpha and other settings that PEFT does not write into the safetensors file."""

PREFERRED_NAMES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
"""Diffusers' and PEFT's names for the file, preferred in a folder that has several."""

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

REPO = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*?)(@(?P<revision>[\w.-]+))?(/(?P<file>[\w./ -]+\.safetensors))?")
"""`owner/name`, with `@revision` or `/file.safetensors` where needed."""


class InvalidAdapter(ValueError):
    """The adapter can't be used with this model; the message is one sentence that says why."""


@dataclass(frozen=True)
class Source:
    """An adapter that exists."""

    path: str
    """As the client named it: the only name that a message may contain."""
    file: Path
    config: Path | None
    """PEFT's `adapter_config.json` beside it."""
    identity: str
    """Equal for equal weights: a hash over path, size and mtime of file and config, or `repo@commit/file`."""


def resolve(path: str, within: Path | None = None) -> Source:
    """Find the safetensors file that `path` means: a file, a folder or a Hugging Face repo id, in this order.

    Of a repo, only the chosen file and PEFT's config are downloaded; without network, the local cache is used.

    Args:
        within: the only folder whose files may be read. Relative paths then start there, links are resolved before the
            check, and repo ids are not accepted.

    Raises:
        InvalidAdapter: nothing is there, or nothing but pickles, or it is unclear which file is meant, or the file is
            outside `within`.
    """
    if "\0" in path:  # no file name contains it, and file functions fail on it
        raise InvalidAdapter(f"{path!r} does not exist")
    try:
        place = _confined(path, Path(path), within) if within else Path(path).expanduser()
        if place.is_file():
            return _local(path, place, within)
        if place.is_dir():
            names = sorted(file.name for file in place.iterdir())
            return _local(path, place / _choose(path, names), within)
    except OSError as error:  # the name is too long, or the folder unreadable
        raise InvalidAdapter(f"'{path}' can't be read: {error.strerror}") from error
    except RuntimeError as error:  # `~name` where no such user exists
        raise InvalidAdapter(f"'{path}' can't be read: {error}") from error
    if within:
        raise InvalidAdapter(
            f"'{path}' does not exist in this server's folder of adapters, and it takes adapters from nowhere else"
        )
    # Two components ending in .safetensors are a relative path: nobody names a repo like that.
    match = REPO.fullmatch(path)
    if match is None or (path.endswith(".safetensors") and match["file"] is None):
        raise InvalidAdapter(f"'{path}' does not exist: it is no file, no folder and no Hugging Face repo id")
    return _download(path, match["repo"], match["revision"], match["file"])


def _local(path: str, file: Path, within: Path | None) -> Source:
    if file.suffix in PICKLES:
        raise InvalidAdapter(f"'{path}' is a pickle; only safetensors files are read, because pickles can run code")
    config: Path | None = file.parent / CONFIG_NAME
    config = config if config and config.is_file() else None
    if within:
        file = _confined(path, file, within)
        config = config and _confined(path, config, within)
    state = [(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in (file, config) if f]
    return Source(path, file, config, identity=sha256(repr(state).encode()).hexdigest())


def _confined(path: str, place: Path, within: Path) -> Path:
    """The real path of `place`. One outside `within` is refused in the same words whether it exists or not."""
    real = Path(os.path.realpath(within / place))
    if not real.is_relative_to(os.path.realpath(within)):
        raise InvalidAdapter(f"'{path}' lies outside of this server's folder of adapters")
    return real


def _choose(path: str, names: list[str]) -> str:
    candidates = [name for name in names if name.endswith(".safetensors")]
    preferred = [name for name in PREFERRED_NAMES if name in candidates]
    if preferred:
        return preferred[0]
    if len(candidates) == 1:
        return candidates[0]
    if candidates:
        listed = ", ".join(candidates[:5]) + (", …" if len(candidates) > 5 else "")
        raise InvalidAdapter(f"'{path}' has {len(candidates)} safetensors files ({listed}); name the one that is meant")
    if any(name.endswith(PICKLES) for name in names):
        raise InvalidAdapter(f"'{path}' has only pickled weights; only safetensors files are read")
    raise InvalidAdapter(f"'{path}' has no safetensors file")


def _download(path: str, repo: str, revision: str | None, wanted: str | None) -> Source:
    try:
        try:
            info = HfApi().model_info(repo, revision=revision)
            commit, names = info.sha, [sibling.rfilename for sibling in info.siblings or ()]
        except (HTTPError, OSError):  # gone, private, or no network: an earlier download still serves
            folder = Path(snapshot_download(repo, revision=revision, local_files_only=True))
            commit, names = folder.name, [str(file.relative_to(folder)) for file in folder.rglob("*")]
        name = wanted or _choose(path, sorted(name for name in names if "/" not in name))
        file = Path(hf_hub_download(repo, name, revision=commit))
        beside = str(Path(name).with_name(CONFIG_NAME))
        config = Path(hf_hub_download(repo, beside, revision=commit)) if beside in names else None
    except LocalEntryNotFoundError:
        raise InvalidAdapter(
            f"'{path}' does not exist: it is no file and no folder, and there is no Hugging Face repo of that name, or "
            "it can't be reached"
        ) from None
    except (HTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise InvalidAdapter(f"'{path}' could not be downloaded from Hugging Face: {reason}") from error
    return Source(path, file, config, identity=f"{repo}@{commit}/{name}")
