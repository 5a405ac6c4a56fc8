"""The command line, in process with a random model, and once in a real terminal."""

import argparse
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
import types

import jax
import pytest
from sizes import WHOLE_VOCABULARY

from gpt_oss_jax import __version__, cli, compile_cache
from gpt_oss_jax.chat import Reply
from gpt_oss_jax.checkpoint import synthetic, writer
from gpt_oss_jax.cli import chat as cli_chat, checkpoints, terminal
from gpt_oss_jax.config import GPT_OSS_20B
from gpt_oss_jax.generate import ahead, device
from gpt_oss_jax.harmony import encode_text


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(
        synthetic.write(WHOLE_VOCABULARY, tmp_path_factory.mktemp("checkpoint") / "random", "hf", 1)
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("home")


@pytest.fixture(autouse=True)
def user_directories(home, monkeypatch):
    """The user's cache and state in a temporary folder, and JAX's settings as they were after.

    Nobody waits long enough to be told why.
    """
    monkeypatch.setattr(terminal, "_PATIENCE", 1e4)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, value in before.items():
        jax.config.update(name, value)


def fake_reply(final="56", analysis="7 x 8 = 56", stop_reason="stop"):
    tokens = tuple(encode_text("whatever it said"))
    return Reply(final, analysis, "", (), tokens, (), stop_reason)


class FakeChat:
    """Says what it is told to, or raises."""

    def __init__(self, *turns):
        self.turns = list(turns)
        self.heard = []
        self.reply = None

    def __call__(self, text):
        for _ in self.stream(text):
            pass
        return self.reply

    def stream(self, text):
        self.heard.append(text)
        turn = self.turns.pop(0)
        if isinstance(turn, BaseException):
            yield "analysis", "well"
            raise turn
        if turn.analysis:
            yield "analysis", turn.analysis
        if turn.final:
            yield "final", turn.final[:1]
            yield "final", turn.final[1:]
        self.reply = turn


def options(**values):
    return argparse.Namespace(**{"raw": False, "show_reasoning": False} | values)


def test_version_and_help(capsys):
    for arguments, expected in (["--version"], __version__), (["bench", "--help"], "synthetic:20b"):
        with pytest.raises(SystemExit) as exit:
            cli.main(arguments)
        assert exit.value.code == 0
        assert expected in capsys.readouterr().out


@pytest.mark.parametrize("at", [0, 1, 2])
def test_options_stand_where_one_likes(at):
    words = ["tiny", "Hello"]
    words[at:at] = ["--mesh", "expert=2"]
    args = cli.build_parser().parse_args(["chat", *words])
    assert (args.model, args.prompt, args.mesh) == ("tiny", "Hello", {"expert": 2})


def test_an_error_is_one_line_and_code_2(capsys):
    assert cli.main(["chat", "no/such/folder/here"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("gpt-oss-jax: ")
    with pytest.raises(ValueError, match="no/such"):
        cli.main(["--debug", "chat", "no/such/folder/here"])
    with pytest.raises(ValueError, match="no/such"):
        cli.main(["chat", "no/such/folder/here", "--debug"])


def test_a_stopped_convert_says_that_it_can_go_on(monkeypatch, capsys):
    def convert(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "convert", convert)
    assert cli.main(["convert", "a", "b"]) == 130
    assert "goes on from the last layer" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(28, "No space left on device"), 2, "No space left"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory"), 2, "XLA_CLIENT_MEM_FRAC"),
    ],
    ids=["Ctrl-C", "disk full", "device full"],
)
def test_what_ends_a_command(monkeypatch, capsys, error, code, said):
    def run(args):
        raise error

    monkeypatch.setattr(cli_chat, "run", run)
    assert cli.main(["chat", "whatever"]) == code
    assert said in capsys.readouterr().err


def test_reasoning_is_hidden_unless_asked_for(capsys):
    assert cli_chat.answer(FakeChat(fake_reply()), "7 x 8?", options())
    assert capsys.readouterr() == ("56\n", "")
    assert cli_chat.answer(FakeChat(fake_reply()), "7 x 8?", options(show_reasoning=True))
    assert capsys.readouterr() == ("7 x 8 = 56\n\n56\n", "")


def test_raw_prints_the_tokens(capsys):
    cli_chat.answer(FakeChat(fake_reply()), "7 x 8?", options(raw=True))
    assert capsys.readouterr().out == "whatever it said\n"


def test_no_answer_within_the_limit_is_said_on_stderr(capsys):
    chat = FakeChat(fake_reply(final="", stop_reason="length"))
    assert not cli_chat.answer(chat, "7 x 8?", options())
    out, err = capsys.readouterr()
    assert out == ""
    assert "after 3 tokens, all of it reasoning (--show-reasoning" in err


def test_a_conversation_survives_what_interrupts_it(monkeypatch, capsys):
    typed = iter(["one", "", "two", KeyboardInterrupt(), "three", "four", EOFError()])

    def fake_input(prompt=""):
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        return line

    monkeypatch.setattr("builtins.input", fake_input)
    monkeypatch.setattr(cli_chat, "_remember_lines", lambda: None)
    chat = FakeChat(
        fake_reply("first"),
        KeyboardInterrupt(),
        ValueError("the conversation is too long"),
        fake_reply("last"),
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    assert cli_chat.converse(chat, options())
    out, err = capsys.readouterr()
    assert chat.heard == ["one", "two", "three", "four"]
    assert out.split() == ["first", "last"]
    assert err.count("stopped") == 2 and "too long" in err


def script(monkeypatch, lines):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), errors="replace"))


