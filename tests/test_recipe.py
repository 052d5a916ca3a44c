from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onnxcompress.calibration.sources import ImageOptions
from onnxcompress.errors import OutputError, UsageError
from onnxcompress.recipe import (
    Recipe,
    load_recipe,
    merge_options,
    parse_settings,
    save_recipe,
    to_toml,
)
from onnxcompress.verification.gates import Gates
from tests import fakes


@pytest.fixture(autouse=True)
def _passes(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch)


FULL = Recipe(
    passes=("gain", "prune"),
    options={"gain": {"factor": 0.5, "names": ["a", 'quoted "b"']}},
    target="arm64",
    provider="auto",
    threads=2,
    batch_size=4,
    seed=7,
    calib_samples=10,
    eval_samples=20,
    image=ImageOptions(size=(32, 48), mean=(1.0, 2.0, 3.0), layout="NHWC"),
    gates=Gates(min_sqnr_db=20.0, max_drop=0.01, enforced=False),
    simplify=False,
    fold=False,
)


@pytest.mark.parametrize("recipe", [Recipe(), FULL, Recipe(passes=("gain",), gates=Gates())])
def test_round_trip(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    save_recipe(recipe, path)
    assert load_recipe(path) == recipe


def test_set_strings_are_saved_as_values(tmp_path: Path) -> None:
    recipe = Recipe(passes=("gain",), options={"gain": {"factor": "0.25", "names": "a, b"}})
    save_recipe(recipe, tmp_path / "r.toml")
    assert load_recipe(tmp_path / "r.toml").options == {
        "gain": {"factor": 0.25, "names": ["a", "b"]}
    }


def test_the_example_of_the_documentation(tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(
        'schema_version = 1\npasses = ["prune", "gain"]\n[gates]\nmin_agreement = 0.99\n'
        "[options.gain]\nfactor = 1\n"
    )
    recipe = load_recipe(path)
    assert recipe.passes == ("prune", "gain")
    assert recipe.gates.min_agreement == 0.99
    assert recipe.options == {"gain": {"factor": 1}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("passes = [", "not valid TOML"),
        ("schema_version = 2", "schema_version 2"),
        ("pases = []", "no entry 'pases'"),
        ("passes = 'gain'", "'passes' must be an array"),
        ("passes = [1]", "'passes' must be a string"),
        ("seed = 1.5", "'seed' must be a whole number"),
        ("seed = true", "'seed' must be a whole number"),
        ("fold = 1", "'fold' must be bool"),
        ("batch_size = 0", "batch-size must be at least 1"),
        ("threads = 0", "threads must be at least 1"),
        ("threads = 99999", "threads must be between 1 and"),
        ("seed = -1", "seed must be at least 0"),
        ("schema_version = true", "schema_version True"),
        ("gates = 3", "must be a table"),
        ("[gates]\nmin_cosin = 1", "no entry 'min_cosin'"),
        ("[gates]\nmin_cosine = 2", "between -1 and 1"),
        ("[gates]\nmin_cosine = 'x'", "'min_cosine' must be float"),
        ("[image]\nlayout = 'NCWH'", "must be one of auto, NCHW, NHWC"),
        ("[image]\nsize = [1]", "must have 2 entries"),
        ("[options]\ngain = 1", "'gain' must be a table"),
    ],
)
def test_what_is_no_recipe(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    path.write_text(text)
    with pytest.raises(UsageError, match=message):
        load_recipe(path)


def test_a_misspelt_entry_gets_a_guess(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("pases = []")
    with pytest.raises(UsageError) as caught:
        load_recipe(tmp_path / "r.toml")
    assert caught.value.hint is not None
    assert "Did you mean 'passes'?" in caught.value.hint


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "none.toml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match="cannot be read"):
        load_recipe(tmp_path / "binary.toml")
    with pytest.raises(OutputError, match="cannot be written"):
        save_recipe(Recipe(), tmp_path / "no" / "folder.toml")


def test_settings() -> None:
    assert parse_settings(("prune.macs=0.7", "prune.align = 16", "quant.skip=a=b,c")) == {
        "prune": {"macs": "0.7", "align": "16"},
        "quant": {"skip": "a=b,c"},
    }


@pytest.mark.parametrize("setting", ["macs=0.7", "prune.macs", "prune=1", ".a=1", "prune.=1"])
def test_settings_of_another_form(setting: str) -> None:
    with pytest.raises(UsageError, match=r"PASS\.OPTION=VALUE"):
        parse_settings((setting,))


def test_a_setting_given_twice() -> None:
    with pytest.raises(UsageError, match="twice"):
        parse_settings(("gain.a=1", "gain.a=2"))


def test_merging_goes_option_by_option() -> None:
    merged = merge_options({"a": {"x": 1, "y": 2}, "b": {"z": 3}}, {"a": {"y": 4}, "c": {"w": 5}})
    assert merged == {"a": {"x": 1, "y": 4}, "b": {"z": 3}, "c": {"w": 5}}


_SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8")),
)
_VALUES = st.one_of(_SCALARS, st.lists(_SCALARS, max_size=3))
_KEYS = st.text(st.characters(codec="utf-8"), max_size=8)


@given(
    st.dictionaries(
        _KEYS, st.one_of(_VALUES, st.dictionaries(_KEYS, _VALUES, max_size=3)), max_size=4
    )
)
def test_toml_comes_back_as_it_was(values: dict[str, object]) -> None:
    parsed = tomllib.loads(to_toml(values))
    assert {k: v for k, v in values.items() if v != {}} == parsed
