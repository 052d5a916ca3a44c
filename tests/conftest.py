"""Shared fixtures: the folder of prepared real models, when there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from onnxcompress.cache import VARIABLE

# How long an example takes to make says more about the machine than about the test.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_configure() -> None:
    """Keep placements of tests (timed by fake clocks, too) out of the user's cache.

    It runs before anything imports numpy, which then starts no threads.
    """
    os.environ[VARIABLE] = "off"
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # small matrices, and several test processes


@pytest.fixture(scope="session")
def zoo() -> Path:
    """The folder named by ONNXCOMPRESS_ZOO; tests that need it are skipped where it is not set."""
    folder = os.environ.get("ONNXCOMPRESS_ZOO")
    if not folder:
        pytest.skip("set ONNXCOMPRESS_ZOO to a folder of prepared models to run this test")
    return Path(folder)


@pytest.fixture(scope="session")
def models_dir() -> Path:
    """The repository's folder of small trained models."""
    return Path(__file__).parent.parent / "models"
