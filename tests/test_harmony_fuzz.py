"""The parser takes anything: random and mutated token sequences, each checked whole.

python -m tests.test_harmony_fuzz 1000000        # more of them than the tests run, from one seed
"""

import random
import sys
import time

import pytest

from gpt_oss_jax.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    ENDOFTEXT,
    MESSAGE,
    RETURN,
    ROLES,
    START,
    Message,
    Parser,
    Repair,
    decode,
    encode_text,
    parse,
    render,
)
from gpt_oss_jax.harmony.encoding import RANKS

SEQUENCES = 100_000
SHARDS = 20
KINDS = {
    "missing_start",
    "missing_message",
    "missing_end",
    "bad_header",
    "cut_header",
    "stray_token",
}
STRUCTURE = (START, CHANNEL, CONSTRAIN, MESSAGE, END, RETURN, CALL)
STRANGE = (ENDOFTEXT, 199998, 200000, 200018, 201087, 201088, -1, -(10**30), 2**31, 2**64)
WORDS = [
    encode_text(word)
    for word in (
        *"assistant user tool system developer final analysis commentary".split(),
        *"functions.f python bash json code users finally é日👩".split(),
        *(
            " to=functions.f",
            " to=",
            " to",
            "to=assistant",
            " json",
            ":bob",
            ":",
            "\n",
            "  ",
            '{"a":1}',
        ),
        "Paris is the capital of France",
    )
]
RECIPIENT = encode_text(" to=functions.f")


def piece(rng: random.Random) -> list[int]:
    kind = rng.random()
    if kind < 0.5:
        return [rng.choice(STRUCTURE)]
    if kind < 0.8:
        return rng.choice(WORDS)
    if kind < 0.93:
        return [rng.randrange(RANKS)]
    if kind < 0.97:
        return [rng.randrange(256)]  # single bytes: broken UTF-8
    return [rng.choice(STRANGE)]


def noise(rng: random.Random) -> list[int]:
    return [token for _ in range(rng.randrange(24)) for token in piece(rng)]


def well_formed(rng: random.Random) -> list[int]:
    """A reply as models write them, built here: rendering would take most of the time."""
    tokens = []
    for _ in range(rng.randrange(1, 4)):
        channel = rng.choice(("analysis", "commentary", "final"))
        tokens += [START, *encode_text("assistant")]
        early = channel == "commentary" and rng.random() < 0.4
        late = channel == "commentary" and not early and rng.random() < 0.6
        tokens += RECIPIENT * early
        tokens += [CHANNEL, *encode_text(channel)]
        tokens += RECIPIENT * late
        tokens += [CONSTRAIN, *encode_text("json")] * (early or late)
        tokens += [MESSAGE, *rng.choice(WORDS), *rng.choice(WORDS), rng.choice((END, RETURN, CALL))]
    return tokens


def mutated(rng: random.Random) -> list[int]:
    tokens = well_formed(rng)
    for _ in range(rng.randrange(1, 5)):
        i = rng.randrange(len(tokens) + 1)
        change = rng.randrange(6)
        if change == 0:  # delete
            del tokens[i : i + rng.randrange(1, 3)]
        elif change == 1:  # insert
            tokens[i:i] = piece(rng)
        elif change == 2:  # replace
            tokens[i : i + 1] = piece(rng)
        elif change == 3:  # repeat
            tokens[i:i] = tokens[i : i + 2]
        elif change == 4:  # swap
            tokens[i : i + 2] = tokens[i : i + 2][::-1]
        else:  # cut
            del tokens[max(i, 1) :]
    return tokens


def ordinary(tokens) -> str:
    return decode(token for token in tokens if 0 <= token < RANKS)


def check(tokens: list[int], role: str | None) -> tuple[int, int]:
    """Parses, and holds the outcome against the tokens; numbers of messages and repairs."""
    parser, streamed = Parser(role), []
    for token in tokens:
        streamed += parser.push(token)
    streamed += parser.finish()
    parsed = parser.parsed

    at = 0
    for tile in sorted([*parsed.messages, *parsed.repairs], key=lambda tile: tile.span):
        start, stop = tile.span
        assert start == at <= stop, "a gap or an overlap"
        at = stop
        inside = tokens[start:stop]
        if isinstance(tile, Repair):
            assert tile.kind in KINDS and tile.note
            assert tile.text == ordinary(inside)
            continue
        assert start < stop and tile.role in ROLES
        # The text is that of all that follows the header, and in there are ordinary tokens only.
        content = inside[inside.index(MESSAGE) + 1 :] if MESSAGE in inside else inside
        if tile.end is not None:
            assert content.pop() == tile.end in (END, RETURN, CALL)
        assert all(0 <= token < RANKS for token in content)
        assert tile.text == decode(content)
        if MESSAGE in inside:
            header = inside[: inside.index(MESSAGE)]
            # Half characters next to a special token are marked, so compare around the marks.
            for value in (tile.name, tile.channel, tile.recipient):
                parts = (value or "").split("\ufffd")
                assert value == "tool" or all(part in ordinary(header) for part in parts)
    assert at == len(tokens), "the end is missing"

    # What was streamed is what was parsed, under the same headers.
    assert "".join(delta.text for delta in streamed) == "".join(m.text for m in parsed.messages)
    with_text = [message for message in parsed.messages if message.text]
    assert {fields(delta.header) for delta in streamed} == {fields(m) for m in with_text}
    return len(parsed.messages), len(parsed.repairs)


def fields(message: Message) -> tuple:
    return message.role, message.name, message.channel, message.recipient, message.content_type


def fuzz(count: int, seed: int) -> tuple[int, int, int]:
    """Checks `count` sequences; numbers of tokens, messages and repairs."""
    rng = random.Random(seed)
    totals = [0, 0, 0]
    for i in range(count):
        tokens = (noise if i % 2 else mutated)(rng)
        role = (None, "assistant", "assistant", "tool")[i // 2 % 4]
        try:
            counts = check(tokens, role)
        except Exception as error:
            raise AssertionError(f"{tokens=} {role=}") from error
        totals = [a + b for a, b in zip(totals, (len(tokens), *counts), strict=True)]
    return tuple(totals)


@pytest.mark.parametrize("seed", range(SHARDS))
def test_any_tokens_are_tiled(seed):
    tokens, messages, repairs = fuzz(SEQUENCES // SHARDS, seed)
    # So that this cannot pass by checking nothing much.
    assert tokens > 10 * SEQUENCES // SHARDS
    assert messages > SEQUENCES // SHARDS and repairs > SEQUENCES // SHARDS


def test_whatever_was_read_can_be_written():
    """History is rendered again, so no parsed message may be one that rendering refuses."""
    rng = random.Random(0)
    for i in range(2_000):
        messages = parse((noise if i % 2 else mutated)(rng)).messages
        tokens = render(messages, completion=False, drop_analysis=False)
        texts = [message.text for message in parse(tokens).messages]
        assert texts == [message.text for message in messages]


if __name__ == "__main__":
    count, began = int(sys.argv[1]), time.perf_counter()
    tokens, messages, repairs = fuzz(count, seed=1234)
    seconds = time.perf_counter() - began
    print(
        f"{count:,} sequences of {tokens:,} tokens: {messages:,} messages, {repairs:,} repairs, "
        f"all tiled, in {seconds:.0f} s"
    )
