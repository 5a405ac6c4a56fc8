"""The parser: as openai-harmony where all is well formed, and what it makes of the rest."""

import random
import time

import openai_harmony
import pytest

from gpt_oss_jax import harmony
from gpt_oss_jax.harmony import Message, Parser, Repair, encoding, parse, render

ENCODING = encoding.encoding()
SHORT = {
    "<S>": "<|start|>",
    "<M>": "<|message|>",
    "<C>": "<|channel|>",
    "<K>": "<|constrain|>",
    "<E>": "<|end|>",
    "<R>": "<|return|>",
    "<L>": "<|call|>",
    "<T>": "<|endoftext|>",
    "<B>": "<|startoftext|>",
    "<X>": "<|reserved_200004|>",
}
TEXTS = [
    "",
    " ",
    "What is 2 + 2?",
    "日本語、emoji 👩‍👩‍👧 and e\u0301\n\n\ttabs",
    "<|start|>assistant<|channel|>final<|message|>no<|end|>",
    '{"city": "Zürich", "days": [1, 2]}',
    "\x00\x7f\u2028 to=functions.f <|constrain|>json",
    "a" * 300,
]


def ids(text: str) -> list[int]:
    for short, name in SHORT.items():
        text = text.replace(short, name)
    return ENCODING.encode(text, allowed_special="all")


def fields(message) -> tuple:
    """Everything of a message but its place, ours or openai-harmony's."""
    if isinstance(message, Message):
        author, text = (message.role, message.name), message.text
    else:
        author = (message.author.role.value, message.author.name)
        text = "".join(part.text for part in message.content)
    return *author, message.channel, message.recipient, message.content_type, text


def conversation(rng: random.Random, named: bool = True) -> list[Message]:
    """Random messages of every shape; with `named`, also those that openai-harmony cannot read.

    It writes but does not read names of anybody but tools, tools' messages without a recipient and
    content types without one.
    """
    messages = []
    for _ in range(rng.randrange(1, 7)):
        role = rng.choice(harmony.ROLES)
        tool = role == "tool"
        recipient = rng.choice([None, "functions.get_weather", "python", "browser.search", "ñandú"])
        if tool and not named:
            recipient = "assistant"
        has_type = named or recipient is not None
        messages.append(
            Message(
                role=role,
                text=rng.choice(TEXTS),
                name=rng.choice(["functions.f", "browser.open", "functions.日本"])
                if tool
                else rng.choice([None, "bob", "x:y"])
                if named
                else None,
                channel=rng.choice([None, "analysis", "commentary", "final", "somewhere"]),
                recipient=recipient,
                content_type=rng.choice([None, "<|constrain|>json", "json", "code"])
                if has_type
                else None,
            )
        )
    return messages


def written(messages: list[Message]) -> list[int]:
    return render(messages, completion=False, drop_analysis=False)


@pytest.mark.parametrize("seed", range(300))
def test_what_was_rendered_is_read_back(seed):
    messages = conversation(random.Random(seed))
    tokens = written(messages)
    parsed = parse(tokens)
    assert [fields(message) for message in parsed.messages] == [fields(m) for m in messages]
    assert parsed.repairs == ()
    at = 0
    for message in parsed.messages:
        assert message.span[0] == at
        at = message.span[1]
        assert tokens[at - 1] == message.end
    assert at == len(tokens)


@pytest.mark.parametrize("seed", range(300))
def test_agrees_with_openai_harmony(seed):
    tokens = written(conversation(random.Random(seed), named=False))
    theirs = ENCODING.parse_messages_from_completion_tokens(tokens)
    ours = parse(tokens)
    assert [fields(message) for message in ours.messages] == [fields(m) for m in theirs]
    assert ours.repairs == ()

    # The same, a token at a time.
    streamable = openai_harmony.StreamableParser(ENCODING, None)
    parser = Parser()
    for token in tokens:
        streamable.process(token)
        deltas = parser.push(token)
        assert "".join(delta.text for delta in deltas) == (streamable.last_content_delta or "")
        if deltas:
            header = deltas[-1].header
            assert header.role == streamable.current_role.value
            assert header.channel == streamable.current_channel
            assert header.recipient == streamable.current_recipient
            assert header.content_type == streamable.current_content_type


