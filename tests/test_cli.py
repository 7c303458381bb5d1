"""The contract of the command line: names, keys, exit codes, one JSON object on standard output."""

import importlib
import json
import os
import pathlib
import pkgutil
import signal
import subprocess
import sys
import time

import pytest

import sqjax
from sqjax import cli, pipeline

PACKAGE = pathlib.Path(sqjax.__file__).parent
MODEL = str(PACKAGE / "demo8")
TEXT = str(PACKAGE / "suites/demo.txt")
EVALUATION_KEYS = {
    *("tokens", "sequences", "kl", "kl_interval", "kl_median", "kl_p99", "kl_p999", "kl_max", "top1"),
    *("cross_entropy", "cross_entropy_reference", "gap", "gap_interval"),
    *("file_bytes", "tensor_bytes", "bits_per_weight", "sha256", "seconds"),
}


def run(*arguments, **options):
    command = [sys.executable, "-m", "sqjax.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, **options)


@pytest.fixture(scope="module")
def q4_k(tmp_path_factory):
    path = tmp_path_factory.mktemp("files") / "demo8.q4_k.gguf"
    done = run("convert", MODEL, path, "--type", "q4_k", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["types"] == {"Q4_K": 32, "F32": 23}
    return path


def test_evaluate_prints_one_json_object(q4_k):
    arguments = ("evaluate", q4_k, "--reference", MODEL, "--text", TEXT, "--length", 128, "--windows", 3, "--json")
    done = run(*arguments)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result.keys() >= EVALUATION_KEYS
    assert (result["tokens"], result["sequences"]) == (3 * 127, 3)
    assert result["kl_interval"][0] < result["kl"] < result["kl_interval"][1]
    assert result["gap"] == pytest.approx(result["cross_entropy"] - result["cross_entropy_reference"])
    assert result["file_bytes"] == q4_k.stat().st_size
    # The same command in Python, with the same names, gives the same figures.
    again = sqjax.evaluate(q4_k, reference=MODEL, text=TEXT, length=128, windows=3)
    assert again["sha256"] == result["sha256"]
    for key in EVALUATION_KEYS - {"seconds", "sha256"}:
        assert again[key] == pytest.approx(result[key], rel=1e-4), key


def test_several_texts_make_one_result_with_parts(q4_k, tmp_path, capsys):
    chat = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "Say one."}, {"role": "assistant", "content": "One, of course."}]
    chat.write_text(json.dumps({"messages": messages}) + "\n")
    arguments = ["evaluate", str(q4_k), "--reference", MODEL, "--length", "128", "--windows", "2", "--json"]
    assert cli.main([*arguments, "--text", TEXT, "--text", str(chat)]) == 0
    captured = capsys.readouterr()
    result = json.loads(captured.out)
    assert list(result["domains"]) == ["demo", "chat"] and list(result["roles"]) == ["template", "prompt", "response"]
    assert result["tokens"] == sum(part["tokens"] for part in result["domains"].values())
    assert result["domains"]["chat"]["tokens"] == sum(part["tokens"] for part in result["roles"].values())


def test_llama_cpp_is_a_runtime(q4_k, capsys):
    pytest.importorskip("xllamacpp")
    arguments = ["evaluate", str(q4_k), "--reference", MODEL, "--text", TEXT, "--length", "128", "--windows", "2"]
    assert cli.main([*arguments, "--runtime", "llama.cpp", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result.keys() >= EVALUATION_KEYS and result["runtime"] == "llama.cpp" and 0.01 < result["kl"] < 0.2


def test_a_gguf_file_is_a_reference(q4_k):
    result = sqjax.evaluate(q4_k, reference=q4_k, text=TEXT, length=128, windows=3)
    assert result["kl"] == 0.0 and result["top1"] == 1.0


def test_inspect_has_the_contracts_keys(q4_k, capsys):
    assert cli.main(["inspect", str(q4_k), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    keys = {"file_bytes", "tensor_bytes", "parameters", "bits_per_weight", "types", "sha256", "metadata"}
    assert result.keys() >= keys
    assert result["bits_per_weight"] == 8 * result["tensor_bytes"] / result["parameters"]
    assert cli.main(["inspect", str(q4_k)]) == 0
    assert result["sha256"] in capsys.readouterr().out


def test_calibration_text_is_not_evaluated(q4_k, tmp_path):
    copy = tmp_path / "copy.jsonl"
    copy.write_text(json.dumps({"text": pathlib.Path(TEXT).read_text().upper()}) + "\n")
    with pytest.raises(sqjax.InputError, match="calibration text"):
        sqjax.evaluate(q4_k, reference=MODEL, text=TEXT, length=128, calibration=[copy])


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "missing.gguf"),
        ("inspect", TEXT),
        ("convert", "missing", "out.gguf"),
        ("convert", TEXT, "out.gguf"),
        ("evaluate", "Q4_K", "--reference", MODEL, "--text", "missing.txt"),
        ("evaluate", "Q4_K", "--reference", MODEL, "--text", TEXT, "--length", "9999"),
        ("evaluate", "Q4_K", "--reference", MODEL, "--text", TEXT, "--windows", "0"),
        ("evaluate", "Q4_K", "--reference", "missing.gguf", "--text", TEXT),
    ],
)
def test_faulty_input_is_one_line_and_exit_code_1(arguments, q4_k, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert cli.main([str(q4_k) if argument == "Q4_K" else argument for argument in (*arguments, "--json")]) == 1
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("sqjax: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("unknown",),
        ("convert", "model"),
        ("convert", "a", "b", "--type", "q3"),
        ("evaluate", "f"),
        ("inspect", "--x"),
    ],
)
def test_wrong_usage_is_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    assert stop.value.code == 2 and capsys.readouterr().out == ""


def test_interruption_is_exit_code_130_and_leaves_no_partial_file(tmp_path):
    command = [sys.executable, "-m", "sqjax.cli", "convert", MODEL, str(tmp_path / "out.gguf")]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    # The temporary file shows that writing has begun.
    deadline = time.monotonic() + 120
    while process.poll() is None and not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert errors.strip().endswith("sqjax: interrupted")
    assert list(tmp_path.iterdir()) == []


def test_every_command_is_a_function_of_the_package():
    for module in pkgutil.iter_modules([str(PACKAGE)]):
        importlib.import_module(f"sqjax.{module.name}")
    for name in cli.COMMANDS:
        # A submodule of the same name would hide the function as soon as it is imported.
        assert getattr(sqjax, name) is getattr(pipeline, name)
    assert set(cli.COMMANDS) <= set(dir(sqjax))


def test_importing_the_package_is_quick():
    done = subprocess.run(
        [sys.executable, "-c", "import sqjax, sys; print('jax' in sys.modules, 'flax' in sys.modules)"],
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_help_needs_no_jax_and_exits_0():
    done = run("--help")
    assert done.returncode == 0 and all(name in done.stdout for name in cli.COMMANDS)
