from __future__ import annotations

import json
import logging
import os
import re
import signal
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import onnx
import pytest

import onnxcompress
from onnxcompress import cli_options
from onnxcompress.calibration.sources import ImageOptions
from onnxcompress.cli import cli, main
from onnxcompress.recipe import load_recipe
from onnxcompress.targets import TARGETS
from tests import fakes


@pytest.fixture(autouse=True)
def _passes(monkeypatch: pytest.MonkeyPatch) -> None:
    fakes.install(monkeypatch)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = fakes.save_classifier(tmp_path / "in.onnx")
    fakes.save_data(path, calib=16, evaluation=24)
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.onnx"


def run(*arguments: object) -> int:
    return main([str(a) for a in arguments])


def compress(model: Path, out: Path, *arguments: object) -> int:
    return run(model, out, "--no-bench", *arguments)


Output = pytest.CaptureFixture[str]


def test_exit_0_and_the_result_on_stdout(model: Path, out: Path, capsys: Output) -> None:
    assert run(model, out, "--passes", "gain") == 0
    assert out.is_file()
    shown = capsys.readouterr()
    assert shown.err == ""
    for word in ("size", "parameters", "MACs", "latency, batch 1", "latency, batch 8", "SQNR"):
        assert word in shown.out
    assert "passed the default gate" in shown.out
    assert f"written to {out}" in shown.out
    assert "\x1b" not in shown.out
    assert not any(line != line.rstrip() for line in shown.out.splitlines())


def test_the_command_compress_may_be_named(model: Path, out: Path) -> None:
    assert run("compress", model, out, "--passes", "gain", "--no-bench") == 0
    assert out.is_file()


def test_options_may_come_first(model: Path, out: Path) -> None:
    assert run("--no-bench", "--passes", "gain", model, out) == 0


def test_exit_1_when_the_gate_fails(model: Path, out: Path, capsys: Output) -> None:
    assert compress(model, out, "--passes", "wreck") == 1
    assert not out.exists()
    shown = capsys.readouterr().out
    assert re.search(r"failed: agreement of output 'y' is 0\.\d+; it must be at least 0\.5", shown)
    assert "was not written" in shown


@pytest.mark.parametrize(
    ("gate", "code"),
    [
        (("--min-agreement", "0.99"), 1),
        (("--min-cosine", "0.999999"), 1),
        (("--min-sqnr", "200"), 1),
        (("--min-sqnr", "-50"), 0),
        (("--min-agreement", "0.99", "--no-gate"), 0),
    ],
)
def test_gates_of_the_command_line(
    model: Path, out: Path, gate: tuple[str, ...], code: int
) -> None:
    assert compress(model, out, "--passes", "wreck", *gate) == code
    assert out.exists() is (code == 0)


def test_labels_and_max_drop(model: Path, out: Path, tmp_path: Path, capsys: Output) -> None:
    from onnxcompress.runtime import open_session

    data = fakes.samples(30)
    labels = open_session(model).run({"x": data})["y"].argmax(axis=1)
    np.savez(tmp_path / "test.npz", x=data)
    np.save(tmp_path / "labels.npy", labels)
    given = ("--eval", tmp_path / "test.npz", "--labels", tmp_path / "labels.npy")
    assert compress(model, out, "--passes", "wreck", *given, "--max-drop", "0.1") == 1
    assert "top-1" in capsys.readouterr().out
    assert compress(model, out, "--passes", "gain", *given, "--max-drop", "0") == 0


def test_keep_failed(model: Path, out: Path, capsys: Output) -> None:
    assert compress(model, out, "--passes", "wreck", "--keep-failed") == 1
    assert out.is_file()
    assert "kept although it failed" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no passes are asked for"),
        (("--passes", "gian"), "Did you mean 'gain'?"),
        (("--passes", "gain,gain"), "named twice"),
        (("--passes", "gain", "--set", "prune.macs=1"), "'prune' is not in this run"),
        (("--passes", "gain", "--set", "gain.factor"), "PASS.OPTION=VALUE"),
        (("--passes", "gain", "--set", "gain.factor=a lot"), "wants float"),
        (("--passes", "gain", "--target", "pdp11"), "there is no target 'pdp11'"),
        (("--passes", "gain", "--recipe", "none.toml"), "cannot be read"),
        (("--passes", "gain", "--min-agreement", "99"), "--min-agreement 99 must be between"),
        (("--passes", "gain", "--batch-size", "0"), "0 is not in the range"),
        (("--passes", "gain", "--image-size", "1x2x3"), "HEIGHTxWIDTH"),
        (("--passes", "gain", "--image-mean", "red"), "'red' is not of the form"),
        (("--passes", "gain", "--provider", "tpu"), "'tpu' is not one of"),
        (("--passes", "gain", "--nonsense"), "No such option"),
        (("third.onnx", "--passes", "gain"), "unexpected extra argument"),
    ],
)
def test_exit_2_for_requests_that_cannot_be_understood(
    model: Path, out: Path, capsys: Output, arguments: tuple[str, ...], message: str
) -> None:
    assert compress(model, out, *arguments) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert shown.out == ""
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(("in.onnx",), 2), (("in.onnx", "in.onnx", "--passes", "gain"), 2)],
)
def test_exit_2_for_arguments(
    model: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], code: int
) -> None:
    monkeypatch.chdir(model.parent)
    assert main(arguments) == code