@pytest.mark.parametrize("seed", range(100))
def test_agrees_on_completions(seed):
    rng = random.Random(seed)
    first, *rest = conversation(rng, named=False)
    first = Message(
        "assistant", first.text, None, first.channel, first.recipient, first.content_type
    )
    if first.recipient is None:
        first = Message("assistant", first.text, None, first.channel)
    tokens = written([first, *rest])[2:]  # without <|start|>assistant, which the prompt has
    cut = rng.randrange(tokens.index(harmony.MESSAGE) + 1, len(tokens) + 1)
    for completion in (tokens, tokens[:cut]):
        try:
            theirs = ENCODING.parse_messages_from_completion_tokens(
                completion, openai_harmony.Role.ASSISTANT
            )
        except openai_harmony.HarmonyError:
            assert parse(completion).repairs[-1].kind == "cut_header"
            continue
        for role in ("assistant", None):
            ours = parse(completion, role)
            assert [fields(message) for message in ours.messages] == [fields(m) for m in theirs]
            assert ours.repairs == ()


def test_content_type_without_recipient_is_where_we_differ():
    """openai-harmony takes for a recipient what its own renderer wrote as a content type."""
    message = Message("assistant", "{}", channel="final", content_type="<|constrain|>json")
    tokens = written([message])
    (theirs,) = ENCODING.parse_messages_from_completion_tokens(tokens)
    assert (theirs.recipient, theirs.content_type) == ("<|constrain|>json", None)
    (ours,) = parse(tokens).messages
    assert (ours.recipient, ours.content_type) == (None, "<|constrain|>json")


def M(text, channel="final", recipient=None, content_type=None, role="assistant", name=None):
    return (role, name, channel, recipient, content_type, text)


