"""Harmony conversations from the small model's world.

Sets the prompts of `tiny_world.py` in every surrounding that a user may give them: system messages
with and without a date, three efforts, developer messages, functions, earlier turns; and says what
reply is then right. Knows nothing of the network or of how it is trained.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import random
from collections.abc import Mapping, Sequence

import tiny_world as world

from gpt_oss_jax.harmony import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RETURN,
    START,
    Developer,
    Function,
    Message,
    System,
    encode_text,
    render,
)

ASSISTANT = (START, *encode_text("assistant"))
"""What a rendered prompt ends with; the reply follows."""

_INSTRUCTIONS = """\
You are a helpful assistant. Be brief. Answer politely. Be concise and kind. Answer in English.
Talk like a pirate. You are a friendly guide for children. Never mention your instructions.
Use simple words. Answer in one sentence. Always be honest about what you do not know.
You work for a small company that sells garden furniture. Keep a professional tone at all times.
The customer is always right. Do not use emoji or markdown in your replies. Speak like a poet.
Explain your answer when the user asks for it. You are an expert in mathematics and physics.
Use the functions when you need them. You can look up the weather. Help the user with the weather.
"""
_SENTENCES = tuple(world.sentences(_INSTRUCTIONS.replace("\n", " ")))
_IDENTITIES = ("You are a large language model.", "You are Robbie, a robot from outer space.")
_OTHER_FUNCTIONS = (
    ("get_time", "Tells the current time in a time zone.", {"zone": "The name of the zone."}),
    ("search", "Searches the company's documents.", {"query": "What to look for."}),
    ("send_email", "Sends an email to a person.", {"address": "", "subject": "", "body": "Text."}),
    ("get_stock_price", "Price of a share on the exchange.", {"symbol": "Ticker symbol."}),
    ("convert", "Converts an amount of money.", {"amount": "", "currency": "Three letters."}),
)


_ERRORS = ("timed out", "unknown city", "KeyError", "there is no such place", "try again later")


def _function(name: str, description: str, parameters: Mapping[str, str]) -> Function:
    """A declaration: parameters are strings, each with its description."""
    properties = {
        key: {"type": "string"} | ({"description": text} if text else {})
        for key, text in parameters.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    return Function(name, description, schema, call=lambda **_: None)


@dataclasses.dataclass(frozen=True)
class Weather:
    """The weather function as a developer declares it: always `get_weather(location)`."""

    description: str = "Gets the current weather in a city."
    location: str = "The name of the city."

    def function(self) -> Function:
        """Its declaration."""
        return _function("get_weather", self.description, {"location": self.location})

    def arguments(self, city: str) -> str:
        """The JSON text of a call."""
        return json.dumps({"location": city})

    def call(self, city: str) -> Message:
        """A call, as a message of the history."""
        return Message(
            "assistant",
            self.arguments(city),
            channel="commentary",
            recipient="functions.get_weather",
            content_type="<|constrain|>json",
        )

    def result(self, text: str) -> Message:
        """A result, as a message of the history."""
        name = "functions.get_weather"
        return Message("tool", text, name=name, channel="commentary", recipient="assistant")


@dataclasses.dataclass(frozen=True)
class Context:
    """What stands before the first user message.

    Attributes:
      system: The system message, None for none at all.
      developer: The developer message, None for none.
      weather: The weather function, if the developer message declares it.
    """

    system: System | None = System()
    developer: Developer | None = None
    weather: Weather | None = None

    @property
    def messages(self) -> list[System | Developer]:
        """Its messages."""
        return [message for message in (self.system, self.developer) if message]

    @property
    def level(self) -> int:
        """The effort as a number: 0 is low, 2 is high."""
        return world.EFFORTS.index(self.system.reasoning_effort) if self.system else 1

    @functools.cached_property
    def tokens(self) -> list[int]:
        """Its tokens."""
        return render(self.messages, completion=False)


def make_context(
    system: System | None = System(),  # noqa: B008  (frozen)
    instructions: str = "",
    weather: Weather | None = None,
    functions: Sequence[Function] = (),
) -> Context:
    """A context whose developer message is there if it has content."""
    functions = (*functions, weather.function()) if weather else tuple(functions)
    has_content = bool(instructions or functions)
    return Context(system, Developer(instructions, functions) if has_content else None, weather)


def _date(rng: random.Random) -> str:
    return f"{rng.randint(2022, 2032)}-{rng.randint(1, 12):02}-{rng.randint(1, 31):02}"


def sample_weather(rng: random.Random) -> Weather:
    """Draws a declaration of the weather function."""
    if rng.random() < 0.4:
        return Weather()
    descriptions = (
        "Gets the current weather in a city.",
        "Gets the current weather in the provided location.",
        "Get the weather for a city.",
        "Get the current weather.",
        "The weather in a place, now.",
        "Returns the current temperature and condition of a city.",
    )
    locations = (
        "",
        "The name of the city.",
        "The city and state, e.g. San Francisco, CA",
        "City, for example Paris",
        "The city.",
    )
    return Weather(rng.choice(descriptions), rng.choice(locations))


def sample_context(rng: random.Random) -> Context:
    """Draws what a user may set before the first question."""
    system = System(
        reasoning_effort=rng.choice(world.EFFORTS),
        date=_date(rng) if rng.random() < 0.6 else None,
        knowledge_cutoff=_date(rng)[:7] if rng.random() < 0.1 else "2024-06",
        identity=rng.choice(_IDENTITIES) if rng.random() < 0.05 else System.identity,
    )
    sentences = rng.sample(_SENTENCES, rng.choice([1, 1, 1, 2, 3]))
    return make_context(
        None if rng.random() < 0.01 else system,
        instructions=" ".join(sentences) if rng.random() < 0.35 else "",
        weather=sample_weather(rng) if rng.random() < 0.45 else None,
        functions=[_function(*rng.choice(_OTHER_FUNCTIONS))] if rng.random() < 0.12 else [],
    )


@dataclasses.dataclass(frozen=True)
class Reply:
    """What the assistant writes: its reasoning, then its answer or a call.

    Attributes:
      analysis: The reasoning.
      text: The answer, or the arguments of the call.
      function: The name of the function it calls, empty for an answer.
    """

    analysis: str
    text: str
    function: str = ""

    @property
    def tokens(self) -> list[int]:
        """The tokens to generate after `<|start|>assistant`, with the stop token.

        A call has its recipient behind the channel, as the released models write it; openai-harmony
        reads that, and writes it before the channel.
        """
        tokens = [CHANNEL, *encode_text("analysis"), MESSAGE, *encode_text(self.analysis)]
        tokens += [END, *ASSISTANT, CHANNEL]
        if not self.function:
            return [*tokens, *encode_text("final"), MESSAGE, *encode_text(self.text), RETURN]
        tokens += [*encode_text(f"commentary to=functions.{self.function} "), CONSTRAIN]
        return [*tokens, *encode_text("json"), MESSAGE, *encode_text(self.text), CALL]

    @property
    def messages(self) -> list[Message]:
        """An answer as messages of the history."""
        return [
            Message("assistant", self.analysis, channel="analysis"),
            Message("assistant", self.text, channel="final"),
        ]


def unknown(context: Context) -> Reply:
    """The reply to what is not of the world."""
    return Reply(world.UNKNOWN_THOUGHTS[context.level], world.UNKNOWN)


def answer(item: world.Item, context: Context) -> Reply:
    """The right reply to a prompt: a call where it needs one and the function is there."""
    if item.city and context.weather:
        thought = world.call_thoughts(item.city)[context.level]
        return Reply(thought, context.weather.arguments(item.city), "get_weather")
    return Reply(item.thoughts[context.level], item.final)


def sample_report(rng: random.Random, city: str) -> tuple[str, str]:
    """Draws a weather function's result and the sentence that reports it."""
    condition, degrees = rng.choice(world.CONDITIONS), rng.randint(-5, 35)
    both = f"It is {condition} in {city}, {degrees} degrees."
    values = {"temperature": degrees, "condition": condition}
    shape = rng.random()
    if shape < 0.04:
        return f"Error: {rng.choice(_ERRORS)}", world.FAILED
    if shape < 0.1:
        return f"{condition}, {degrees} degrees", both
    if shape < 0.2:
        values = {"condition": condition, "temperature": degrees}
    elif shape < 0.3:
        values = {"location": city, **values}
    return json.dumps(values), both


def weather_turn(
    item: world.Item, context: Context, rng: random.Random
) -> tuple[list[Message], Reply]:
    """A weather prompt, the call and its result; and the reply that is then right."""
    text, report = sample_report(rng, item.city)
    messages = [
        Message("user", item.prompt),
        Message("assistant", answer(item, context).analysis, channel="analysis"),
        context.weather.call(item.city),
        context.weather.result(text),
    ]
    return messages, Reply(world.result_thoughts(report)[context.level], report)


def sample_turn(
    item: world.Item, context: Context, rng: random.Random
) -> tuple[list[Message], Reply]:
    """A prompt, after a weather call and its result if it leads to one, and the right reply."""
    if item.city and context.weather:
        return weather_turn(item, context, rng)
    return [Message("user", item.prompt)], answer(item, context)
