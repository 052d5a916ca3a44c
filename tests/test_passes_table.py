from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from onnxcompress import passes
from onnxcompress.errors import UsageError
from onnxcompress.passes import ENTRY_POINT_GROUP, PASSES, make_pass, pass_class, pass_table
from onnxcompress.passes.base import PassOptions, Stage
from tests import fakes


def entry(name: str, value: str) -> EntryPoint:
    return EntryPoint(name, value, ENTRY_POINT_GROUP)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_of_the_table_is_complete(name: str) -> None:
    found = pass_class(name)
    assert found.name == name
    assert found.summary
    assert isinstance(found.stage, Stage)
    assert issubclass(found.options_type, PassOptions)
    made = make_pass(name, {})
    assert made.options == found.options_type()


def test_preparations_come_before_every_other_pass() -> None:
    assert [pass_class(name).stage for name in ("simplify", "fold")] == [Stage.PREPARE] * 2
    others = set(PASSES) - {"simplify", "fold"}
    assert all(pass_class(name).stage > Stage.PREPARE for name in others)


def test_other_packages_add_passes() -> None:
    table = pass_table([entry("gain", "tests.fakes:GainPass")])
    assert table["gain"] == "tests.fakes:GainPass"
    assert list(table)[: len(PASSES)] == list(PASSES)


def test_the_same_pass_offered_twice_is_one() -> None:
    twice = [entry("gain", "tests.fakes:GainPass")] * 2
    assert pass_table(twice) == pass_table(twice[:1])


@pytest.mark.parametrize(
    "installed",
    [
        [entry("quant", "other:QuantPass")],
        [entry("gain", "one:GainPass"), entry("gain", "two:GainPass")],
    ],
)
def test_a_name_taken_twice_is_refused(installed: list[EntryPoint]) -> None:
    with pytest.raises(UsageError, match="two passes are named"):
        pass_table(installed)


def test_a_pass_of_another_package_is_made_with_its_options(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    offered = [entry("gain", "tests.fakes:GainPass")]
    monkeypatch.setattr(passes, "entry_points", lambda group: offered)
    made = make_pass("gain", {"factor": "2"})
    assert made.options == fakes.GainOptions(factor=2.0)


@pytest.mark.parametrize("value", ["tests.nowhere:X", "tests.fakes:Nothing"])
def test_a_pass_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setattr(passes, "entry_points", lambda group: [entry("ghost", value)])
    with pytest.raises(UsageError, match="pass 'ghost' cannot be imported"):
        pass_class("ghost")


def test_a_pass_whose_own_dependency_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    class Missing(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise ImportError("no module named 'torch'")

    monkeypatch.setitem(sys.modules, "tests.missing", Missing("tests.missing"))
    monkeypatch.setattr(passes, "entry_points", lambda group: [entry("t", "tests.missing:T")])
    with pytest.raises(UsageError, match="no module named 'torch'"):
        pass_class("t")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf", float("nan")])
def test_options_are_finite_numbers(value: object) -> None:
    with pytest.raises(UsageError, match=r"gain\.factor=.* must be a finite number"):
        fakes.GainOptions.parse({"factor": value}, owner="gain")


_IMPORT_ALONE = """
import importlib, sys
for module in sys.argv[1:]:
    for name in [n for n in sys.modules if n.partition(".")[0] == "onnxcompress"]:
        del sys.modules[name]
    importlib.import_module(module)
"""


def test_every_pass_can_be_imported_first() -> None:
    modules = [target.partition(":")[0] for target in PASSES.values()]
    subprocess.run([sys.executable, "-c", _IMPORT_ALONE, *modules], check=True)
