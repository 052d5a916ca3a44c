"""The job around a pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from onnxcompress.calibration.sources import open_dataset
from onnxcompress.interface import input_specs
from tests.builder import ModelBuilder
from tests.running import context


@pytest.mark.parametrize(("most", "left"), [(4, 4), (10, 10), (11, 10), (0, 10)])
def test_a_job_with_fewer_samples_takes_them_from_the_whole_set(
    most: int, left: int, tmp_path: Path
) -> None:
    b = ModelBuilder("small")
    b.output(b.op("Relu", b.input("x", ["n", 2])))
    samples = np.arange(20, dtype=np.float32).reshape(10, 2)
    job = context(tmp_path, open_dataset({"x": samples}, input_specs(b.build())))
    limited = job.at_most(most)
    assert limited.calibration is not None
    assert limited.calibration.sample_count == left
    if left == 10:
        assert limited is job
        return
    seen = np.concatenate([feeds["x"] for feeds in limited.calibration.batches(2)])
    assert seen.max() > samples[left:].min()  # not the first ones alone
    assert {tuple(row) for row in seen} <= {tuple(row) for row in samples}


def test_a_job_without_data_stays_as_it_is(tmp_path: Path) -> None:
    job = context(tmp_path)
    assert job.at_most(3) is job
