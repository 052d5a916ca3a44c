from __future__ import annotations

import json
import os
import stat
import tempfile
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxcompress
from onnxcompress.errors import DataError, ModelError, OutputError, PassError, UsageError
from onnxcompress.passes.base import PassReport, Stage
from onnxcompress.pipeline import compress
from onnxcompress.result import CompressionResult
from onnxcompress.verification.gates import Gates
from tests import fakes


@pytest.fixture(autouse=True)
def _passes(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return fakes.save_classifier(tmp_path / "in.onnx")


def run(model: Path, *passes: str, **given: object) -> CompressionResult:
    given.setdefault("eval", fakes.samples(40))
    arguments = {"passes": passes, "measure": False, **given}
    return compress(model, model.with_name("out.onnx"), **arguments)  # type: ignore[arg-type]


def assert_nothing_written(model: Path) -> None:
    assert fakes.leftovers(model.parent, model.name) == []


def test_a_run_writes_a_model_that_says_where_it_comes_from(model: Path) -> None:
    result = run(model, "gain", options={"gain": {"factor": "2"}}, seed=3)
    assert result.written
    assert result.passed
    assert result.exit_code == 0
    assert fakes.leftovers(model.parent, "in.onnx", "out.onnx") == []
    written = onnx.load(result.output_path)
    onnx.checker.check_model(written, full_check=True)
    metadata = {entry.key: entry.value for entry in written.metadata_props}
    assert metadata["onnxcompress.version"] == onnxcompress.__version__
    assert metadata["onnxcompress.original_sha256"] == result.original_sha256
    recipe = json.loads(metadata["onnxcompress.recipe"])
    assert recipe["options"] == {"gain": {"factor": 2.0}}
    assert recipe["seed"] == 3
    before, after = (
        next(onnx.numpy_helper.to_array(t) for t in m.graph.initializer if t.name == "w1")
        for m in (onnx.load(model), written)
    )
    np.testing.assert_array_equal(after, 2 * before)


def test_constants_that_nothing_reads_are_not_written(model: Path) -> None:
    result = run(model, "litter")
    names = {tensor.name for tensor in onnx.load(result.output_path).graph.initializer}
    assert names == {tensor.name for tensor in onnx.load(model).graph.initializer}


def test_the_file_has_ordinary_permissions(model: Path) -> None:
    result = run(model, "gain")
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(result.output_path.stat().st_mode) == 0o666 & ~umask


def test_the_same_run_gives_the_same_file(model: Path) -> None:
    first = run(model, "gain").result_sha256
    assert run(model, "gain").result_sha256 == first


def test_every_pass_is_reported(model: Path) -> None:
    result = run(model, "gain", "prune")
    names = [(run.name, run.stage, run.automatic) for run in result.passes]
    assert names == [
        ("simplify", Stage.PREPARE, True),
        ("fold", Stage.PREPARE, True),
        ("prune", Stage.STRUCTURE, False),
        ("gain", Stage.PRECISION, False),
    ]
    assert result.passes[3].options == {"factor": 1.0, "names": []}
    assert result.passes[3].report.changes[0].what == "edited"
    assert any("prune → gain, not as typed (gain, prune)" in note for note in result.notes)
    assert any("Added simplify and fold" in note for note in result.notes)
    assert {"load", "normalize", "pass gain", "save", "verify"} <= result.timings_s.keys()


def test_typing_the_order_of_the_stages_needs_no_note(model: Path) -> None:
    assert not any("not as typed" in note for note in run(model, "prune", "gain").notes)


def test_preparations_can_be_switched_off(model: Path) -> None:
    names = [r.name for r in run(model, "gain", simplify=False).passes]
    assert names == ["fold", "gain"]
    result = run(model, "gain", simplify=False, fold=False)
    assert [r.name for r in result.passes] == ["gain"]
    assert result.notes == ()


def test_preparing_alone_adds_nothing(model: Path) -> None:
    assert [r.name for r in run(model, "fold").passes] == ["fold"]


@pytest.mark.parametrize(
    ("passes", "options", "message"),
    [
        ((), {}, "no passes are asked for"),
        (("gian",), {}, "there is no pass 'gian'"),
        (("gain", "gain"), {}, "named twice"),
        (("gain",), {"prune": {"macs": 1}}, "'prune' is not in this run"),
        (("gain",), {"nonsense": {"macs": 1}}, "there is no pass 'nonsense'"),
        (("gain",), {"gain": {"fcator": 1}}, "no option 'fcator'"),
        (("gain",), {"gain": {"factor": "much"}}, "wants float"),
        (("gain",), {"gain": {"factor": 11}}, "at most 10"),
    ],
)
def test_requests_that_cannot_be_understood(
    model: Path, passes: tuple[str, ...], options: dict[str, dict[str, object]], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(model, *passes, options=options)
    assert_nothing_written(model)


def test_a_misspelt_pass_gets_a_guess(model: Path) -> None:
    with pytest.raises(UsageError) as caught:
        run(model, "gian")
    assert caught.value.hint is not None
    assert "Did you mean 'gain'?" in caught.value.hint


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("invalid", "NoSuchOperator"),
        ("unloadable", "the model it made is broken and was rolled back"),
        ("rename", "outputs changed from y to renamed"),
        ("fixbatch", "input 'x' changed"),
        ("crash", "internal error, ZeroDivisionError: a bug"),
        ("refuse", "this model is not for me"),
    ],
)
def test_a_pass_that_fails_is_named_and_nothing_is_written(
    model: Path, name: str, message: str
) -> None:
    with pytest.raises(PassError, match=f"pass '{name}'.*{message}") as caught:
        run(model, name)
    assert caught.value.pass_name == name
    assert_nothing_written(model)


