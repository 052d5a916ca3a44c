from __future__ import annotations

from pathlib import Path

import pytest

from onnxcompress import targets
from onnxcompress.errors import UsageError
from onnxcompress.targets import TARGETS, detect_target, target_by_name, target_for


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", {"avx2", "avx512vnni"}, "x86-vnni"),
        ("AMD64", {"avx2", "avxvnni"}, "x86-vnni"),
        ("x86_64", {"avx2", "avx512f"}, "x86-avx2"),
        ("x86_64", set(), "x86-avx2"),
        ("arm64", set(), "arm64"),
        ("aarch64", {"asimddp"}, "arm64"),
        ("riscv64", set(), "generic"),
    ],
)
def test_target_for_a_cpu(machine: str, features: set[str], expected: str) -> None:
    assert target_for(machine, frozenset(features)).name == expected


def test_names_are_keys_and_auto_detects() -> None:
    assert all(target_by_name(name) is target for name, target in TARGETS.items())
    assert target_by_name("auto") == detect_target()


def test_unknown_name_suggests_a_near_one() -> None:
    with pytest.raises(UsageError, match="x86-vni") as caught:
        target_by_name("x86-vni")
    assert "'x86-vnni'" in (caught.value.hint or "")


def test_cpuinfo_is_parsed_and_normalized(tmp_path: Path) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(
        "processor\t: 0\nflags\t\t: fpu sse4_2 avx512_vnni\n\nprocessor\t: 1\nflags\t: other\n"
    )
    assert targets.parse_cpuinfo(file) == {"fpu", "sse42", "avx512vnni"}
    assert targets.parse_cpuinfo(tmp_path / "absent") == set()


def test_features_of_this_machine_are_clean_names() -> None:
    assert all(name == name.lower() and "_" not in name for name in targets.cpu_features())


def test_only_16_bit_sums_reduce_the_range() -> None:
    assert {name for name, target in TARGETS.items() if target.reduce_range} == {
        "x86-avx2",
        "generic",
    }


def test_a_symmetric_target_takes_signed_activations() -> None:
    symmetric = {name: t for name, t in TARGETS.items() if t.symmetric_activations}
    assert list(symmetric) == ["cuda", "tensorrt"]
    assert all(t.activation_dtype == "int8" for t in symmetric.values())