CALL = M("{}", "commentary", "functions.f", "<|constrain|>json")
# What follows <|start|>assistant, the messages read and the kinds of repairs, all in order.
SHAPES = {
    # Well formed, in every way that models write it.
    "<C>analysis<M>a<E><S>assistant<C>final<M>b<R>": [M("a", "analysis"), M("b")],
    "<C>commentary to=functions.f <K>json<M>{}<L>": [CALL],
    "<C>commentary to=functions.f<K>json<M>{}<L>": [CALL],
    "<C>commentary to=functions.f <K> json<M>{}<L>": [CALL],
    " to=functions.f<C>commentary <K>json<M>{}<L>": [CALL],
    " to=functions.f<C>commentary<K>json<M>{}<L>": [CALL],
    " to=functions.f<C>commentary json<M>{}<L>": [M("{}", "commentary", "functions.f", "json")],
    " to=functions.f<C>commentary<M>{}<L>": [M("{}", "commentary", "functions.f")],
    "<C>analysis to=python code<M>1<L>": [M("1", "analysis", "python", "code")],
    "<C>final <K>JSON<M>{}<R>": [M("{}", "final", None, "<|constrain|>JSON")],
    "<C>commentary<M>Let me see.<E><S>assistant to=functions.f<C>commentary <K>json<M>{}<L>": [
        M("Let me see.", "commentary"),
        CALL,
    ],
    "<C>final<M>a<E><S>functions.f to=assistant<C>commentary<M>1<E>": [
        M("a"),
        M("1", "commentary", "assistant", role="tool", name="functions.f"),
    ],
    "<M>a<R>": [M("a", None)],
    ":bob<C>final<M>a<R>": [M("a", name="bob")],
    ":<C>final<M>a<R>": [M("a")],
    # Cut off in the content: what came counts.
    "<C>final<M>a": [M("a")],
    "<C>final<M>": [M("")],
    "": [],
    # Cut off in a header.
    "<C>": ["cut_header"],
    "<C>final": ["cut_header"],
    "<C>comment": ["cut_header"],
    "<C>commentary to=functions.get_wea": ["cut_header"],
    " to": ["cut_header"],
    "<C>analysis<M>a<E><S>": [M("a", "analysis"), "cut_header"],
    "<C>analysis<M>a<E><S>assistant": [M("a", "analysis"), "cut_header"],
    # No header at all, or a broken one.
    "Paris.<R>": ["missing_message", M("Paris.")],
    " Paris, as everybody knows for sure": [
        "missing_message",
        M(" Paris, as everybody knows for sure"),
    ],
    "Paris": ["missing_message", M("Paris")],
    "<C>final<M>a<E>b": [M("a"), "missing_start", "missing_message", M("b")],
    "user input is free<R>": ["missing_message", M("user input is free")],
    "users do that<R>": ["missing_message", M("users do that")],
    "<R>": ["missing_message", M("")],
    "<C>final<R>": ["missing_message", M("")],
    "<C>final Paris.<R>": ["missing_message", M(" Paris.")],
    "<C>finalParis.<R>": ["missing_message", M("Paris.")],
    "<C>analysis We need a longer text<E>": [
        "missing_message",
        M(" We need a longer text", "analysis"),
    ],
    '<C>commentary to=functions.f<K>json{"a":1}<L>': [
        "missing_message",
        M('{"a":1}', "commentary", "functions.f", "<|constrain|>json"),
    ],
    "<C><M>a<R>": ["bad_header", M("a", None)],
    "<C>commentary to=functions.f <K>json or so<M>{}<L>": ["bad_header", CALL],
    "<C>commentary functions.f <K>json<M>{}<L>": ["bad_header", CALL],
    "<C>commentary f <K>json<M>{}<L>": [
        "bad_header",
        M("{}", "commentary", "f", "<|constrain|>json"),
    ],
    "<C>final <K>json please<M>{}<R>": [
        "bad_header",
        M("{}", "final", None, "<|constrain|>json"),
    ],
    "<C>commentary functions.f<M>{}<L>": ["bad_header", M("{}", "commentary", "functions.f")],
    "<C>commentary to=functions.f to=b <K>json<M>{}<L>": ["bad_header", CALL],
    "<C>commentary to=<M>{}<L>": ["bad_header", M("{}", "commentary")],
    "<C>final<C>analysis<M>a<R>": ["bad_header", M("a")],
    "<C>final<X><M>a<R>": ["bad_header", M("a")],
    "<C>final<M>a<E><S>bash<C>commentary<M>b<E>": [M("a"), "bad_header", M("b", "commentary")],
    "<C>final<M>a<E><S><C>final<M>b<R>": [M("a"), "bad_header", M("b")],
    # No end, no start, too many of either.
    "<C>analysis<M>a<S>assistant<C>final<M>b<R>": [M("a", "analysis"), "missing_end", M("b")],
    "<C>analysis<M>a<C>final<M>b<R>": [M("a", "analysis"), "missing_end", M("b")],
    "<C>analysis<M>a<E>assistant<C>final<M>b<R>": [M("a", "analysis"), "missing_start", M("b")],
    "<C>analysis<M>a<E><C>final<M>b<R>": [M("a", "analysis"), "missing_start", M("b")],
    "<C>analysis<M>a<E><M>b<R>": [M("a", "analysis"), "missing_start", M("b", None)],
    '<C>analysis<M>a<E>{"b": 1}<R>': [
        M("a", "analysis"),
        "missing_start",
        "missing_message",
        M('{"b": 1}'),
    ],
    "<C>analysis<M>a<E>b<S>assistant<C>final<M>c<R>": [
        M("a", "analysis"),
        "missing_start",
        "missing_message",
        M("b"),
        "missing_end",
        M("c"),
    ],
    "<S>assistant<C>final<M>a<R>": ["stray_token", M("a")],
    "<C>analysis<M>a<E><S><S>assistant<C>final<M>b<R>": [
        M("a", "analysis"),
        "missing_message",
        M("b"),
    ],
    "<C>analysis<S>assistant<C>final<M>b<R>": ["missing_message", M("b")],
    "<C>final<M>a<R><E><T>": [M("a"), "stray_token", "stray_token"],
    # Special tokens within the text.
    "<B><C>final<M>a<R>": ["stray_token", M("a")],
    "<C>final<M><M>a<R>": ["stray_token", M("a")],
    "<C>commentary to=functions.f<M><K>{}<L>": [
        "stray_token",
        M("{}", "commentary", "functions.f"),
    ],
    "<C>final<M>a<X>b<R>": [M("a"), "stray_token", M("b")],
    "<C>final<M>a<M>b<R>": [M("a"), "stray_token", M("b")],
    "<C>final<M>a<T>": [M("a"), "stray_token"],
}


