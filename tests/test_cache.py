"""The cache of measurements: where it is, and that nothing in it can do harm."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from onnxcompress import cache

KEY = "ab12"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_stored_comes_back(folder: Path) -> None:
    assert cache.read_entry("kind", KEY) is None
    assert cache.write_entry("kind", KEY, {"a": 1, "b": [True, "x"]})
    assert cache.read_entry("kind", KEY) == {"a": 1, "b": [True, "x"]}
    assert cache.read_entry("other", KEY) is None
    assert [p.name for p in (folder / "kind").iterdir()] == [f"{KEY}.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"null", b"[" * 100_000])
def test_a_broken_entry_is_none(folder: Path, content: bytes) -> None:
    (folder / "kind").mkdir(parents=True)
    (folder / "kind" / f"{KEY}.json").write_bytes(content)
    assert cache.read_entry("kind", KEY) is None


def test_a_folder_that_cannot_be_made_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv(cache.VARIABLE, str(tmp_path / "file" / "cache"))
    assert not cache.write_entry("kind", KEY, {})
    assert cache.read_entry("kind", KEY) is None


@pytest.mark.parametrize("word", ["off", "OFF", "0", "", " none "])
def test_it_can_be_switched_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cache.VARIABLE, word)
    assert cache.cache_folder() is None
    assert not cache.write_entry("kind", KEY, {})


def test_it_follows_the_convention_of_the_platform(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(cache.VARIABLE)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_folder() == tmp_path / "xdg" / "onnxcompress"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says the specification
    assert cache.cache_folder() == tmp_path / ".cache" / "onnxcompress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache.cache_folder() == tmp_path / "Library/Caches" / "onnxcompress"