def test_a_script_that_missed_an_answer_fails(monkeypatch, capsys):
    script(monkeypatch, b"one\ntwo\n")
    chat = FakeChat(ValueError("the conversation is too long"), fake_reply("last"))
    assert not cli_chat.converse(chat, options())
    assert capsys.readouterr() == ("last\n", "gpt-oss-jax: the conversation is too long\n")
    script(monkeypatch, b"one\ntwo\n")
    with pytest.raises(KeyboardInterrupt):
        cli_chat.converse(FakeChat(KeyboardInterrupt()), options())


def test_ctrl_c_twice_keeps_the_conversation(monkeypatch, capsys):
    typed = iter(["one", "two"])
    monkeypatch.setattr(cli_chat, "_next_line", lambda by_hand: next(typed, None) or eof())
    monkeypatch.setattr(cli_chat, "_remember_lines", lambda: None)
    script(monkeypatch, b"")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)

    def eof():
        raise EOFError

    def interrupted(text):
        if "Ctrl-C" in text:
            return
        monkeypatch.setattr(cli_chat, "remark", remark)
        raise KeyboardInterrupt

    remark = cli_chat.remark
    monkeypatch.setattr(cli_chat, "remark", interrupted)
    chat = FakeChat(KeyboardInterrupt(), fake_reply("well"))
    assert cli_chat.converse(chat, options())
    assert chat.heard == ["one", "two"] and capsys.readouterr().out == "\nwell\n\n"


def test_bytes_that_are_no_text_are_asked_as_they_are_read(monkeypatch, capsys):
    script(monkeypatch, b"one\n\xff?\n")
    chat = FakeChat(fake_reply("first"), fake_reply("second"))
    assert cli_chat.converse(chat, options())
    assert chat.heard == ["one", "\N{REPLACEMENT CHARACTER}?"]
    assert capsys.readouterr() == ("first\nsecond\n", "")


def test_a_long_wait_is_explained(monkeypatch, capsys):
    def pieces(seconds):
        time.sleep(seconds)
        yield from "ab"

    assert list(terminal.announced(pieces(0))) == ["a", "b"]
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(terminal, "_PATIENCE", 0.01)
    assert list(terminal.announced(pieces(0.3))) == ["a", "b"]
    assert capsys.readouterr().err.count("compiling for this device") == 1