@pytest.mark.parametrize("text", SHAPES)
def test_shapes(text):
    parsed = parse(ids(text), "assistant")
    tiles = sorted([*parsed.messages, *parsed.repairs], key=lambda tile: tile.span)
    seen = [tile.kind if isinstance(tile, Repair) else fields(tile) for tile in tiles]
    assert seen == SHAPES[text]


def test_the_role_is_found_out_when_it_is_not_given():
    completion = ids("<C>final<M>a<R>")
    whole = ids("<S>assistant") + completion
    assert parse(completion).repairs == parse(whole).repairs == ()
    assert parse(completion).messages[0].span == (0, 5)
    assert parse(whole).messages[0].span == (0, 7)
    # A model that repeats what the prompt said is another matter.
    assert parse(whole, "assistant").repairs == (
        Repair("stray_token", "<|start|> where it has no meaning", (0, 1), ""),
    )
    assert parse(ids(" to=assistant<M>a<E>"), "user").messages[0].role == "user"


def test_a_repair_says_what_and_where():
    parsed = parse(ids("<C>commentary to=functions.f <K>json or so<M>{}<L>"))
    (repair,) = parsed.repairs
    assert repair.note == "left out 'or so'"
    assert repair.text == "commentary to=functions.f json or so"
    assert repair.span == (0, parsed.messages[0].span[0])
    (repair,) = parse([encoding.CHANNEL, 17196, encoding.MESSAGE, 201088]).repairs
    assert repair.note == "id 201088 where it has no meaning"


def test_ids_that_no_vocabulary_has():
    strange = [-1, -(2**70), 199998, 201087, 201088, 2**31, 2**64]
    assert [repair.kind for repair in parse(strange).repairs] == ["stray_token"] * len(strange)
    (message,) = parse([*strange[:3], *ids("<C>final<M>a"), *strange[3:]]).messages
    assert message.text == "a"


def test_integers_of_any_kind():
    numpy = pytest.importorskip("numpy")
    tokens = ids("<C>final<M>ab<R>")
    parsed = parse(numpy.array(tokens, numpy.int32))
    assert parsed == parse(tokens)
    assert type(parsed.messages[0].end) is int
    with pytest.raises(TypeError):
        parse([1.0])


def test_half_a_character_is_never_streamed():
    text = "é👩‍👩‍👧日" * 3
    data = text.encode()
    one_byte = {value: token for token, value in enumerate(encoding.ranks()) if len(value) == 1}
    parser = Parser()
    pieces = []
    for token in [*ids("<C>final<M>"), *(one_byte[data[i : i + 1]] for i in range(len(data)))]:
        pieces += [delta.text for delta in parser.push(token)]
    assert "".join(pieces) == text
    assert len(pieces) == len(text)
    assert "\ufffd" not in "".join(pieces)


def test_what_cannot_become_a_character_is_marked_and_streaming_goes_on():
    one_byte = {value: token for token, value in enumerate(encoding.ranks()) if len(value) == 1}
    parser = Parser()
    for token in ids("<C>final<M>"):
        parser.push(token)
    assert [delta.text for delta in parser.push(one_byte[b"\xe6"])] == []
    assert [delta.text for delta in parser.push(one_byte[b"a"])] == ["\ufffda"]
    assert [delta.text for delta in parser.push(one_byte[b"\xe6"])] == []
    assert [delta.text for delta in parser.push(encoding.RETURN)] == ["\ufffd"]
    assert parser.messages[0].text == "\ufffda\ufffd"


def test_text_without_a_header_streams_before_it_ends():
    parser = Parser("assistant")
    waited = 0
    for token in harmony.encode_text("Paris is the capital of France, and so on and so on."):
        if parser.push(token):
            break
        waited += 1
    assert waited <= 6
    parser = Parser("assistant")
    for _ in range(256):
        assert parser.push(64) == []
    assert [delta.text for delta in parser.push(64)] == ["a"] * 257


def test_a_wrong_role_is_refused():
    with pytest.raises(ValueError, match="system, developer, user, assistant, tool, got 'bot'"):
        parse([], "bot")


def test_blanks_cost_no_more_than_words():
    """A model that loops on blanks must not stop the program that reads it."""
    (blanks,) = harmony.encode_text(" " * 128)
    start = time.process_time()
    parse([encoding.START, *[blanks] * 2000])
    parse([blanks] * 250, "assistant")
    assert time.process_time() - start < 5
