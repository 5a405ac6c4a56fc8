"""Training sequences for the small model: many separate questions after one shared beginning.

A sequence is one context (system and developer message) followed by branches, each a question, or a
short conversation, with its answer. A branch sees the context and itself only, and its positions
continue the context's, so that each branch is exactly the conversation it would be alone, and the
context is paid for once. Also makes what the model must not know. Knows nothing of the network.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator

import numpy as np
import tiny_conversations as talk
import tiny_world as world

from gpt_oss_jax import harmony
from gpt_oss_jax.harmony import Message, System, encode_text

FOREIGN = -1
"""Stands for any token that has no row of its own."""

# Shapes of questions about anything else; a blank takes tokens the model has no row for.
_FRAMES = """\
What is _? What is the _ of _? What is the capital of _? What is a _? What are _? Who is _?
Who was _? Who invented the _? Who wrote _? Who won the _ in _? How do I _? How do I _ a _?
How many _ are in a _? How many _ does a _ have? How much is a _? How old is _? How tall is _?
How far is _ from _? How long does it take to _? Why is the _ _? Why do _ _? When did _ _?
When is _? Where is _? Where can I _ a _? Which _ is the _? Can you _ a _ for me? Can you _?
Do you _? Do you like _? Are you _? Is _ _? Is it _ to _? Tell me a _. Tell me about _.
Tell me how to _. Write a _ about _. Write _. Give me a _. Give me _ _ for _. Explain _.
Explain the _ in simple _. Translate _ to _. Please _ the _. _ _ _ _? _ the _ in _. _. _ _.
I want to _. I am _. I have a _. My _ is _. What does _ mean? What time is it in _?
What is the best _? What is the largest _? What is the color of _? What color is a _?
What is the opposite of _? How are _ made? What happened in _? What should I _? The _ is _.
How is the _ in _? What is the weather _? Is it _ in _? What is the temperature of _?
Name a _. Name the _ of _. Calculate the _ of _. Add _ to the _. Hello _ _ _. What's a _?
"""
_OUTSIDE = """\
What day is it? What day is today? What is the date? What time is it? How hot is the sun?
What is the largest? What is the capital? Who is the largest? What is the highest number?
How many people are in the world? How many hours are in a week? How many days are in a year?
How many days are in a month? How many months are in a week? How many legs does a bee have?
How many legs does a triangle have? How many sides does a spider have? What is the smallest planet?
Which planet is the smallest? What is the second largest planet? What is the coldest planet?
What is the closest ocean? What color is the sun? What color is honey? What colour is water?
What color is the ocean? Who wrote the world? Who wrote that? Who is Shakespeare?
Where is Paris? Where is Tokyo? Where is France? Is Paris in France? What is Jupiter?
What is honey? What is water? What is a week? What is a triangle? What is the sun? What is the sky?
What is Hamlet? Tell me about Hamlet. What is the opposite of cold? What is the opposite of blue?
What is the largest city in Japan? What is the largest city in the world? What is the sum?
What is the largest mountain in Spain? At what temperature does honey boil? When does the sun boil?
What do spiders make? What do you make? What do planets make? How many bees are in the world?
What is a function? What is JAX? What is a model? What is a number? What is the weather?
What is the capital of the world? What is the capital of Tokyo? What is the capital of the sun?
How old are you? Where are you? Are you hot? Do you know me? Who am I? What is my name?
How much is honey? How many planets are there? How many oceans are there? Tell me a fact.
Tell me something. What? Why? How? Who? And then? Yes. No. Really? Is that so? Add them.
"""
QUESTIONS = [
    prompt
    for question in world.sentences(_OUTSIDE.replace("\n", " "))
    for prompt in world.spellings(question)
]
_FRAME_LIST = list(world.sentences(_FRAMES.replace("\n", " ")))
_OPERATORS = (
    " + ", " plus ", "+", " x ", " times ", " * ", "*", "x", " - ", " minus ", "-", " / ",
    " divided by ", "/", "^",
)  # fmt: skip


@functools.cache
def items_by_category(held_out: bool) -> dict[str, list[world.Item]]:
    """The prompts that are held out, or those that are not, by category."""
    items = {category: [] for category in world.CATEGORIES}
    for item in world.world().values():
        if world.held_out(item.prompt) == held_out:
            items[item.category].append(item)
    return items


@functools.cache
def vocabulary() -> tuple[int, ...]:
    """Token ids of the world, sorted: the rows that the model has for itself."""
    texts = [world.UNKNOWN, world.NO_FUNCTION, world.FAILED, *world.UNKNOWN_THOUGHTS]
    texts += [f"-{i}" for i in range(10)] + [f" {i:02}" for i in range(32)]
    texts += [f"{i}" for i in range(145)] + [f"{year}-" for year in range(2020, 2033)]
    for items in items_by_category(False).values():
        for item in items:
            texts += [item.prompt, item.final, *item.thoughts]
    rng = random.Random(0)
    for city in world.CITIES * 20:
        text, report = talk.sample_report(rng, city)
        texts += [text, report, *world.result_thoughts(report), *world.call_thoughts(city)]
        texts.append(talk.Weather().arguments(city))
    tokens = {token for text in set(texts) for token in encode_text(text)}
    tokens.update(talk.make_context(instructions="You are a helpful assistant.").tokens)
    for effort in world.EFFORTS * 50:
        weather = talk.sample_weather(rng)
        context = talk.make_context(System(effort, "2025-01-01"), weather=weather)
        turn, reply = talk.weather_turn(items_by_category(False)["weather"][0], context, rng)
        call = talk.answer(items_by_category(False)["weather"][0], context)
        history = [*context.messages, *turn, *reply.messages]
        tokens.update(harmony.render(history), reply.tokens, call.tokens)
    return tuple(sorted(tokens))


@functools.cache
def _words() -> list[int]:
    """Tokens of the vocabulary that are a word after a space."""
    return [t for t in vocabulary() if harmony.decode([t])[:1] == " "]


def _fill(rng: random.Random, frame: str) -> list[int]:
    """Tokens of a frame with its blanks filled, mostly by foreign tokens, else by known words."""
    if rng.random() < 0.5:
        frame = rng.choice(world.spellings(frame))
    tokens = []
    for i, part in enumerate(frame.split("_")):
        if i:
            foreign = rng.random() < 0.85
            tokens += [FOREIGN] * rng.randint(1, 3) if foreign else [rng.choice(_words())]
        tokens += encode_text(part.rstrip(" "))
    return tokens


def _sample_item(
    rng: random.Random, weights: dict[str, float], held_out: bool = False
) -> world.Item:
    category = rng.choices(list(weights), weights.values())[0]
    return rng.choice(items_by_category(held_out)[category])


UNKNOWN_SHARE = 0.2
CATEGORIES = (*world.CATEGORIES, "unknown")
WEIGHTS = dict(greeting=0.15, identity=0.13, sum=0.22, product=0.25, fact=0.19, weather=0.06)


def _corrupt(rng: random.Random, tokens: list[int]) -> list[int]:
    """Replaces or inserts one to three tokens, mostly by foreign ones."""
    tokens = list(tokens)
    for _ in range(rng.choice([1, 1, 2, 3])):
        at = rng.randrange(len(tokens))
        new = FOREIGN if rng.random() < 0.85 else rng.choice(_words())
        tokens[at : at + rng.randint(0, 1)] = [new]
    return tokens


def sample_unknown(rng: random.Random) -> list[int]:
    """Tokens of a user's text that the model must not know an answer to."""
    while True:
        kind = rng.random()
        if kind < 0.3:
            tokens = _fill(rng, rng.choice(_FRAME_LIST))
        elif kind < 0.45:
            tokens = encode_text(rng.choice(QUESTIONS))
        elif kind < 0.65:
            tokens = _corrupt(rng, encode_text(_sample_item(rng, WEIGHTS).prompt))
        elif kind < 0.75:
            ends = [encode_text(_sample_item(rng, WEIGHTS).prompt) for _ in range(2)]
            cuts = [rng.randint(1, len(end)) for end in ends]
            tokens = ends[0][: cuts[0]] + ends[1][-cuts[1] :]
        elif kind < 0.93:
            tokens = encode_text(_outside_arithmetic(rng))
        else:
            pool = [FOREIGN, rng.choice(_words()), rng.choice(_words())]
            tokens = rng.choices(pool, k=rng.randint(1, 8))
        if FOREIGN in tokens or not _known().issuperset(tokens):
            return tokens
        text = harmony.decode(tokens)
        if _plain(text) not in _plain_world() and not world.held_out(text):
            return tokens


