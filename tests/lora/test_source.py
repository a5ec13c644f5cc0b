"""What a client may name as an adapter, and how two adapters are told apart."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora.source import InvalidAdapter, resolve


def weights(file: Path, value: float = 1.0) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"x": torch.full((4,), value)}, file)
    return file


def test_a_file_is_itself(tmp_path: Path) -> None:
    file = weights(tmp_path / "anything.safetensors")
    assert resolve(str(file)).file == file


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["one.safetensors"], "one.safetensors"),
        (["a.safetensors", "pytorch_lora_weights.safetensors"], "pytorch_lora_weights.safetensors"),
        (["a.safetensors", "adapter_model.safetensors", "readme.md"], "adapter_model.safetensors"),
    ],
)
def test_in_a_folder_the_only_file_is_meant_or_the_one_with_a_usual_name(
    names: list[str], chosen: str, tmp_path: Path
) -> None:
    for name in names:
        weights(tmp_path / name)
    assert resolve(str(tmp_path)).file == tmp_path / chosen


def test_pefts_config_is_found_beside_the_file(tmp_path: Path) -> None:
    file = weights(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text("{}")
    assert resolve(str(file)).config == tmp_path / "adapter_config.json"
    assert resolve(str(tmp_path)).config == tmp_path / "adapter_config.json"


@pytest.mark.parametrize(
    ("path", "files", "reason"),
    [
        ("nowhere.safetensors", [], "does not exist"),
        ("path/to/nowhere", [], "does not exist"),
        ("folder/nowhere.safetensors", [], "does not exist"),
        ("empty", ["empty/"], "has no safetensors file"),
        ("pickled", ["pickled/adapter_model.bin"], "has only pickled weights"),
        ("adapter.pt", ["adapter.pt"], "is a pickle"),
        (
            "two",
            ["two/a.safetensors", "two/b.safetensors"],
            r"has 2 safetensors files \(a.safetensors, b.safetensors\)",
        ),
    ],
)
def test_what_is_no_adapter_is_refused_by_name(
    path: str, files: list[str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in files:
        target = tmp_path / file
        (target if file.endswith("/") else target.parent).mkdir(parents=True, exist_ok=True)
        if not file.endswith("/"):
            target.write_bytes(b"content")
    with pytest.raises(InvalidAdapter, match=f"'{path}' {reason}"):
        resolve(path)


def test_the_identity_follows_the_content(tmp_path: Path) -> None:
    file = weights(tmp_path / "adapter.safetensors")
    before = resolve(str(file)).identity
    assert resolve(str(tmp_path)).identity == before
    weights(file, value=2.0)
    os.utime(file, ns=(0, 123_456_789))
    assert resolve(str(file)).identity != before


def test_a_changed_config_is_another_identity(tmp_path: Path) -> None:
    file = weights(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 1}')
    before = resolve(str(file)).identity
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 16}')
    assert resolve(str(file)).identity != before


class TestWithinAFolder:
    """Where the operator allows adapters from one folder only."""

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        weights(tmp_path / "secret.safetensors")
        weights(tmp_path / "adapters-of-others" / "style.safetensors")
        weights(tmp_path / "adapters" / "style.safetensors")
        weights(tmp_path / "adapters" / "more" / "ink.safetensors")
        return tmp_path / "adapters"

    @pytest.mark.parametrize("path", ["style.safetensors", "more/../style.safetensors", "more", "more/ink.safetensors"])
    def test_relative_paths_start_there(self, folder: Path, path: str) -> None:
        assert resolve(path, folder).file.is_relative_to(folder)

    def test_absolute_paths_into_it_mean_the_same(self, folder: Path) -> None:
        assert resolve(str(folder / "style.safetensors"), folder) == replace(
            resolve("style.safetensors", folder), path=str(folder / "style.safetensors")
        )

    def test_a_folder_that_is_itself_a_link_is_followed(self, folder: Path, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(folder)
        assert resolve("style.safetensors", tmp_path / "link").file == folder / "style.safetensors"
        assert resolve(str(tmp_path / "link" / "style.safetensors"), tmp_path / "link").file.is_relative_to(folder)

    @pytest.mark.parametrize("place", ["secret.safetensors", "nowhere.safetensors", "", "adapters-of-others"])
    @pytest.mark.parametrize("form", ["../{place}", "more/../../{place}", "{parent}/{place}"])
    def test_what_lies_outside_is_refused_in_the_same_words_whether_it_is_there_or_not(
        self, folder: Path, place: str, form: str
    ) -> None:
        path = form.format(place=place, parent=folder.parent)
        with pytest.raises(InvalidAdapter) as refused:
            resolve(path, folder)
        assert str(refused.value) == f"'{path}' lies outside of this server's folder of adapters"

    @pytest.mark.parametrize("linked", ["file.safetensors", "folder", "folder/adapter.safetensors", "config"])
    def test_links_that_lead_outside_are_refused(self, folder: Path, linked: str) -> None:
        outside = folder.parent / "adapters-of-others"
        (folder / "file.safetensors").symlink_to(folder.parent / "secret.safetensors")
        (folder / "folder").symlink_to(outside)
        (outside / "adapter.safetensors").symlink_to(folder / "style.safetensors")
        weights(folder / "config" / "adapter_model.safetensors")
        (folder.parent / "adapter_config.json").write_text("{}")
        (folder / "config" / "adapter_config.json").symlink_to(folder.parent / "adapter_config.json")
        if linked == "folder/adapter.safetensors":  # out and back in: the file itself is inside
            assert resolve(linked, folder).file == folder / "style.safetensors"
            return
        with pytest.raises(InvalidAdapter, match="lies outside"):
            resolve(linked, folder)

    @pytest.mark.parametrize("path", ["someone/style", "someone/style@main", "nowhere.safetensors", "~"])
    def test_there_is_no_other_place(self, folder: Path, path: str) -> None:
        with pytest.raises(InvalidAdapter, match=f"'{path}' does not exist in this server's folder of adapters"):
            resolve(path, folder)


@pytest.mark.parametrize("within", [False, True])
@pytest.mark.parametrize("path", ["x" * 5000, "loop", "no\0name", "~nobody-of-this-name/a.safetensors"])
def test_a_path_that_cannot_be_followed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, within: bool
) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidAdapter, match=r"can't be read|does not exist"):
        resolve(path, tmp_path if within else None)


class TestHuggingFaceRepo:
    """Without network: what is in the hub's local cache."""

    COMMIT = "0123456789abcdef0123456789abcdef01234567"

    @pytest.fixture(autouse=True)
    def _hub_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        from huggingface_hub import constants

        repo = tmp_path / "models--someone--style"
        weights(repo / "snapshots" / self.COMMIT / "style.safetensors")
        weights(repo / "snapshots" / self.COMMIT / "more" / "other.safetensors")
        (repo / "refs").mkdir()
        (repo / "refs" / "main").write_text(self.COMMIT)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def test_its_identity_is_the_revision(self) -> None:
        source = resolve("someone/style")
        assert source.identity == f"someone/style@{self.COMMIT}/style.safetensors"
        assert source.file.is_file()

    def test_a_file_in_it_can_be_named(self) -> None:
        assert resolve("someone/style/more/other.safetensors").file.name == "other.safetensors"

    def test_a_revision_can_be_named(self) -> None:
        assert resolve(f"someone/style@{self.COMMIT}").identity == resolve("someone/style").identity

    def test_one_that_cannot_be_reached_is_refused(self) -> None:
        with pytest.raises(InvalidAdapter, match="'someone/unknown' does not exist"):
            resolve("someone/unknown")