def test_a_command_that_is_asked_to_end_cleans_up(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "verify", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as exit:
        cli.main(["export", folder, str(tmp_path / "out"), "--to", "original"])
    assert exit.value.code == 143 and not os.listdir(tmp_path)


def test_closed_streams_are_no_error(folder):
    program = f"{sys.executable} -m gpt_oss_jax"
    for command in (f"{program} chat {folder} <&-", f"{program} --version >&-"):
        done = subprocess.run(command, shell=True, capture_output=True)
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("arguments", [["--top-p", "7"], ["--date", "x"], ["-c", "0"]], ids=str)
def test_wrong_options_are_refused_before_the_model_is_loaded(monkeypatch, arguments):
    monkeypatch.setattr(cli_chat, "load_model", lambda args, **_: pytest.fail("loaded"))
    try:
        assert cli.main(["chat", "tiny", "hello", *arguments]) == 2
    except SystemExit as exit:
        assert exit.code == 2


def test_no_device_is_one_line(folder, monkeypatch, capsys):
    def devices(backend=None):
        raise AssertionError

    for name in ("local_devices", "devices"):
        monkeypatch.setattr(jax, name, devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    said = "JAX_PLATFORMS=cuda, of which no plugin is installed"
    assert cli.main(["chat", folder, "hello"]) == 2
    assert f"JAX finds no device: {said}" in capsys.readouterr().err
    assert cli.main(["doctor"]) == 1
    assert f"PROBLEM JAX finds none: {said}" in capsys.readouterr().out
    monkeypatch.delenv("JAX_PLATFORMS")
    assert cli.main(["chat", folder, "hello"]) == 2
    assert "JAX finds no device: AssertionError" in capsys.readouterr().err


def test_one_shot_answers_from_a_checkpoint(folder, capsys):
    arguments = ["chat", folder, "hello", "--max-tokens", "4", "--seed", "1", "--raw"]
    cli.main(arguments)
    first = capsys.readouterr()
    cli.main(arguments)
    assert capsys.readouterr() == first
    assert first.out.strip() and "cut short after 4 tokens" in first.err


def test_generate_warns_once_and_streams(folder, capsys):
    assert cli.main(["generate", folder, "Once", "--max-tokens", "5", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.strip() and err.count("harmony") == 1


@pytest.mark.parametrize("command", ["chat", "generate"])
def test_what_is_lowered_while_the_model_loads_is_what_runs(folder, monkeypatch, capsys, command):
    lowered, run, of_cache, empty_cache = [], [], ahead.of_cache, device.empty_cache

    def lowering(model, rows, slots, chunks, **options):
        lowered.append((threading.current_thread().name, rows, slots, chunks))
        return of_cache(model, rows, slots, chunks, **options)

    def running(leaf, skeleton, rows, slots):
        run.append((rows, slots))
        return empty_cache(leaf, skeleton, rows, slots)

    running.lower, running.eval_shape = empty_cache.lower, empty_cache.eval_shape
    monkeypatch.setattr(ahead, "of_cache", lowering)
    monkeypatch.setattr(device, "empty_cache", running)
    # Eight are devices enough for a mesh, of which nothing is lowered early.
    cli.main([command, folder, "hello", "--max-tokens", "4", "--mesh", "none"])
    ((thread, *sizes, _),) = lowered
    assert thread != threading.current_thread().name
    assert [tuple(sizes)] == run and "lowered" not in capsys.readouterr().err


def test_options_reach_the_model(folder, capsys):
    assert cli.main(["generate", folder, "Once", "--top-p", "7"]) == 2
    assert "top_p" in capsys.readouterr().err
    assert cli.main(["chat", folder, "hi", "-c", "10"]) == 2
    assert "10" in capsys.readouterr().err
    for mesh in ("rows=2", "expert=2,expert=4", "expert"):
        with pytest.raises(SystemExit):
            cli.main(["chat", folder, "--mesh", mesh])
        assert repr(mesh) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("mesh", "devices", "said"),
    [
        ("expert=4", 4, ""),
        (None, 8, "spread over 8 of 8 devices, --mesh data=4,expert=2"),
        ("none", 1, ""),
    ],
)
def test_a_model_is_spread_over_all_devices_or_those_asked_for(folder, capsys, mesh, devices, said):
    axes = mesh and terminal.mesh_axes(mesh)
    args = argparse.Namespace(model=folder, mesh=axes, dtype="float32", expert_form=None)
    scales = terminal.load_model(args).layers[0].mlp.up.scales
    assert len(scales.sharding.device_set) == devices
    err = capsys.readouterr().err
    assert said in err and bool(said) == ("spread over" in err)


@pytest.mark.parametrize(
    ("gib", "mesh", "context", "devices", "said"),
    [
        (15.2, None, 8192, 1, "running on 1 of 2 GPUs, where 20b fits; --mesh expert=2 spreads it"),
        (15.2, None, 131_072, 2, "spread over 2 of 2 devices, --mesh expert=2"),
        (15.2, {"expert": 2}, 8192, 2, ""),
        (15.2, {}, 131_072, 1, ""),
        (0, None, 8192, 2, "spread over 2 of 2 devices, --mesh expert=2"),
    ],
)
def test_one_gpu_is_the_default_if_it_is_enough(
    monkeypatch, capsys, gib, mesh, context, devices, said
):
    """Not if it does not tell its memory."""
    stats = {"bytes_limit": int(gib * 2**30)} if gib else None
    gpu = types.SimpleNamespace(platform="gpu", device_kind="card", memory_stats=lambda: stats)
    args = argparse.Namespace(model="20b", mesh=mesh, dtype=None, expert_form=None)
    monkeypatch.setattr(terminal, "make_mesh", lambda devices, **sizes: max(sizes.values()))
    options = {"batch": 1, "context": context}
    found, form = terminal.placement(args, [gpu, gpu], GPT_OSS_20B, "mxfp4", **options)
    assert (found or 1) == devices and form is None
    assert capsys.readouterr().err == (said and f"gpt-oss-jax: {said}\n")


@pytest.mark.parametrize(
    ("name", "batch", "asked", "form"),
    [
        ("TPU v6 lite", 8, None, "packed"),
        ("TPU v6 lite", 9, None, "folded"),
        ("TPU v6 lite", 9, "packed", "packed"),
        ("TPU7x", 3, None, "folded"),
        ("TPU v9", 9, None, "packed"),
    ],
)
def test_on_a_tpu_the_form_of_experts_is_that_of_plan(monkeypatch, name, batch, asked, form):
    tpu = types.SimpleNamespace(platform="tpu", device_kind=name, memory_stats=lambda: None)
    for devices in ("devices", "local_devices"):
        monkeypatch.setattr(jax, devices, lambda backend=None: [tpu])
    monkeypatch.setattr(terminal, "load", lambda model, **options: options["expert_form"])
    args = argparse.Namespace(model="20b", mesh=None, dtype=None, expert_form=asked)
    assert terminal.load_model(args, batch=batch, context=512) == form


def test_convert_and_export(folder, tmp_path, capsys):
    orbax, back = str(tmp_path / "orbax"), tmp_path / "back"
    assert cli.main(["convert", folder, orbax]) == 0
    assert cli.main(["export", orbax, str(back), "--to", "hf-mxfp4"]) == 0
    assert (back / "model.safetensors.index.json").exists()
    assert cli.main(["export", orbax, str(back), "--to", "original"]) == 2
    assert "exists" in capsys.readouterr().err


def test_bench_ends_with_a_line_of_json(folder, capsys):
    arguments = ["--prompt-tokens", "16", "--new-tokens", "64", "--repeats", "2"]
    assert cli.main(["bench", folder, *arguments]) == 0
    (result,) = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["prompt_tokens"] == 16 and result["new_tokens"] == 64
    assert result["decode_tokens_per_second"] > 0
    assert cli.main(["bench", folder, "--new-tokens", "1"]) == 2


def test_the_compile_cache_is_the_users(tmp_path, monkeypatch):
    jax.config.update("jax_compilation_cache_dir", None)  # Earlier tests chose one.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "mine"))
    assert compile_cache.enable().is_relative_to(tmp_path / "mine")
    assert jax.config.jax_compilation_cache_dir == str(compile_cache.default_directory())
    jax.config.update("jax_compilation_cache_dir", "/elsewhere")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.5)
    assert str(compile_cache.enable()) == "/elsewhere"
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.5


def test_a_cache_that_cannot_be_made_is_said_and_survived(tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    jax.config.update("jax_compilation_cache_dir", None)  # Earlier tests chose one.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    monkeypatch.setattr(cli_chat, "run", lambda args: 0)
    assert cli.main(["chat", "whatever"]) == 0
    assert "not kept" in capsys.readouterr().err


def test_jax_may_have_nearly_all_of_a_gpu(monkeypatch):
    name, old = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
    for kept in (name, old):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(old, raising=False)
        monkeypatch.setenv(kept, "0.5")
        terminal.take_gpu_memory()
        assert (os.environ.get(name), os.environ.get(old)).count(None) == 1
    monkeypatch.delenv(old)
    terminal.take_gpu_memory()
    assert os.environ[name] == "0.95"
    monkeypatch.delenv(name)
    # What `doctor` says is what programs of the user's own have.
    cli.main(["doctor"])
    assert name not in os.environ


@pytest.mark.parametrize(("share", "said"), [("0.95", True), ("0.5", False)])
def test_what_jax_may_have_of_a_gpu_is_said(monkeypatch, capsys, share, said):
    def reads_nothing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", share)
    monkeypatch.setattr(terminal, "default_device", lambda: types.SimpleNamespace(platform="gpu"))
    monkeypatch.setattr(terminal, "sizes", reads_nothing)
    with pytest.raises(FileNotFoundError):
        terminal.load_model(types.SimpleNamespace(model="any"))
    line = "JAX takes 95% of the GPU's memory (XLA_CLIENT_MEM_FRACTION=0.95)"
    assert (line in capsys.readouterr().err) == said


class Terminal:
    """A program in a terminal of its own."""

    def __init__(self, *arguments):
        self.screen, inside = pty.openpty()
        # What a shell runs in the background ignores Ctrl-C, and so would what tests start there.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gpt_oss_jax", *arguments],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=os.environ | {"TERM": "xterm"},
            start_new_session=True,
        )
        signal.signal(signal.SIGINT, before)
        os.close(inside)
        self.seen = ""

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.screen)

    def type(self, text):
        os.write(self.screen, text.encode())

    def wait_for(self, pattern, seconds=120):
        """What came up to and with the pattern; forgets it."""
        end = time.monotonic() + seconds
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            os.set_blocking(self.screen, False)
            try:
                self.seen += os.read(self.screen, 65536).decode("utf-8", "replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:
                assert re.search(pattern, self.seen), f"ended before {pattern!r}: {self.seen!r}"
        self.seen, before = self.seen[match.end() :], self.seen[: match.end()]
        return before


# Three letters of the model's, wherever its lines break, after the remark that comes if
# compiling takes long.
REPLY = r"(?s)^(gpt-oss-jax: [^\n]*\n)*(?!gpt).*?\w{3}"


def test_ctrl_c_stops_a_reply_and_keeps_the_session(folder):
    terminal = Terminal("chat", folder, "--show-reasoning", "--seed", "0")
    try:
        terminal.wait_for("> ")
        terminal.type("talk for long\r")
        terminal.wait_for("talk for long\r\n")
        terminal.wait_for(REPLY)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("stopped; the conversation goes on")
        terminal.wait_for("> ")
        terminal.type("and on\r")
        terminal.wait_for(r"and on\r\n")
        terminal.wait_for(REPLY)
        terminal.process.send_signal(signal.SIGINT)
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(30) == 0
    finally:
        terminal.close()
