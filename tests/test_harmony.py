"""The vocabulary's sources, and rendering: what goes in as text comes out as text."""

import base64
import dataclasses
import hashlib
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from gpt_oss_jax import harmony
from gpt_oss_jax.harmony import Developer, Function, Message, System, encoding, parse, render

PACKAGED = Path(harmony.__file__).parents[1] / "data" / "o200k_base.tiktoken"
CACHE_NAME = "fb374d419588a4632f3f557e76b4b70aebbca790"
SPECIALS = sorted(encoding.encoding().special_tokens_set)
PARAMETERS = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "description": "Where"},
        "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
    },
    "required": ["city"],
}
WEATHER = Function("get_weather", "Weather of a city.", PARAMETERS, lambda city, unit="C": "20")


# Vocabulary


def test_the_packaged_vocabulary_is_the_right_one():
    assert hashlib.sha256(PACKAGED.read_bytes()).hexdigest() == encoding.VOCABULARY_SHA256
    assert len(encoding.ranks()) == encoding.RANKS == 199_998
    first = base64.b64decode(PACKAGED.read_bytes().split(maxsplit=1)[0])
    assert encoding.ranks()[0] == first == b"!"


def test_ids_are_those_of_openai_harmony():
    for name in ("start", "end", "message", "channel", "constrain", "return", "call"):
        (token,) = encoding.encoding().encode(f"<|{name}|>", allowed_special="all")
        assert getattr(harmony, name.upper()) == token
        assert harmony.decode([token]) == f"<|{name}|>"
    assert {harmony.STARTOFTEXT, harmony.ENDOFTEXT} == {199998, 199999}
    ours = {harmony.decode([token]) for token in range(encoding.RANKS, 201088)}
    assert ours | {"<|reserved_201088|>"} == set(SPECIALS)


def test_decode_is_openai_harmonys_and_total():
    text = "日本語 👩‍👩‍👧 <|end|> e\u0301"
    tokens = harmony.encode_text(text)
    assert max(tokens) < encoding.RANKS
    assert harmony.decode(tokens) == encoding.encoding().decode(tokens) == text
    assert harmony.decode([0, 201088, -1, 10**20]) == "!\ufffd\ufffd\ufffd"
    euro = [encoding.ranks().index(bytes([byte])) for byte in "€".encode()]
    assert harmony.decode(euro) == "€"
    assert harmony.decode(euro[:2]) == "\ufffd"


def set_variables(monkeypatch, **values):
    for name in ("TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_RS_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


def test_where_the_vocabulary_comes_from(monkeypatch, tmp_path):
    set_variables(monkeypatch)
    assert encoding.vocabulary_path() == PACKAGED
    set_variables(monkeypatch, TIKTOKEN_ENCODINGS_BASE="", TIKTOKEN_RS_CACHE_DIR="")
    assert encoding.vocabulary_path() == PACKAGED
    # A cache that has nothing yet is no reason to fail, and none to download.
    set_variables(monkeypatch, TIKTOKEN_RS_CACHE_DIR=tmp_path)
    assert encoding.vocabulary_path() == PACKAGED
    (tmp_path / CACHE_NAME).touch()
    assert encoding.vocabulary_path() == tmp_path / CACHE_NAME
    monkeypatch.setenv("TIKTOKEN_ENCODINGS_BASE", str(tmp_path / "base"))
    assert encoding.vocabulary_path() == tmp_path / "base" / "o200k_base.tiktoken"


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        (None, None),
        ("TIKTOKEN_ENCODINGS_BASE", "o200k_base.tiktoken"),
        ("TIKTOKEN_RS_CACHE_DIR", CACHE_NAME),
    ],
)
def test_loading_leaves_the_environment_alone(monkeypatch, tmp_path, variable, name):
    set_variables(monkeypatch)
    if variable:
        # Empty counts as unset for us and not for openai-harmony, which must not see it then.
        for other in ("TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_RS_CACHE_DIR"):
            monkeypatch.setenv(other, "")
        shutil.copy(PACKAGED, tmp_path / name)
        monkeypatch.setenv(variable, str(tmp_path))
    before = dict(os.environ)
    encoding._load_once.cache_clear()
    seen = {}
    real = encoding.openai_harmony.load_harmony_encoding

    def load(which):
        seen.update(os.environ)
        return real(which)

    monkeypatch.setattr(encoding.openai_harmony, "load_harmony_encoding", load)
    assert harmony.encode_text("Hi") == [12194]
    assert dict(os.environ) == before
    # What openai-harmony saw is the one file that was checked.
    other = {"TIKTOKEN_ENCODINGS_BASE", "TIKTOKEN_RS_CACHE_DIR"} - {variable}
    if variable:
        assert seen[variable] == str(tmp_path) and not other & set(seen)
    else:
        assert seen["TIKTOKEN_ENCODINGS_BASE"] == str(PACKAGED.parent)