def _outside_arithmetic(rng: random.Random) -> str:
    """A calculation that is not a sum or product of two numbers up to 12."""
    a, b = rng.randint(0, 12), rng.randint(0, 12)
    operator = rng.choice(_OPERATORS)
    shape = rng.random()
    if shape < 0.5:
        a, b = rng.choice([(rng.randint(13, 144), b), (a, rng.randint(13, 144)), (a, -1 - b)])
        if rng.random() < 0.2:
            a = rng.randint(13, 999)
    elif shape < 0.8:
        operator = rng.choice(_OPERATORS[8:])
    else:
        b = f"{b}{rng.choice(_OPERATORS)}{rng.randint(0, 12)}"
    frame = rng.choice(["What is {}?", "what is {}", "What's {}?", "How much is {}?", "{}", "{} ="])
    return frame.format(f"{a}{operator}{b}")


def _plain(text: str) -> str:
    return "".join(character for character in text.lower() if character not in " ?.!,'=")


@functools.cache
def _known() -> frozenset[int]:
    return frozenset(vocabulary())


@functools.cache
def _plain_world() -> frozenset[str]:
    return frozenset(_plain(prompt) for prompt in world.world())


def branch(
    rng: random.Random, context: talk.Context, turns: int, held_out: bool
) -> tuple[str, list[int], list[int]]:
    """A conversation of some earlier turns and an open one.

    Returns:
      The category of the open one, the tokens of the prompt and those of the right reply.
    """
    weights = WEIGHTS | ({"weather": 1.4} if context.weather else {})
    history = []
    for _ in range(turns):
        messages, reply = talk.sample_turn(_sample_item(rng, weights), context, rng)
        history += [*messages, *reply.messages]
    if rng.random() < UNKNOWN_SHARE:
        # No text holds the foreign token, so the tokens go into a message without text.
        prompt = harmony.render([*history, Message("user", "")])
        at = len(prompt) - len(talk.ASSISTANT) - 1
        tokens = prompt[:at] + sample_unknown(rng) + prompt[at:]
        return "unknown", tokens, talk.unknown(context).tokens
    item = _sample_item(rng, weights, held_out)
    if rng.random() < 0.5:
        messages, reply = talk.sample_turn(item, context, rng)
    else:
        messages, reply = [Message("user", item.prompt)], talk.answer(item, context)
    return item.category, harmony.render([*history, *messages]), reply.tokens