def test_an_existing_output_survives_a_failure(model: Path) -> None:
    output = model.with_name("out.onnx")
    output.write_bytes(b"precious")
    with pytest.raises(PassError):
        run(model, "crash")
    assert not run(model, "wreck").written
    assert output.read_bytes() == b"precious"
    assert fakes.leftovers(model.parent, "in.onnx", "out.onnx") == []


def test_a_failed_gate_writes_nothing(model: Path) -> None:
    result = run(model, "wreck")
    assert not result.passed
    assert not result.written
    assert result.exit_code == 1
    assert result.result_sha256 is None
    assert_nothing_written(model)


def test_a_failed_result_can_be_kept(model: Path) -> None:
    result = run(model, "wreck", keep_failed=True)
    assert result.written
    assert result.exit_code == 1
    onnx.checker.check_model(onnx.load(result.output_path))


def test_gates_can_be_left_unenforced_but_nan_stays_fatal(model: Path) -> None:
    assert run(model, "wreck", gates=Gates(enforced=False)).written
    model.with_name("out.onnx").unlink()
    result = run(model, "nan", gates=Gates(enforced=False))
    assert not result.written
    assert_nothing_written(model)


def test_an_interrupt_leaves_nothing(model: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(model, "interrupt")
    assert_nothing_written(model)


def test_an_interrupt_while_verifying_leaves_nothing(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*args: object, **given: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("onnxcompress.pipeline.verify_models", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(model, "gain")
    assert_nothing_written(model)


def test_a_dry_run_writes_nothing_and_says_what_would_be_done(model: Path) -> None:
    result = run(model, "crash", dry_run=True)
    assert result.verification is None
    assert result.passed
    assert not result.written
    assert result.passes[-1].report.changes[0].what == "to be edited"
    assert_nothing_written(model)


# --- where the output goes -----------------------------------------------------------------


@pytest.mark.parametrize("link", ["same", "symlink", "hardlink", "other spelling"])
def test_the_output_may_not_be_the_input(model: Path, link: str) -> None:
    output = model.with_name("out.onnx")
    if link == "same":
        output = model
    elif link == "symlink":
        output.symlink_to(model)
    elif link == "hardlink":
        output.hardlink_to(model)
    else:
        output = model.parent / ".." / model.parent.name / model.name
    before = model.read_bytes()
    with pytest.raises(UsageError, match="are the same file"):
        compress(model, output, passes=["gain"])
    assert model.read_bytes() == before


@pytest.mark.parametrize("name", ["out.onx", "out", "out.npz", "out.ONNX.gz"])
def test_the_output_is_named_like_a_model(model: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"does not end in \.onnx"):
        compress(model, model.with_name(name), passes=["gain"])


def test_folders_that_do_not_serve(model: Path) -> None:
    with pytest.raises(OutputError, match="does not exist"):
        compress(model, model.parent / "no" / "out.onnx", passes=["gain"])
    folder = model.with_name("folder.onnx")
    folder.mkdir()
    with pytest.raises(OutputError, match="is a folder"):
        compress(model, folder, passes=["gain"])


def test_a_folder_that_is_not_writable(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(OutputError, match="not writable"):
        run(model, "gain")
    assert_nothing_written(model)


@pytest.mark.parametrize("refused", ["system", "output"])
def test_a_folder_that_refuses_files_after_all(
    model: Path, monkeypatch: pytest.MonkeyPatch, refused: str
) -> None:
    real = tempfile.mkdtemp

    def full(suffix: str | None = None, prefix: str | None = None, dir: object = None) -> str:  # noqa: A002
        if (dir is None) == (refused == "system"):
            raise OSError(28, "No space left on device")
        return real(suffix, prefix, str(dir) if dir else None)

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run(model, "gain")
    assert_nothing_written(model)


def test_a_disk_that_fills_while_saving(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match="No space left on device"):
        run(model, "gain")
    assert_nothing_written(model)


def external(path: Path, sidecar: str) -> Path:
    """The classifier with its weights in a file of their own."""
    proto = onnx.load(fakes.save_classifier(path))
    onnx.save_model(proto, path, save_as_external_data=True, location=sidecar, size_threshold=0)
    return path


def test_a_model_with_external_data(tmp_path: Path) -> None:
    model = external(tmp_path / "in.onnx", "weights.bin")
    result = run(model, "gain")
    assert result.written
    assert result.verification is not None
    assert result.verification.original.raw_bytes > 500
    onnx.checker.check_model(str(result.output_path))


def test_the_output_may_not_overwrite_the_weights_of_the_input(tmp_path: Path) -> None:
    model = external(tmp_path / "in.onnx", "out.onnx.data")
    before = (tmp_path / "out.onnx.data").read_bytes()
    with pytest.raises(UsageError, match=r"'out\.onnx\.data' holds the input's weights"):
        run(model, "gain")
    assert (tmp_path / "out.onnx.data").read_bytes() == before


# --- models and data -----------------------------------------------------------------------


def test_a_missing_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        run(tmp_path / "none.onnx", "gain")


def test_a_model_with_operators_that_nobody_knows(model: Path) -> None:
    proto = onnx.load(model)
    proto.graph.node[1].op_type = "Mystery"
    proto.graph.node[1].domain = "my.company"
    proto.opset_import.append(onnx.helper.make_opsetid("my.company", 1))
    onnx.save(proto, model)
    with pytest.raises(ModelError, match=r"my\.company::Mystery"):
        run(model, "gain")
    assert_nothing_written(model)


def figures(result: CompressionResult) -> dict[str, float | int | str]:
    return dict(result.passes[-1].report.figures)


def test_calibration_and_evaluation_data_both_given(model: Path) -> None:
    result = run(model, "hungry", calib=fakes.samples(9), calib_samples=5, eval_samples=7)
    assert figures(result)["samples"] == 5
    assert result.verification is not None
    assert result.verification.comparison.samples == 7
    assert result.calibration == "5 samples, an array in memory"
    assert result.warnings == ()


def test_calibration_data_alone_are_split(model: Path) -> None:
    result = run(model, "hungry", calib=fakes.samples(40), eval=None)
    assert figures(result)["samples"] == 30
    assert result.verification is not None
    assert result.verification.comparison.samples == 10
    assert (
        "There are no --eval data: 30 of 40 samples calibrate, the others verify." in result.notes
    )


def test_evaluation_data_alone_are_split_the_other_way(model: Path) -> None:
    result = run(model, "hungry", eval=fakes.samples(40), eval_samples=8)
    assert figures(result)["samples"] == 10
    assert result.verification is not None
    assert result.verification.comparison.samples == 8
    note = "There are no --calib data: 10 of 40 samples calibrate, the next 8 verify."
    assert note in result.notes


def test_the_same_file_twice_is_split(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    np.savez(path, x=fakes.samples(40))
    result = run(model, "hungry", calib=str(path), eval=tmp_path / "." / "data.npz")
    assert result.verification is not None
    assert figures(result)["samples"] == 30
    assert result.verification.comparison.samples == 10
    note = "--calib and --eval are the same data: 30 of 40 samples calibrate, the others verify."
    assert note in result.notes


def test_one_sample_serves_both_and_that_is_said(model: Path) -> None:
    result = run(model, "hungry", calib=fakes.samples(1), eval=None)
    assert figures(result)["samples"] == 1
    assert any("too good" in warning for warning in result.warnings)


def test_data_beside_the_model(model: Path) -> None:
    fakes.save_data(model, calib=6, evaluation=11)
    result = run(model, "hungry", eval=None)
    assert figures(result)["samples"] == 6
    assert result.verification is not None
    assert result.verification.comparison.samples == 11
    assert "Found in.eval.npz beside the model." in result.notes


def test_no_calibration_data_are_read_when_none_are_needed(model: Path) -> None:
    fakes.save_data(model, calib=6, evaluation=11)
    result = run(model, "gain", eval=None)
    assert result.calibration is None
    assert result.verification is not None
    assert result.verification.comparison.samples == 11


def test_calibration_data_that_are_not_needed_are_said(model: Path) -> None:
    result = run(model, "gain", calib=fakes.samples(5))
    assert result.calibration is None
    assert any("No pass needs calibration" in note for note in result.notes)


def test_without_data_both_are_invented_and_differ(model: Path) -> None:
    result = run(model, "hungry", eval=None, gates=Gates(enforced=False))
    assert result.verification is not None
    assert result.verification.synthetic
    assert sum("ynthetic" in warning for warning in result.warnings) == 2
    again = run(model, "hungry", eval=None, seed=1, gates=Gates(enforced=False))
    assert figures(again)["first"] != figures(result)["first"]


def test_data_that_do_not_fit(model: Path) -> None:
    with pytest.raises(DataError):
        run(model, "gain", eval=np.zeros((4, 7), np.float32))
    assert_nothing_written(model)


def test_labels_need_evaluation_data(model: Path) -> None:
    with pytest.raises(UsageError, match="without evaluation data"):
        run(model, "gain", eval=None, labels=np.zeros(4, np.int64))


def test_labels_stay_with_their_samples_when_data_are_split(model: Path) -> None:
    """The labels are the original's own answers, so its top-1 is 1 only if they stay in step."""
    from onnxcompress.runtime import open_session

    data = fakes.samples(40)
    labels = open_session(model).run({"x": data})["y"].argmax(axis=1)
    result = run(model, "hungry", eval={"x": data, "labels": labels})
    assert result.verification is not None
    accuracy = result.verification.comparison.accuracy
    assert accuracy is not None
    assert (accuracy.samples, accuracy.original_ratio) == (30, 1.0)


# --- what is said ----------------------------------------------------------------------------


def test_a_pass_that_changes_nothing_is_said(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fakes.HungryPass, "run", lambda *arguments: PassReport())
    result = run(model, "hungry", "gain", simplify=False, fold=False)
    assert [w for w in result.warnings if "changed nothing" in w] == [
        "Pass 'hungry' changed nothing: see what it skipped, and why, with -v."
    ]
    monkeypatch.setattr(fakes.GainPass, "run", lambda *arguments: PassReport())
    result = run(model, "hungry", "gain", simplify=False, fold=False)
    (said,) = (w for w in result.warnings if "changed nothing" in w)
    assert said.startswith("Passes ")
    assert said.endswith(" changed nothing: see what they skipped, and why, with -v.")


def test_a_model_without_inputs(tmp_path: Path) -> None:
    path = tmp_path / "constant.onnx"
    text = '<ir_version: 8, opset_import: ["" : 17]> g () => (float[2] y) '
    onnx.save(onnx.parser.parse_model(text + "<float[2] c = {1, 2}> { y = Neg(c) }"), path)
    with pytest.raises(ModelError, match="has no inputs"):
        compress(path, tmp_path / "out.onnx", passes=["gain"])


def test_an_original_that_onnxruntime_refuses_is_told_before_any_work(model: Path) -> None:
    proto = onnx.load(model)
    for node in proto.graph.node:
        node.name = "same"
    onnx.save(proto, model)
    with pytest.raises(ModelError, match="two nodes with same node name"):
        run(model, "crash")


def test_the_output_may_be_a_link_to_itself(model: Path) -> None:
    output = model.with_name("out.onnx")
    output.symlink_to(output.name)
    assert run(model, "gain").written
    assert output.is_file()
    assert not output.is_symlink()


def test_what_each_pass_contributed(model: Path) -> None:
    result = run(model, "gain", "prune", options={"gain": {"factor": "1.01"}}, measure=True)
    after = {entry.name: entry.after for entry in result.passes}
    assert after["gain"] is not None
    assert after["gain"].samples == 32
    assert after["gain"].sqnr_db is not None
    assert 20 < after["gain"].sqnr_db < 80
    assert after["gain"].agreement_ratio is not None
    assert after["gain"].agreement_ratio > 0.9
    assert after["gain"].speed_ratio is not None
    assert after["gain"].macs == 160
    changed = {entry.name for entry in result.passes if entry.report.changes}
    assert {name for name, found in after.items() if found is not None} == changed


def test_one_pass_needs_no_table_of_contributions(model: Path) -> None:
    assert all(entry.after is None for entry in run(model, "gain").passes)
