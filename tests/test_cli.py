"""The command line: what it prints, and one clear line for whatever goes wrong."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny import TEMPLATE, write_tiny, write_tokenizer

from flashmoe_ref import cli, cli_options
from flashmoe_ref.cli_chat import converse, readable_call
from flashmoe_ref.toolcalls import ToolCall, format_tool_call, parse_tool_calls
from flashmoe_ref.trace import Trace

ROOT = Path(__file__).parents[1]
COMMANDS = list(cli.COMMANDS)
FAST = ("--no-compile", "--engine", "numpy")  # nothing to compile in a short test
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 4-bit model with a tokenizer of bytes and Qwen's chat format."""
    folder = tmp_path_factory.mktemp("cli") / "model"
    return _write_model(folder)


def _write_model(folder: Path, **changes: object) -> Path:
    write_tiny(folder, vocab_size=280, **changes)
    write_tokenizer(folder)
    shutil.copy(TEMPLATE, folder / "chat_template.jinja")
    return folder


@pytest.fixture
def run(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable:
    """Call main in this process: run(*args, stdin="") -> code, stdout, stderr."""

    def call(*args: object, stdin: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        try:
            code = cli.main([str(arg) for arg in args])
        except SystemExit as stop:  # argparse
            code = stop.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def _start(*args: object, **options: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "flashmoe_ref.cli", *map(str, args)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


# --- help -----------------------------------------------------------------------------


def test_help_lists_every_command(run: Callable) -> None:
    code, out, _ = run("--help")
    assert code == 0
    for command in COMMANDS:
        assert command in out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_examples(run: Callable, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"  flashmoe {command} " in out or f"  flashmoe {command}\n" in out
    assert max(map(len, out.splitlines())) <= 100


def test_version(run: Callable) -> None:
    from flashmoe_ref import __version__

    assert run("--version")[:2] == (0, f"{__version__}\n")


# --- what goes right ------------------------------------------------------------------


def test_generate_prints_text_and_then_the_report(run: Callable, model: Path) -> None:
    args = ("generate", "Hi", "--model", model, "--max-tokens", 5, *FAST)
    code, out, err = run(*args)
    assert code == 0
    assert out.endswith("\n") and len(out) > 1
    for word in ("engine numpy", "k 3", "tok/s", "MB", "hit rate"):
        assert word in err


def test_the_same_seed_gives_the_same_text(run: Callable, model: Path) -> None:
    def text(seed: int) -> str:
        options = ("--temperature", 1, "--seed", seed, "--max-tokens", 8, "--no-report")
        code, out, err = run("generate", "Hi", "--model", model, *options, *FAST)
        assert (code, err) == (0, "")
        return out

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_engines_and_experts_agree(run: Callable, model: Path) -> None:
    def text(*options: object) -> str:
        args = ("generate", "Hi", "--model", model, "--max-tokens", 6, "--no-report")
        code, out, err = run(*args, *options)
        assert code == 0, err
        return out

    reference = text(*FAST)
    assert text("--experts", "resident", *FAST) == reference
    assert text("--slots", 5, "--threads", 2, *FAST) == reference
    ahead = ("--policy", "lfu", "--prefetch", "look-ahead:2")
    assert text("--slots", 4, *ahead, *FAST) == reference
    assert text("--budget", 13, "--policy", "clock", *FAST) == reference
    assert text("--engine", "numpy") == reference
    assert text("--k", 3, *FAST) == reference


def test_generate_reads_standard_input(run: Callable, model: Path) -> None:
    options = ("--model", model, "--max-tokens", 4, "--no-report", *FAST)
    reference = run("generate", "Hi there", *options)
    assert run("generate", *options, stdin="Hi there") == reference
    assert run("generate", "-", *options, stdin="Hi there") == reference


def test_the_report_as_json(run: Callable, model: Path) -> None:
    args = ("generate", "Hi", "--model", model, "--max-tokens", 4, "--json", *FAST)
    _, _, err = run(*args)
    report = json.loads(err)
    assert report["mode"]["experts"] == "stream"
    assert report["prompt_tokens"] == 2
    assert report["bytes_per_token"] > 0


def test_info_of_a_folder(run: Callable, model: Path) -> None:
    code, out, _ = run("info", model)
    assert code == 0
    assert "4 bits, group 32" in out
    assert run("info", "--model", model)[1] == out
    facts = json.loads(run("info", model, "--json", "--k", 2)[1])
    assert facts["k"] == 2
    assert facts["config"]["num_experts"] == 8
    stored = sum(category["n_bytes"] for category in facts["categories"])
    assert stored == facts["dense_bytes"] + facts["routed_bytes"]
    # 4 layers x 2 experts, of 3 x 64 x 64 weights at 4 bits and a pair for each 32
    assert facts["bytes_per_token"] == 8 * (3 * 64 * 64 // 2 + 3 * 64 * 64 // 32 * 4)


@pytest.mark.parametrize("layout", ["hf", "hf-per-expert"])
def test_info_of_other_layouts(run: Callable, tmp_path: Path, layout: str) -> None:
    write_tiny(tmp_path / "m", layout)
    facts = json.loads(run("info", tmp_path / "m", "--json")[1])
    stored = sum(category["n_bytes"] for category in facts["categories"])
    assert stored == facts["dense_bytes"] + facts["routed_bytes"]


def test_info_of_the_published_model(run: Callable) -> None:
    code, out, _ = run("info", "Qwen3.5-397B-A17B")
    assert code == 0
    for figure in ("396,346,350,336", "17,349,040,896", "7.08 MB", "217.4 GB"):
        assert figure in out
    facts = json.loads(run("info", "qwen3.5-397b-a17b", "--k", 4, "--json")[1])
    assert facts["active_parameters"] == 12_819_192_576
    assert facts["bytes_per_token"] == 1_698_693_120
    facts = json.loads(run("info", "qwen3.5-397b-a17b", "--bits", 16, "--json")[1])
    # two bytes each, and four for A_log, which the published files keep in float32
    assert facts["dense_bytes"] == 2 * 9_799_293_696 + 2 * 45 * 64


def test_files_from_bf16_to_two_bits(run: Callable, tmp_path: Path) -> None:
    source, q4, q2 = (tmp_path / name for name in ("bf16", "q4", "q2"))
    _write_model(source, layout="hf")
    quiet = "--no-progress"
    code, out, err = run("convert", source, q4, "--bits", 4, "--group-size", 32, quiet)
    assert (code, err) == (0, "") and "4 bits" in out
    assert run("pack", q4, quiet)[0] == 0
    code, out, err = run("verify", q4, quiet)
    assert (code, err) == (0, "") and "are right" in out
    options = ("--max-tokens", 5, "--no-report", *FAST)
    in_place = run("generate", "Hi", "--model", q4, *options)
    packed = run("generate", "Hi", "--model", q4, "--experts", "packed", *options)
    assert packed == in_place and packed[0] == 0
    assert run("requantize", q4, q2, "--bits", 2, quiet)[0] == 0
    assert "2 bits, group 32" in run("info", q2)[1]


def test_a_run_is_recorded_and_shown(
    run: Callable, model: Path, tmp_path: Path
) -> None:
    file, options = tmp_path / "run.npz", ("--model", model, "--max-tokens", 5, *FAST)
    plain = run("generate", "Hi", "--no-report", *options)
    code, out, err = run("generate", "Hi", "--no-report", "--trace", file, *options)
    assert (code, out) == (0, plain[1])
    assert err == f"{file}: 6 tokens recorded\n"
    code, out, _ = run("trace", file)
    assert code == 0
    for words in ("engine numpy", "6 in 5 steps", "3 of 8 a layer", "ms a token"):
        assert words in out
    forms = {"--chrome": "t.json", "--csv": "t.csv", "--npz": "t.npz"}
    targets = [word for o, name in forms.items() for word in (o, tmp_path / name)]
    assert run("trace", file, *targets)[:2] == (0, out)
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert (tmp_path / "t.npz").read_bytes() == file.read_bytes()
    code, out, _ = run("trace", tmp_path / "t.csv", "--n-experts", 500)
    assert code == 0
    assert "t.csv" in out and "3 of 500 a layer" in out
    line = "Hello\n"
    assert run("chat", "--trace", file, *options, stdin=line)[0] == 0
    assert "tokens" in run("trace", file)[1]


def test_a_trace_is_kept_when_a_run_is_cut(
    run: Callable, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(pieces: Iterable[str]) -> None:
        next(iter(pieces))
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "show", stop)
    file = tmp_path / "run.npz"
    assert run("generate", "Hi", "--trace", file, "--model", model, *FAST)[0] == 130
    assert 2 <= Trace.load(file).n_tokens < 10


def test_chat_answers_every_line(run: Callable, model: Path) -> None:
    lines = "Hello\n\n/report\n/new\n/what\nHello\n/quit\nnever sent\n"
    args = ("chat", "--model", model, "--max-tokens", 4, "--no-report", *FAST)
    code, out, err = run(*args, stdin=lines)
    assert code == 0
    answers = out.splitlines()
    assert len(answers) >= 2 and len(answers) % 2 == 0  # an answer may have lines
    assert answers[: len(answers) // 2] == answers[len(answers) // 2 :]
    assert "/what is not a command" in err
    assert err.count("engine numpy") == 1


def test_chat_takes_tools_and_thinking(
    run: Callable, model: Path, tmp_path: Path
) -> None:
    tools = tmp_path / "tools.json"
    tools.write_text(json.dumps([TOOL]))
    args = ("chat", "--model", model, "--max-tokens", 3, "--tools", tools, *FAST)
    for choice in ("on", "off"):
        code, _, err = run(*args, "--thinking", choice, stdin="Hello\n")
        assert code == 0, err


# --- tool calls are shown, never executed ---------------------------------------------


class StubSession:
    """Answers from a list; remembers what it was told."""

    def __init__(self, *answers: str) -> None:
        self.answers = list(answers)
        self.told: list[object] = []
        self.tools = [TOOL]
        self.tool_calls: list[ToolCall] = []
        self.model = SimpleNamespace(report=lambda: "a report")

    def say(self, text: str, max_tokens: int):
        return self._next(text)

    def answer_tools(self, results: list[str], max_tokens: int):
        return self._next(results)

    def _next(self, told: object):
        self.told.append(told)
        answer = self.answers.pop(0)
        yield from (answer[i : i + 3] for i in range(0, len(answer), 3))
        self.tool_calls = parse_tool_calls(answer, self.tools)[1]


def _converse(session: StubSession, stdin: str, monkeypatch) -> tuple[str, list[str]]:
    monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
    said, noted = [], []
    converse(session, 9, lambda text, end="\n": said.append(text + end), noted.append)
    return "".join(said), noted


def test_a_call_is_shown_and_its_result_typed(monkeypatch) -> None:
    call = format_tool_call("add", {"a": 2, "b": "three"})
    session = StubSession(f"I add.\n\n{call}", "It is five.")
    out, _ = _converse(session, "add two and three\n5\n", monkeypatch)
    assert out == 'I add.\n[call] add(a="2", b="three")\nIt is five.\n'
    assert session.told == ["add two and three", ["5"]]


def test_two_calls_are_answered_in_order(monkeypatch) -> None:
    calls = format_tool_call("add", {}) + "\n" + format_tool_call("add", {"a": 1})
    session = StubSession(calls, "Done.")
    out, _ = _converse(session, "go\nfirst\nsecond\n", monkeypatch)
    assert session.told == ["go", ["first", "second"]]
    assert out == '[call] add()\n[call] add(a="1")\nDone.\n'


def test_a_faulty_call_gets_its_error_back(monkeypatch) -> None:
    session = StubSession("<tool_call>\nnonsense\n</tool_call>", "Sorry.")
    out, noted = _converse(session, "go\n", monkeypatch)
    assert "faulty" in out
    assert "error: " in session.told[1][0]
    assert len(noted) == 1


def test_faulty_calls_do_not_go_on_for_ever(monkeypatch) -> None:
    session = StubSession(*["<tool_call>x</tool_call>"] * 9)
    _, noted = _converse(session, "go\n", monkeypatch)
    assert len(session.told) == 3
    assert "in a row" in noted[-1]


def test_the_input_may_end_before_a_result(monkeypatch) -> None:
    session = StubSession(format_tool_call("add", {}), "never")
    _converse(session, "go\n", monkeypatch)
    assert session.told == ["go"]


def test_a_call_on_one_line() -> None:
    call = ToolCall("f", {"city": "Bodø", "days": 3, "on": [True, None]})
    assert readable_call(call) == 'f(city="Bodø", days=3, on=[true, null])'


# --- what goes wrong ------------------------------------------------------------------

MODEL = object()  # stands for the folder of a good model
OPTIONS = {
    "no command": [],
    "unknown command": ["frobnicate"],
    "unknown option": ["generate", "Hi", "--frob"],
    "abbreviated option": ["generate", "Hi", "--temp", "1"],
    "not a number": ["generate", "Hi", "--model", MODEL, "--k", "four"],
    "no such folder": ["generate", "Hi", "--model", "/no/such/folder"],
    "a file as model": ["info", "LICENSE"],
    "no model inside": ["info", "flashmoe_ref"],
    "unknown engine": ["generate", "Hi", "--model", MODEL, "--engine", "cuda"],
    "unknown experts": ["generate", "Hi", "--model", MODEL, "--experts", "magic"],
    "K of 0": ["generate", "Hi", "--model", MODEL, "--k", "0"],
    "K negative": ["generate", "Hi", "--model", MODEL, "--k", "-1"],
    "K above trained": ["generate", "Hi", "--model", MODEL, "--k", "4"],
    "K in info": ["info", MODEL, "--k", "99"],
    "slots below K": ["generate", "Hi", "--model", MODEL, "--slots", "2"],
    "slots above E": ["generate", "Hi", "--model", MODEL, "--slots", "9"],
    "slots of resident": [
        *("generate", "Hi", "--model", MODEL, "--slots", "5"),
        *("--experts", "resident"),
    ],
    "unknown policy": [
        *("generate", "Hi", "--model", MODEL, "--slots", "4", "--policy", "mru"),
    ],
    "policy of nothing": ["generate", "Hi", "--model", MODEL, "--policy", "lfu"],
    "budget below K": ["generate", "Hi", "--model", MODEL, "--budget", "2"],
    "pin without profile": [
        *("generate", "Hi", "--model", MODEL, "--slots", "5", "--pin", "1"),
    ],
    "no such profile": [
        *("generate", "Hi", "--model", MODEL, "--slots", "5", "--pin", "1"),
        *("--profile", "no/such.npz"),
    ],
    "unknown predictor": [
        *("generate", "Hi", "--model", MODEL, "--slots", "5", "--prefetch", "luck"),
    ],
    "no threads": ["generate", "Hi", "--model", MODEL, "--threads", "0"],
    "not packed": ["generate", "Hi", "--model", MODEL, "--experts", "packed"],
    "no tokens": ["generate", "Hi", "--model", MODEL, "--max-tokens", "0"],
    "cold": ["generate", "Hi", "--model", MODEL, "--temperature", "-1"],
    "not a temperature": ["generate", "Hi", "--model", MODEL, "--temperature", "nan"],
    "top-p of 0": ["generate", "Hi", "--model", MODEL, "--top-p", "0"],
    "top-k negative": ["generate", "Hi", "--model", MODEL, "--top-k", "-1"],
    "min-p of 2": ["generate", "Hi", "--model", MODEL, "--min-p", "2"],
    "penalty of 0": ["generate", "Hi", "--model", MODEL, "--repetition-penalty", "0"],
    "seed negative": ["generate", "Hi", "--model", MODEL, "--seed", "-1"],
    "no prompt": ["generate", "--model", MODEL],
    "empty prompt": ["generate", "", "--model", MODEL],
    "prompt too long": ["generate", "a" * 600, "--model", MODEL],
    "prompt is not text": ["generate", "a\udcffb", "--model", MODEL],
    "no such tools": ["chat", "--model", MODEL, "--tools", "no/such.json"],
    "tools are a folder": ["chat", "--model", MODEL, "--tools", "tests"],
    "tools are not JSON": ["chat", "--model", MODEL, "--tools", "LICENSE"],
    "no calibration": [
        *("generate", "Hi", "--model", MODEL, "--k", "1", "--calibrate", "no.txt")
    ],
    "a shard of nothing": ["convert", MODEL, "/tmp/never", "--shard-mb", "nan"],
    "a shard of all": ["convert", MODEL, "/tmp/never", "--shard-mb", "inf"],
    "a number of 5000 digits": ["info", "--k", "9" * 5000],
    "thinking maybe": ["chat", "--model", MODEL, "--thinking", "maybe"],
    "unknown preset": ["info", "qwen9-1b"],
    "preset of 7 bits": ["info", "qwen3.5-397b-a17b", "--bits", "7"],
    "preset in groups of 7": ["info", "qwen3.5-397b-a17b", "--group-size", "7"],
    "convert what is quantized": ["convert", MODEL, "/tmp/never-written"],
    "convert without target": ["convert", MODEL],
    "convert nothing": ["convert", "/no/such", "/tmp/never-written"],
    "pack nothing": ["pack", "/no/such"],
    "pack into a file": ["pack", MODEL, "LICENSE"],
    "requantize to nothing": ["requantize", MODEL, "/tmp/never-written"],
    "requantize to 7 bits": ["requantize", MODEL, "/tmp/never-written", "--bits", "7"],
    "requantize by luck": [
        *("requantize", MODEL, "/tmp/never-written", "--bits", "2", "--rule", "luck"),
    ],
    "requantize onto itself": ["requantize", MODEL, MODEL, "--bits", "2"],
    "verify nothing": ["verify", "/no/such"],
    "trace to nowhere": ["generate", "Hi", "--model", MODEL, "--trace", "/no/such/t"],
    "trace to a folder": ["generate", "Hi", "--model", MODEL, "--trace", "tests"],
    "no trace": ["trace", "/no/such.npz"],
    "no table": ["trace", "/no/such.csv"],
    "text as trace": ["trace", "LICENSE"],
    "experts of a trace": ["trace", "LICENSE", "--n-experts", "9"],
    "verify no packed": ["verify", MODEL, "--packed", "/no/such"],
}


def _check_one_line(code: int, out: str, err: str) -> None:
    assert code == 2
    assert out == ""
    assert err.startswith("flashmoe: ") and err.endswith("\n")
    assert err.count("\n") == 1, err
    assert "Error" not in err and "Traceback" not in err


@pytest.mark.parametrize("case", OPTIONS)
def test_a_mistake_is_one_line(run: Callable, model: Path, monkeypatch, case) -> None:
    monkeypatch.chdir(ROOT)
    args = [model if arg is MODEL else arg for arg in OPTIONS[case]]
    if args[:1] == ["generate"]:
        args += FAST if "--engine" not in args else ()
    _check_one_line(*run(*args))


TOOLS_FILES = {
    "not a list": {"name": "add"},
    "empty": [],
    "a string": ["add"],
    "no name": [{"type": "function", "function": {}}],
    "a number as name": [{"name": 3}],
    "no function": [{"type": "function", "function": None}],
    "parameters are a list": [{"name": "a", "parameters": [1]}],
    "a type is a number": [
        {"name": "a", "parameters": {"properties": {"b": {"type": 3}}}}
    ],
    "a choice is none": [
        {"name": "a", "parameters": {"properties": {"b": {"oneOf": 1}}}}
    ],
}


@pytest.mark.parametrize("case", TOOLS_FILES)
def test_faulty_tools(run: Callable, model: Path, tmp_path: Path, case: str) -> None:
    file = tmp_path / "tools.json"
    file.write_text(json.dumps(TOOLS_FILES[case]))
    code, out, err = run("chat", "--model", model, "--tools", file)
    _check_one_line(code, out, err)
    assert "tools.json" in err


def _damage_config(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def _damage_shard(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def _lfs_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def _other_model_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def _damage_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"model": 1}')


DAMAGES = [
    _damage_config,
    _damage_shard,
    _lfs_pointer,
    _other_model_type,
    _no_weights,
    _no_tokenizer,
    _damage_tokenizer,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_is_one_line(
    run: Callable, model: Path, tmp_path: Path, damage: Callable
) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    damage(folder)
    _check_one_line(*run("generate", "Hi", "--model", folder, *FAST))


def test_no_chat_template(run: Callable, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    code, out, err = run("chat", "--model", folder, *FAST, stdin="Hello\n")
    _check_one_line(code, out.strip(), err)
    assert "chat template" in err


def test_a_flipped_byte_is_found(run: Callable, model: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(model, tmp_path / "model")
    assert run("pack", folder, "--no-progress")[0] == 0
    layer = folder / "packed_experts" / "layer_02.bin"
    content = bytearray(layer.read_bytes())
    content[5] ^= 1
    layer.write_bytes(content)
    code, out, err = run("verify", folder, "--no-progress")
    _check_one_line(code, out, err)
    assert "layer_02.bin" in err


def test_mlx_is_missing(run: Callable, model: Path, monkeypatch) -> None:
    monkeypatch.setattr("flashmoe_ref.engine.find_spec", lambda name: None)
    code, out, err = run("generate", "Hi", "--model", model, "--engine", "mlx")
    _check_one_line(code, out, err)
    assert "pip install" in err


def test_no_reduced_model_outside_a_clone(run: Callable, monkeypatch) -> None:
    for module in (cli, cli_options):
        monkeypatch.setattr(module, "REDUCED", Path("/no/such/folder"))
    _check_one_line(*run("info"))
    assert "data/reduced" not in run("info", "--help")[1].split("examples")[0]


def test_a_full_disk_is_one_line(run: Callable, model: Path, monkeypatch) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device", "/some/file")

    monkeypatch.setattr("flashmoe_ref.pack.pack", full)
    code, _, err = run("pack", model)
    assert code == 2
    assert err.count("\n") == 1 and "No space left" in err


def test_out_of_memory_is_one_line(run: Callable, model: Path, monkeypatch) -> None:
    def exhausted(*args: object, **options: object) -> None:
        raise MemoryError

    monkeypatch.setattr("flashmoe_ref.info.facts", exhausted)
    _check_one_line(*run("info", model))


# --- as a process ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def endless(tmp_path_factory: pytest.TempPathFactory) -> tuple:
    """Arguments of a run that would print for minutes."""
    folder = tmp_path_factory.mktemp("cli") / "endless"
    _write_model(folder, max_position_embeddings=100_000)
    (folder / "generation_config.json").unlink()  # no file names a token that stops it
    (folder / "tokenizer_config.json").write_text("{}")
    return ("generate", "Hi", "--model", folder, "--max-tokens", 99_000, *FAST)


def test_text_comes_as_it_is_decoded(endless: tuple) -> None:
    with _start(*endless) as process:
        assert process.stdout.read(1)
        assert process.poll() is None  # text is here, the process still at work
        process.kill()


def test_control_c_ends_quietly(endless: tuple) -> None:
    with _start(*endless) as process:
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert b"Traceback" not in err


def test_a_closed_pipe_ends_quietly(endless: tuple) -> None:
    with _start(*endless) as process:
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait(timeout=30)
    assert process.returncode == 141
    assert err == b""


def test_a_terminal_without_unicode(model: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    args = ("generate", "Hi", "--model", model, "--max-tokens", 20, *FAST)
    with _start(*args, env=environment) as process:
        out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    out.decode("ascii")


def test_input_that_is_not_text(model: Path) -> None:
    command = [sys.executable, "-m", "flashmoe_ref.cli", "generate", "--model", model]
    done = subprocess.run(command, input=b"\xff\xfe", capture_output=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1 and b"not UTF-8 text" in done.stderr


def test_the_installed_command() -> None:
    command = Path(sys.executable).with_name("flashmoe")
    if not command.exists():
        pytest.skip("flashmoe is not installed beside this Python")
    done = subprocess.run([command, "--version"], capture_output=True, check=True)
    assert done.stdout.strip()