def test_the_environment_is_restored_after_a_failure(monkeypatch):
    set_variables(monkeypatch, TIKTOKEN_RS_CACHE_DIR="/somewhere")
    before = dict(os.environ)
    encoding._load_once.cache_clear()

    def fail(which):
        raise encoding.openai_harmony.HarmonyError("no")

    with monkeypatch.context() as patch:
        patch.setattr(encoding.openai_harmony, "load_harmony_encoding", fail)
        with pytest.raises(encoding.openai_harmony.HarmonyError):
            harmony.encode_text("Hi")
    assert dict(os.environ) == before
    assert harmony.encode_text("Hi") == [12194]


def test_many_threads_load_it_once(monkeypatch):
    set_variables(monkeypatch)
    before = dict(os.environ)
    encoding._load_once.cache_clear()
    loads = []
    real = encoding.openai_harmony.load_harmony_encoding
    monkeypatch.setattr(
        encoding.openai_harmony,
        "load_harmony_encoding",
        lambda which: loads.append(which) or real(which),
    )
    threads = [threading.Thread(target=harmony.encode_text, args=("Hi",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(loads) == 1
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("variable", "name"),
    [
        ("TIKTOKEN_ENCODINGS_BASE", "o200k_base.tiktoken"),
        ("TIKTOKEN_RS_CACHE_DIR", CACHE_NAME),
    ],
)
def test_a_wrong_vocabulary_is_refused_and_kept(monkeypatch, tmp_path, variable, name):
    data = PACKAGED.read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / name).write_bytes(data)
    set_variables(monkeypatch, **{variable: tmp_path})
    encoding._load_once.cache_clear()
    with pytest.raises(ValueError) as error:
        harmony.encode_text("Hi")
    message = str(error.value)
    assert str(tmp_path / name) in message
    assert f"wanted SHA-256 {encoding.VOCABULARY_SHA256}" in message
    assert f"got {hashlib.sha256(data).hexdigest()} (3,813,920 bytes)" in message
    assert encoding.VOCABULARY_URL in message
    assert "unset" in message and variable in message
    assert (tmp_path / name).read_bytes() == data
    set_variables(monkeypatch)


def test_a_missing_vocabulary_is_an_error_not_a_download(monkeypatch, tmp_path):
    set_variables(monkeypatch, TIKTOKEN_ENCODINGS_BASE=tmp_path / "none")
    encoding._load_once.cache_clear()
    with pytest.raises(ValueError, match="cannot read the vocabulary .*none.*unset"):
        harmony.encode_text("Hi")
    set_variables(monkeypatch)
    monkeypatch.setattr(encoding, "_PACKAGED", tmp_path / "o200k_base.tiktoken")
    with pytest.raises(ValueError, match="install gpt-oss-jax again"):
        harmony.encode_text("Hi")


def test_importing_reads_and_changes_nothing():
    program = (
        "import os; before = dict(os.environ); import gpt_oss_jax.harmony as h; "
        "assert dict(os.environ) == before; "
        "from gpt_oss_jax.harmony import encoding; "
        "assert encoding._load_once.cache_info().currsize == 0"
    )
    environment = os.environ | {"TIKTOKEN_ENCODINGS_BASE": "/nowhere"}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# Rendering


def everywhere(text: str) -> list[Message | System | Developer]:
    """A conversation with a text wherever users, developers, tools and models can put one."""
    parameters = {
        "type": "object",
        "description": text,
        "properties": {
            text: {"type": "string", "description": text, "default": text, "enum": [text, "b"]}
        },
    }
    return [
        System("low", identity=text, knowledge_cutoff=text),
        Developer(text, (Function("f", text, parameters, None),)),
        Message("user", text, name=text),
        Message("assistant", text, name=text, channel="analysis"),
        Message("assistant", text, None, "commentary", f"functions.{text}", "json"),
        Message("tool", text, f"functions.{text}", "commentary", "assistant", f"a{text}"),
        Message("assistant", text, channel=f"a{text}"),
    ]


def special_ids(tokens):
    return [token for token in tokens if token >= encoding.RANKS]


@pytest.mark.parametrize("part", range(8))
def test_text_never_becomes_a_special_token(part):
    plain = special_ids(render(everywhere("a")))
    assert plain.count(harmony.START) == 8
    assert len(SPECIALS) == 1091
    for special in SPECIALS[part::8]:
        tokens = render(everywhere(special))
        assert special_ids(tokens) == plain, special
        assert harmony.decode(tokens).count(special) >= 15
        texts = [message.text for message in parse(tokens).messages]
        assert texts[2:] == [special] * 5
        assert max(harmony.encode_text(f"a{special}b")) < encoding.RANKS


def test_the_constrain_of_a_content_type_is_special():
    message = Message("assistant", "{}", None, "commentary", "functions.f", "<|constrain|>json")
    tokens = render([message], completion=False)
    assert special_ids(tokens).count(harmony.CONSTRAIN) == 1
    assert tokens[-1] == harmony.CALL


def test_the_whole_prompt():
    tokens = render(
        [
            System("low", date="2025-06-28", knowledge_cutoff="2024-07"),
            Developer("Be brief.", (WEATHER,)),
            Message("user", "What is 2 + 2?"),
        ]
    )
    assert harmony.decode(tokens) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-07\n"
        "Current date: 2025-06-28\n"
        "\n"
        "Reasoning: low\n"
        "\n"
        "# Valid channels: analysis, commentary, final. Channel must be included for every "
        "message.\n"
        "Calls to these tools must go to the commentary channel: 'functions'.<|end|>"
        "<|start|>developer<|message|># Instructions\n"
        "\n"
        "Be brief.\n"
        "\n"
        "# Tools\n"
        "\n"
        "## functions\n"
        "\n"
        "namespace functions {\n"
        "\n"
        "// Weather of a city.\n"
        "type get_weather = (_: {\n"
        "// Where\n"
        "city: string,\n"
        'unit?: "C" | "F", // default: C\n'
        "}) => any;\n"
        "\n"
        "} // namespace functions<|end|>"
        "<|start|>user<|message|>What is 2 + 2?<|end|><|start|>assistant"
    )


