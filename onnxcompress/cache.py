"""Measurements that stay true between runs, as small JSON files in the user's cache folder.

``ONNXCOMPRESS_CACHE`` names another folder, or switches the cache off (``off``). Otherwise the
platform's convention decides: ``$XDG_CACHE_HOME`` or ``~/.cache`` on Linux, ``~/Library/Caches`` on
macOS, ``%LOCALAPPDATA%`` on Windows. The cache is a convenience: a file that cannot be read, or is
not what it should be, is as good as none, and one that cannot be written is not written.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TypeAlias

from onnxcompress._atomic import replacing

VARIABLE = "ONNXCOMPRESS_CACHE"
"""Environment variable with the folder, or a word that switches the cache off."""

_OFF = frozenset({"", "0", "off", "no", "none", "false"})
_MAX_BYTES = 1 << 20

Entry: TypeAlias = Mapping[str, object]


def cache_folder() -> Path | None:
    """The folder of the cache (it need not exist); None when it is off or there is no home."""
    named = os.environ.get(VARIABLE)
    if named is not None:
        return None if named.strip().lower() in _OFF else Path(named).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA")
    else:
        base = os.environ.get("XDG_CACHE_HOME")
    if base and Path(base).is_absolute():
        return Path(base) / "onnxcompress"
    try:
        home = Path.home()
    except RuntimeError:  # no home folder is known
        return None
    return home / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "onnxcompress"


def read_entry(kind: str, key: str) -> Entry | None:
    """What was stored, None when there is nothing usable.

    Args:
        kind: What is stored, the name of a folder.
        key: Hexadecimal digest of everything the entry depends on.
    """
    path = _path(kind, key)
    if path is None:
        return None
    try:
        if path.stat().st_size > _MAX_BYTES:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_entry(kind: str, key: str, entry: Entry) -> bool:
    """Store ``entry``; whether that was possible.

    Args:
        kind: As for :func:`read_entry`.
        key: As for :func:`read_entry`.
        entry: Numbers, texts, truth values and lists of them.
    """
    path = _path(kind, key)
    if path is None:
        return False
    text = json.dumps(dict(entry), indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing([path]) as (part,):
            part.write_text(text, encoding="utf-8")
    except OSError:
        return False
    return True


def _path(kind: str, key: str) -> Path | None:
    folder = cache_folder()
    return None if folder is None else folder / kind / f"{key}.json"