def test_exit_3_when_the_model_cannot_be_used(
    model: Path, out: Path, tmp_path: Path, capsys: Output
) -> None:
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"this is no model")
    for original in (bad, tmp_path / "none.onnx"):
        assert compress(original, out, "--passes", "gain") == 3
        assert str(original) in capsys.readouterr().err
    assert compress(model, out, "--passes", "gain", "--eval", tmp_path / "none.npz") == 3
    assert "none.npz" in capsys.readouterr().err
    assert compress(model, tmp_path / "no" / "out.onnx", "--passes", "gain") == 3
    assert "does not exist" in capsys.readouterr().err
    assert compress(model, out, "--passes", "invalid") == 3
    assert "pass 'invalid'" in capsys.readouterr().err


def test_a_bug_is_told_in_one_line_and_debug_shows_more(
    model: Path, out: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bug(*args: object, **given: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("onnxcompress.pipeline.run_recipe", bug)
    assert compress(model, out, "--passes", "gain") == 3
    shown = capsys.readouterr().err
    assert "internal error, KeyError: 'surprise'" in shown
    assert "--debug" in shown
    assert "Traceback" not in shown
    assert compress(model, out, "--passes", "gain", "--debug") == 3
    assert "Traceback" in capsys.readouterr().err


def test_errors_of_the_user_have_a_traceback_only_with_debug(
    model: Path, out: Path, capsys: Output
) -> None:
    assert compress(model, out, "--passes", "refuse") == 3
    shown = capsys.readouterr().err
    assert shown == "error: pass 'refuse': this model is not for me\nTry another.\n"
    assert compress(model, out, "--passes", "refuse", "--debug") == 3
    assert "Traceback" in capsys.readouterr().err


def test_a_full_disk_is_no_bug(
    model: Path, out: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **given: object) -> None:
        raise OSError(28, "No space left on device", "scratch.bin")

    monkeypatch.setattr("onnxcompress.pipeline.run_recipe", full)
    assert compress(model, out, "--passes", "gain") == 3
    assert capsys.readouterr().err == "error: No space left on device: scratch.bin\n"


def test_an_interrupt_exits_130_and_leaves_nothing(model: Path, out: Path, capsys: Output) -> None:
    before = fakes.leftovers(model.parent)
    assert compress(model, out, "--passes", "interrupt") == 130
    assert "interrupted" in capsys.readouterr().err
    assert fakes.leftovers(model.parent) == before


def test_json_on_stdout_is_all_there_is(model: Path, out: Path, capsys: Output) -> None:
    assert compress(model, out, "--passes", "gain", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["schema_version"] == 1
    assert report["passed"] is True
    assert compress(model, out, "--passes", "gain", "--json", "-") == 0
    assert json.loads(capsys.readouterr().out)["written"] is True


def test_json_to_a_file_beside_the_table(
    model: Path, out: Path, tmp_path: Path, capsys: Output
) -> None:
    path = tmp_path / "r.json"
    assert compress(model, out, "--passes", "wreck", "--json", path) == 1
    report = json.loads(path.read_text())
    assert report["passed"] is False
    assert report["written"] is False
    assert "failed:" in capsys.readouterr().out


def test_json_never_overwrites_a_model(model: Path, out: Path, capsys: Output) -> None:
    before = model.read_bytes()
    assert run("--passes", "gain", "--no-bench", model, out, "--json", model) == 2
    assert model.read_bytes() == before
    assert "would overwrite" in capsys.readouterr().err


def test_quiet_shows_nothing(model: Path, out: Path, capsys: Output) -> None:
    assert compress(model, out, "--passes", "gain", "-q") == 0
    shown = capsys.readouterr()
    assert (shown.out, shown.err) == ("", "")


def test_verbose_shows_every_skip_and_stage(model: Path, out: Path, capsys: Output) -> None:
    compress(model, out, "--passes", "gain")
    assert "Relu 'n2' and 2 more: it has no weights" in capsys.readouterr().out
    compress(model, out, "--passes", "gain", "-v")
    shown = capsys.readouterr()
    assert "Relu 'n4': it has no weights" in shown.out
    assert "'w1': edited" in shown.out
    assert "pass gain:" in shown.err


def test_dry_run(model: Path, out: Path, capsys: Output) -> None:
    assert compress(model, out, "--passes", "gain,prune", "--dry-run") == 0
    shown = capsys.readouterr().out
    assert shown.index("prune") < shown.index("gain  would make 1 change")
    assert not out.exists()


def test_recipes_are_saved_and_the_command_line_goes_first(
    model: Path, out: Path, tmp_path: Path, capsys: Output
) -> None:
    path = tmp_path / "r.toml"
    given = ("--passes", "gain", "--set", "gain.factor=2", "--set", "gain.names=a,b", "--seed", "4")
    assert compress(model, out, *given, "--min-cosine", "0.1", "--save-recipe", path) == 0
    saved = load_recipe(path)
    assert saved.options == {"gain": {"factor": 2.0, "names": ["a", "b"]}}
    assert (saved.seed, saved.gates.min_cosine) == (4, 0.1)
    capsys.readouterr()
    over = ("--set", "gain.factor=3", "--seed", "5", "--no-fold")
    assert compress(model, out, "--recipe", path, *over, "--json") == 0
    recipe = json.loads(capsys.readouterr().out)["recipe"]
    assert recipe["options"] == {"gain": {"factor": 3.0, "names": ["a", "b"]}}
    assert (recipe["seed"], recipe["fold"], recipe["gates"]["min_cosine"]) == (5, False, 0.1)


def test_every_option_reaches_the_recipe(
    model: Path, out: Path, tmp_path: Path, capsys: Output
) -> None:
    path = tmp_path / "r.toml"
    given = (
        "--passes=gain --target=arm64 --threads=1 --batch-size=3 --seed=9 --calib-samples=7 "
        "--eval-samples=8 --image-size=32x48 --image-mean=1,2,3 --image-std=4 --image-layout=NHWC "
        "--image-channels=BGR --image-fit=stretch --image-resample=nearest --min-sqnr=1 "
        "--min-cosine=0.1 --min-agreement=0.2 --no-gate --no-simplify --no-fold --provider=auto"
    )
    assert compress(model, out, *given.split(), "--save-recipe", path) == 0
    saved = load_recipe(path)
    assert saved.image == ImageOptions(
        size=(32, 48),
        mean=(1.0, 2.0, 3.0),
        std=(4.0,),
        layout="NHWC",
        channels="BGR",
        fit="stretch",
        resample="nearest",
    )
    assert (saved.target, saved.threads, saved.batch_size, saved.provider) == (
        "arm64",
        1,
        3,
        "auto",
    )
    assert (saved.calib_samples, saved.eval_samples) == (7, 8)
    assert (saved.gates.min_sqnr_db, saved.gates.enforced) == (1.0, False)
    assert (saved.simplify, saved.fold) == (False, False)


def test_one_image_size_is_a_square(model: Path, out: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.toml"
    compress(model, out, "--passes", "gain", "--image-size", "32", "--save-recipe", path)
    image = load_recipe(path).image
    assert image is not None
    assert image.size == (32, 32)


def test_choices_are_those_of_the_package() -> None:
    hints = typing.get_type_hints(ImageOptions)
    assert typing.get_args(hints["layout"]) == cli_options.IMAGE_LAYOUTS
    assert typing.get_args(hints["channels"]) == cli_options.IMAGE_CHANNELS
    assert typing.get_args(hints["fit"]) == cli_options.IMAGE_FITS
    assert typing.get_args(hints["resample"]) == cli_options.IMAGE_RESAMPLES
    image = {o.name for o in cli.commands["compress"].params if (o.name or "").startswith("image_")}
    assert image == {f"image_{name}" for name in hints}


# --- the other commands --------------------------------------------------------------------


def test_verify(model: Path, out: Path, capsys: Output) -> None:
    compress(model, out, "--passes", "wreck", "--keep-failed", "-q")
    assert run("verify", model, out, "--no-bench") == 1
    assert "failed: agreement" in capsys.readouterr().out
    assert run("verify", model, out, "--no-bench", "--min-agreement", "0") == 0
    capsys.readouterr()
    assert run("verify", model, model, "--no-bench", "--eval-samples", "5", "--json=-") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["comparison"]["samples"] == 5


def test_verify_of_models_that_cannot_be_read(model: Path, tmp_path: Path) -> None:
    assert run("verify", model, tmp_path / "none.onnx") == 3
    assert run("verify", tmp_path / "none.onnx", model) == 3
    bad = tmp_path / "bad.onnx"
    bad.write_bytes(b"\x08")
    assert run("verify", model, bad, "--no-bench") == 1


def test_inspect(model: Path, out: Path, capsys: Output) -> None:
    assert run("inspect", model) == 0
    shown = capsys.readouterr().out
    assert "x: float32 [N, 6]" in shown
    assert "Gemm 2" in shown
    assert run("inspect", model, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["macs"] == 160
    assert report["operators"] == {"Gemm": 2, "Relu": 1, "Softmax": 1}
    compress(model, out, "--passes", "gain", "-q")
    assert run("inspect", out) == 0
    assert f"made by onnxcompress  {onnxcompress.__version__}" in capsys.readouterr().out


def test_inspect_groups(model: Path, tmp_path: Path, capsys: Output) -> None:
    assert run("inspect", model, "--groups", "--json") == 0
    (group,) = json.loads(capsys.readouterr().out)["groups"]
    assert (group["units"], group["width"]) == (16, 1)
    assert group["macs_ratio"] == 1.0
    proto = onnx.load(model)
    proto.graph.node[1].op_type = "Softmax"
    onnx.save(proto, tmp_path / "frozen.onnx")
    assert run("inspect", tmp_path / "frozen.onnx", "--groups") == 0
    shown = capsys.readouterr().out
    assert "no channels can be pruned" in shown
    assert "Softmax" in shown.split("frozen, because")[1]


def test_inspect_times_nodes_and_asks_passes(model: Path, capsys: Output) -> None:
    assert run("inspect", model, "--profile", "--savings", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    shares = report["time"]["nodes"]
    assert sum(shares.values()) + report["time"]["elsewhere_ratio"] == pytest.approx(1.0)
    assert report["top_nodes"][0]["node"] == max(shares, key=shares.__getitem__)
    assert {entry["name"] for entry in report["savings"]["passes"]}
    assert run("inspect", model, "--profile", "--savings") == 0
    assert "what each pass could do" in capsys.readouterr().out
    assert run("inspect", model, "--savings", "--target", "toaster") == 2


def test_inspect_of_what_is_no_model(tmp_path: Path) -> None:
    assert run("inspect", tmp_path / "none.onnx") == 3


def test_bench(model: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("onnxcompress.verification.side_by_side.peak_memory", lambda *a: 1_500_000)
    assert run("bench", model, model, "--threads", "1", "--batch-size", "1,2") == 0
    shown = capsys.readouterr().out
    assert "latency, batch 2" in shown
    assert "1.50 MB" in shown
    assert "SQNR" not in shown


def test_passes(capsys: Output) -> None:
    assert run("passes") == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("simplify", "gain", "precision"))
    assert run("passes", "gain") == 0
    shown = capsys.readouterr().out
    assert "gain.factor" in shown
    assert "-10 to 10" in shown
    assert run("passes", "gian") == 2


# --- help ----------------------------------------------------------------------------------


def test_help_shows_options_commands_and_examples(capsys: Output) -> None:
    assert run("--help") == 0
    shown = capsys.readouterr().out
    for word in ("--passes NAMES", "--calib DATA", "inspect", "Examples:", "verify model.onnx"):
        assert word in shown
    assert not [name for name in TARGETS if name not in shown]


@pytest.mark.parametrize("command", ["compress", "verify", "inspect", "bench", "passes"])
def test_help_of_every_command(command: str, capsys: Output) -> None:
    assert run(command, "--help") == 0
    assert "Usage: onnxcompress" in capsys.readouterr().out


def test_every_option_has_a_help_text() -> None:
    for command in cli.commands.values():
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert getattr(parameter, "help", None), f"{command.name} {parameter.name}"


def test_every_option_is_documented() -> None:
    page = (Path(__file__).parent.parent / "docs" / "cli.md").read_text(encoding="utf-8")
    for command in cli.commands.values():
        for parameter in command.params:
            for name in parameter.opts:
                if name.startswith("--"):
                    assert f"`{name}" in page, f"{command.name} {name}"


def test_version(capsys: Output) -> None:
    assert run("--version") == 0
    assert onnxcompress.__version__ in capsys.readouterr().out


def test_the_version_is_that_of_the_package() -> None:
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert f'version = "{onnxcompress.__version__}"' in text


def test_an_ascii_terminal_ends_no_run(model: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "onnxcompress", "inspect", str(model)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stderr
    done.stdout.decode("ascii")


def test_the_output_is_a_valid_model(model: Path, out: Path) -> None:
    assert compress(model, out, "--passes", "gain") == 0
    onnx.checker.check_model(str(out), full_check=True)


# --- files beside the result -----------------------------------------------------------------


@pytest.mark.parametrize("option", ["--json", "--save-recipe"])
@pytest.mark.parametrize("target", ["in.onnx", "weights.bin", "labels.npy", "data.py", "new.onnx"])
def test_other_files_are_never_overwritten(
    model: Path, out: Path, capsys: Output, option: str, target: str
) -> None:
    path = model.with_name(target)
    if target not in {"in.onnx", "new.onnx"}:
        path.write_bytes(b"\x93 precious")
    before = path.read_bytes() if path.exists() else None
    assert compress(model, out, "--passes", "gain", option, path) == 2
    assert "would" in capsys.readouterr().err
    assert (path.read_bytes() if path.exists() else None) == before
    assert not out.exists()


@pytest.mark.parametrize("option", ["--json", "--save-recipe"])
def test_a_file_of_its_own_kind_is_replaced(model: Path, out: Path, option: str) -> None:
    path = model.with_name("report.txt")
    for _ in range(2):
        assert compress(model, out, "--passes", "gain", option, path, "-q") == 0
    assert fakes.leftovers(model.parent) == [
        "in.calib.npz",
        "in.eval.npz",
        "in.onnx",
        "out.onnx",
        "report.txt",
    ]


@pytest.mark.parametrize("option", ["--json", "--save-recipe"])
def test_places_that_cannot_work_are_told_before_any_work(
    model: Path, out: Path, tmp_path: Path, capsys: Output, option: str
) -> None:
    for place in (tmp_path, tmp_path / "none" / "r.txt"):
        assert compress(model, out, "--passes", "crash", option, place) == 3
        assert "cannot be written" in capsys.readouterr().err


def test_report_and_recipe_are_two_files(model: Path, out: Path, capsys: Output) -> None:
    same = model.with_name("r.txt")
    assert compress(model, out, "--passes", "gain", "--json", same, "--save-recipe", same) == 2
    assert "name the same file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["verify", "bench", "inspect"])
def test_commands_that_only_look_overwrite_nothing_either(command: str, model: Path) -> None:
    before = model.read_bytes()
    models = [model] if command == "inspect" else [model, model]
    assert run(command, *models, "--json", model) == 2
    assert model.read_bytes() == before


# --- streams and signals ---------------------------------------------------------------------


def test_what_a_data_function_prints_stays_out_of_the_report(
    model: Path, out: Path, tmp_path: Path, capsys: Output
) -> None:
    (tmp_path / "chatty.py").write_text(
        "import numpy as np\n"
        "def feeds():\n"
        "    print('hello')\n"
        "    return [{'x': np.ones((1, 6), np.float32)}] * 4\n"
    )
    given = ("--eval", f"{tmp_path / 'chatty.py'}:feeds", "--json")
    assert compress(model, out, "--passes", "gain", *given) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["passed"] is True
    assert "hello" in shown.err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such pipes")
@pytest.mark.parametrize("given", [(), ("--json",)])
def test_a_reader_that_leaves_early_is_no_error(model: Path, given: tuple[str, ...]) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "onnxcompress", "inspect", str(model), *given],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parent.parent,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=60) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


def test_an_interrupt_that_a_library_turns_into_an_error_stays_one(
    model: Path, out: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallowed(*arguments: object, **options: object) -> None:
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        raise ImportError("half imported")

    # A background job has SIGINT ignored, and the program would respect that.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        monkeypatch.setattr("onnxcompress.pipeline.run_recipe", swallowed)
        assert compress(model, out, "--passes", "gain") == 130
        assert capsys.readouterr().err == "interrupted\n"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, inherited)


def test_libraries_do_not_log_on_stderr(
    model: Path, out: Path, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.root, "handlers", [])

    def chatty(*arguments: object, **options: object) -> None:
        logging.getLogger("onnx_ir").warning("skipped something")
        raise ZeroDivisionError

    monkeypatch.setattr("onnxcompress.pipeline.run_recipe", chatty)
    assert compress(model, out, "--passes", "gain") == 3
    assert "skipped something" not in capsys.readouterr().err