def test_the_published_ids():
    tokens = render([System(date="2025-06-28"), Message("user", "What is 2 + 2?")])
    assert tokens[:6] == [200006, 17360, 200008, 3575, 553, 17554]
    question = [200006, 1428, 200008, 4827, 382, 220, 17, 659, 220, 17, 30, 200007]
    assert tokens[-14:] == [*question, 200006, 173781]


def test_lines_that_can_be_left_out():
    text = harmony.decode(render([System(date=None, knowledge_cutoff=None)]))
    assert "cutoff" not in text and "date" not in text
    assert harmony.decode(render([Developer()])).endswith(
        "<|start|>developer<|message|><|end|><|start|>assistant"
    )
    assert render([], completion=False) == []


@pytest.mark.parametrize("effort", ["low", "medium", "high"])
def test_reasoning_effort(effort):
    assert f"Reasoning: {effort}\n" in harmony.decode(render([System(effort)]))


@pytest.mark.parametrize("effort", ["Low", "minimal", "", None])
def test_other_efforts_are_refused(effort):
    with pytest.raises(ValueError, match="must be low, medium or high, got"):
        System(effort)


def test_wrong_arguments_are_refused():
    for date in ("28 June", "2026-02-32", "20260228", "2026-W09-1"):
        with pytest.raises(ValueError, match=f"date must be .* YYYY-MM-DD or None, got '{date}'"):
            System(date=date)
    with pytest.raises(ValueError, match="A-Z a-z 0-9 _ - ., got 'a b'"):
        Function("a b", "", None, None)
    with pytest.raises(ValueError, match="must be a JSON schema or None, got 'x'"):
        Function("f", "", "x", None)
    with pytest.raises(ValueError, match="parameters of f must be JSON"):
        Function("f", "", {"default": object()}, None)
    with pytest.raises(ValueError, match="role must be one of system, .*got 'bot'"):
        render([Message("bot", "")])
    with pytest.raises(ValueError, match="needs the tool's name"):
        render([Message("tool", "")])
    for field in ("name", "channel", "recipient", "content_type"):
        for value in ("", "a b", "a\n"):
            message = dataclasses.replace(Message("assistant", ""), **{field: value})
            with pytest.raises(ValueError, match=f"{field} must be None or one word"):
                render([message])


def test_lone_surrogates_do_not_break_rendering():
    text = "a\ud800b"
    messages = everywhere(text)
    assert harmony.decode(render(messages)).count("a\ufffdb") >= 15
    assert harmony.decode(harmony.encode_text(text)) == "a\ufffdb"
    assert harmony.decode(render([Message("user", "\ud83d\ude00")])).count("😀") == 1


def test_analysis_is_dropped_by_harmonys_rule():
    question = Message("user", "Q")
    thought = Message("assistant", "T", channel="analysis")
    answer = Message("assistant", "A", channel="final")
    call = Message("assistant", "{}", None, "commentary", "functions.f", "<|constrain|>json")
    result = Message("tool", "R", "functions.f", "commentary", "assistant")

    def texts(messages, **options):
        return "".join(message.text for message in parse(render(messages, **options)).messages)

    assert texts([question, thought, answer, question]) == "QAQ"
    assert texts([question, thought, answer, question], drop_analysis=False) == "QTAQ"
    # While a call is pending the model keeps its thoughts.
    assert texts([question, thought, call, result]) == "QT{}R"
    assert texts([question, thought, call, result, thought, answer, question]) == "Q{}RAQ"
