"""The vocabulary: text to token ids and back, and the ids that carry harmony's structure.

It does not know messages. The ranks come from the file that the user's environment names, else from
the copy in the package; nothing is downloaded. Text never becomes a special token here.
"""

import base64
import functools
import hashlib
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openai_harmony

STARTOFTEXT = 199998
ENDOFTEXT = 199999
RETURN = 200002
CONSTRAIN = 200003
CHANNEL = 200005
START = 200006
END = 200007
MESSAGE = 200008
CALL = 200012

RANKS = 199998
"""Ids below this are ordinary text; from it on they are special."""

VOCAB_SIZE = 201088
"""Rows of the models' embedding. openai-harmony also names id 201088, which no model has."""

VOCABULARY_URL = "https://openaipublic.blob.core.windows.net/encodings/o200k_base.tiktoken"
VOCABULARY_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"

_FILE = "o200k_base.tiktoken"
_CACHE_FILE = hashlib.sha1(VOCABULARY_URL.encode(), usedforsecurity=False).hexdigest()
_PACKAGED = Path(__file__).parents[1] / "data" / _FILE
_BASE = "TIKTOKEN_ENCODINGS_BASE"
_CACHE = "TIKTOKEN_RS_CACHE_DIR"
_NAMES = {
    STARTOFTEXT: "<|startoftext|>",
    ENDOFTEXT: "<|endoftext|>",
    RETURN: "<|return|>",
    CONSTRAIN: "<|constrain|>",
    CHANNEL: "<|channel|>",
    START: "<|start|>",
    END: "<|end|>",
    MESSAGE: "<|message|>",
    CALL: "<|call|>",
}
_LOCK = threading.Lock()


def vocabulary_path() -> Path:
    """The file that the ranks are read from; whether it is there and right is not looked at.

    The variables are openai-harmony's own. `TIKTOKEN_ENCODINGS_BASE` names a folder that must hold
    `o200k_base.tiktoken`. `TIKTOKEN_RS_CACHE_DIR` names a cache, in which the file has the SHA-1 of
    its URL for a name; a cache that does not have it yet is passed over. An empty variable counts
    as unset.
    """
    if base := os.environ.get(_BASE):
        return Path(base) / _FILE
    if cache := os.environ.get(_CACHE):
        cached = Path(cache) / _CACHE_FILE
        if cached.exists():
            return cached
    return _PACKAGED


def read_vocabulary(path: Path) -> bytes:
    """The bytes of a vocabulary file, known to be the right ones.

    Raises:
      ValueError: The file cannot be read or is another one; says what to do.
    """
    if path == _PACKAGED:
        remedy = "install gpt-oss-jax again"
    else:
        remedy = (
            f"put the file from {VOCABULARY_URL} there, or unset {_BASE} and {_CACHE} "
            "to use the copy in the package"
        )
    try:
        data = path.read_bytes()
    except OSError as error:
        why = error.strerror
        raise ValueError(f"cannot read the vocabulary {path}: {why}; {remedy}.") from error
    if (sha256 := hashlib.sha256(data).hexdigest()) != VOCABULARY_SHA256:
        raise ValueError(
            f"the vocabulary {path} is not o200k_base: wanted SHA-256 {VOCABULARY_SHA256}, "
            f"got {sha256} ({len(data):,} bytes); {remedy}."
        )
    return data


def encoding() -> openai_harmony.HarmonyEncoding:
    """openai-harmony's encoding, loaded once from a checked file.

    Raises:
      ValueError: As `read_vocabulary`.
    """
    return _load()[0]


def ranks() -> tuple[bytes, ...]:
    """The bytes of every ordinary token, indexed by id.

    Raises:
      ValueError: As `read_vocabulary`.
    """
    return _load()[1]


def encode_text(text: str) -> list[int]:
    """Token ids of plain text; what looks like a special token is spelled out in ordinary ones."""
    return encoding().encode(text, disallowed_special=())


def token_bytes(token: int) -> bytes:
    """The UTF-8 bytes of one id: a special token by its name, an id out of range as U+FFFD."""
    if 0 <= token < RANKS:
        return ranks()[token]
    if RANKS <= token < VOCAB_SIZE:
        return _NAMES.get(token, f"<|reserved_{token}|>").encode()
    return "\ufffd".encode()


def decode(tokens: Iterable[int]) -> str:
    """Text of token ids; bytes that are not UTF-8 become U+FFFD. Never raises for ints."""
    return b"".join(map(token_bytes, tokens)).decode("utf-8", "replace")


def _load() -> tuple[openai_harmony.HarmonyEncoding, tuple[bytes, ...]]:
    with _LOCK:
        return _load_once()


@functools.cache
def _load_once() -> tuple[openai_harmony.HarmonyEncoding, tuple[bytes, ...]]:
    path = vocabulary_path()
    data = read_vocabulary(path)
    with _environment(path):
        loaded = openai_harmony.load_harmony_encoding("HarmonyGptOss")
    return loaded, tuple(base64.b64decode(line.split()[0]) for line in data.splitlines())


@contextmanager
def _environment(path: Path) -> Iterator[None]:
    """Points openai-harmony at a checked file, which it takes from the environment only."""
    wanted = {_CACHE: str(path.parent)} if path.name == _CACHE_FILE else {_BASE: str(path.parent)}
    before = {name: os.environ.get(name) for name in (_BASE, _CACHE)}
    try:
        _set_environment({_BASE: None, _CACHE: None} | wanted)
        yield
    finally:
        _set_environment(before)


def _set_environment(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