def sequences(seed: int, length: int, held_out: bool = False) -> Iterator[dict[str, np.ndarray]]:
    """Endless sequences of `length` tokens, the same for the same seed.

    Args:
      seed: Of the draws.
      length: In tokens.
      held_out: Whether the open prompts are held-out ones, to score instead of to train.

    Yields:
      int32 [length] each: `tokens`, row numbers (`len(vocabulary())` is the foreign row);
      `positions`, -1 where nothing is; `segments`, 0 for the context, then 1, 2, .. for the
      branches; `targets`, the row to predict, -1 where nothing is learned; `categories`, the
      branch's number in `CATEGORIES`.
    """
    rng = random.Random(seed)
    rows = np.full(harmony.VOCAB_SIZE + 1, len(vocabulary()), np.int32)
    rows[list(vocabulary())] = np.arange(len(vocabulary()))
    while True:
        context = talk.sample_context(rng)
        arrays = {name: np.full(length, -1, np.int32) for name in ("positions", "targets")}
        arrays |= {
            name: np.zeros(length, np.int32) for name in ("tokens", "segments", "categories")
        }
        used = start = len(context.tokens)
        arrays["tokens"][:start] = rows[context.tokens]
        arrays["positions"][:start] = np.arange(start)
        turns = rng.choice([0, 0, 1, 1, 1, 2, 3])
        for segment in range(1, length):
            category, prompt, reply = branch(rng, context, turns, held_out)
            ids = rows[prompt + reply]
            end = used + len(ids) - 1
            if end > length:
                break
            arrays["tokens"][used:end] = ids[:-1]
            arrays["positions"][used:end] = np.arange(start, start + len(ids) - 1)
            arrays["segments"][used:end] = segment
            arrays["categories"][used:end] = CATEGORIES.index(category)
            arrays["targets"][end - len(reply) : end] = rows[reply]
            used, turns = end, 0
        yield arrays


def batches(
    seed: int, length: int, size: int, held_out: bool = False
) -> Iterator[dict[str, np.ndarray]]:
    """Endless batches of `size` sequences, [size, length]."""
    stream = sequences(seed, length, held_out)
    while True:
        some = [next(stream) for _ in range(size)]
        yield {name: np.stack([sequence[name] for sequence in some]) for name in some[0]}
