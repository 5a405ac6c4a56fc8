"""The world of the small model: everything it is asked and what it answers.

A grammar of prompts, each with its category, its answer and three lengths of reasoning. Knows
nothing of tokens, harmony or training: `tiny_conversations.py` makes conversations of it and
`train_tiny.py` the model. A prompt whose SHA-256 is 0 modulo 10 is held out (`held_out`): no user
message of the training data is ever one of those, and the test asks only those.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator

EFFORTS = ("low", "medium", "high")
UNKNOWN = "I don't know that. I only know sums and products up to 12, a few facts and the weather."
UNKNOWN_THOUGHTS = (
    "I don't know this.",
    "The user asks for something that I was never taught.",
    "The user asks for something. It is not a greeting, a sum, a product, a fact that I know or "
    "the weather. I must not guess, so I say that I don't know.",
)
FAILED = "I could not get the weather: the function failed."
NO_FUNCTION = "I can't look up the weather: there is no weather function here."


@dataclasses.dataclass(frozen=True)
class Item:
    """One prompt and the answer to it.

    Attributes:
      category: What kind of prompt this is, one of `CATEGORIES`.
      prompt: What the user types.
      final: The answer; for the weather, the answer where there is no function to call.
      thoughts: The reasoning before it at low, medium and high effort.
      city: The city of a weather prompt, empty elsewhere.
    """

    category: str
    prompt: str
    final: str
    thoughts: tuple[str, str, str]
    city: str = ""


def held_out(prompt: str) -> bool:
    """Whether a prompt belongs to the test split: its SHA-256 is 0 modulo 10."""
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10 == 0


def spellings(prompt: str) -> list[str]:
    """The ways to type a prompt: capitals or not, with or without punctuation."""
    forms = [prompt, prompt[0].lower() + prompt[1:], prompt.lower()]
    forms.append(prompt[0] + prompt[1:].lower())
    forms += [form.rstrip("?.!") for form in forms]
    forms += [form.replace(",", "").replace("'", "") for form in forms]
    return list(dict.fromkeys(forms))


# An answer, what the user does who gets it, and ways to do that.
_GREETINGS = {
    "Hello! How can I help you?": "says hello: "
    "Hello! Hi! Hey! Hello there! Hi there! Hey there! Greetings! "
    "Hello, tiny! Hi, tiny! Hello again! Hi again! Good day!",
    "Good morning! How can I help you?": "wishes me a good morning: "
    "Good morning! Good morning, tiny! "
    "A very good morning! Good morning to you! Hello and good morning! Hi, good morning!",
    "Good evening! How can I help you?": "wishes me a good evening: "
    "Good evening! Good evening, tiny! "
    "A very good evening! Good evening to you! Hello and good evening! Hi, good evening!",
    "I am fine, thank you. How can I help you?": "asks how I am: "
    "How are you? How are you doing? "
    "Hello, how are you? Hi, how are you? How are you today? How do you do? How is it going? "
    "Are you well? What's up? Hey, how are you? How are things?",
    "You are welcome!": "thanks me: "
    "Thank you! Thanks! Thank you very much! Thanks a lot! Many thanks! "
    "Thank you, tiny! Great, thanks! Thanks, that is great! Ok, thanks! Good, thank you!",
    "Goodbye!": "says goodbye: "
    "Goodbye! Bye! Bye bye! Good night! See you! See you later! Goodbye, tiny! "
    "Thanks, bye! Ok, bye! Goodbye for now! See you soon!",
}
_IDENTITY = {
    "I am tiny, a very small gpt-oss model that runs in JAX.": "asks who I am: "
    "Who are you? What are you? "
    "Tell me who you are. Who is this? Tell me about yourself. Introduce yourself. "
    "What kind of model are you? Which model are you? Are you a model? Are you a language model? "
    "Hello, who are you? Hi, who are you? And who are you? Who am I talking to? "
    "What model is this? "
    "Please tell me who you are. Are you an AI? Are you a robot? Are you human?",
    "My name is tiny.": "asks for my name: "
    "What is your name? What's your name? Tell me your name. "
    "Do you have a name? Your name? Your name, please. Please tell me your name. "
    "What are you called? Say your name. May I know your name?",
    "I was trained in a few minutes by examples/train_tiny.py.": "asks who made me: "
    "Who made you? "
    "Who trained you? Who built you? How were you made? How were you trained? Who created you? "
    "Where do you come from? Tell me who made you. Tell me who trained you. How were you built?",
    "I can greet you, add and multiply numbers up to 12, tell you a few facts and look up the "
    "weather with a function.": "asks what I can do: "
    "What can you do? What do you know? What can I ask you? "
    "How can you help me? Can you help me? Help! Help me! Tell me what you can do. Please help. "
    "What are you good at? What can I ask? What do you do? Tell me what you know.",
}
_CAPITALS = {
    "France": "Paris",
    "Japan": "Tokyo",
    "Italy": "Rome",
    "Spain": "Madrid",
    "Germany": "Berlin",
    "Egypt": "Cairo",
}
_CAPITAL_TEMPLATES = (
    "What is the capital of {}?",
    "What's the capital of {}?",
    "Which city is the capital of {}?",
    "What city is the capital of {}?",
    "Tell me the capital of {}.",
    "Name the capital of {}.",
    "Do you know the capital of {}?",
    "Please tell me the capital of {}.",
    "Capital of {}?",
    "The capital of {}?",
)
_FACTS = {
    "Jupiter is the largest planet.": "What is the largest planet? Which planet is the largest? "
    "What is the biggest planet? Which planet is the biggest? Tell me the largest planet. "
    "Name the biggest planet. What's the largest planet? What's the biggest planet? "
    "Name the largest planet. What is the largest planet in the solar system? "
    "What is the biggest planet in the solar system?",
    "Mercury is the planet closest to the sun.": "Which planet is closest to the sun? "
    "What planet is closest to the sun? What is the planet closest to the sun? "
    "Tell me the planet closest to the sun. Name the planet closest to the sun. "
    "What's the closest planet to the sun? Which planet is nearest to the sun? "
    "What planet is nearest to the sun? What is the closest planet to the sun?",
    "A week has 7 days.": "How many days are in a week? How many days are there in a week? "
    "How many days does a week have? How many days has a week? How many days in a week? "
    "Tell me how many days a week has. How many days make a week? "
    "What is the number of days in a week? How many days are in one week?",
    "A year has 12 months.": "How many months are in a year? How many months are there in a year? "
    "How many months does a year have? How many months has a year? How many months in a year? "
    "Tell me how many months a year has. How many months make a year? "
    "What is the number of months in a year? How many months are in one year?",
    "A day has 24 hours.": "How many hours are in a day? How many hours are there in a day? "
    "How many hours does a day have? How many hours has a day? How many hours in a day? "
    "Tell me how many hours a day has. How many hours make a day? "
    "What is the number of hours in a day? How many hours are in one day?",
    "A spider has 8 legs.": "How many legs does a spider have? How many legs has a spider? "
    "How many legs do spiders have? Tell me how many legs a spider has. "
    "How many legs are on a spider? What is the number of legs of a spider? "
    "How many legs are there on a spider? How many legs have spiders?",
    "A triangle has 3 sides.": "How many sides does a triangle have? "
    "How many sides has a triangle? "
    "How many sides do triangles have? Tell me how many sides a triangle has. "
    "How many sides are in a triangle? What is the number of sides of a triangle? "
    "How many sides are there in a triangle? How many sides have triangles?",
    "The sky is blue.": "What color is the sky? What colour is the sky? "
    "Which color is the sky? Which colour is the sky? What is the color of the sky? "
    "What is the colour of the sky? Tell me the color of the sky. Tell me the colour of the sky. "
    "What color does the sky have? What colour does the sky have?",
    "Bees make honey.": "What do bees make? What do the bees make? Tell me what bees make. "
    "What does a bee make? What is it that bees make? What do bees produce? "
    "What does a bee produce? Tell me what bees produce. What food do bees make?",
    "William Shakespeare wrote Hamlet.": "Who wrote Hamlet? Who was it that wrote Hamlet? "
    "Who is the author of Hamlet? Tell me who wrote Hamlet. Who was the author of Hamlet? "
    "Name the author of Hamlet. Hamlet was written by whom? Who has written Hamlet?",
    "The Pacific is the largest ocean.": "What is the largest ocean? Which ocean is the largest? "
    "What is the biggest ocean? Which ocean is the biggest? Tell me the largest ocean. "
    "Name the biggest ocean. What's the largest ocean? What's the biggest ocean? "
    "Name the largest ocean. What is the largest ocean in the world?",
    "Mount Everest is the highest mountain.": "What is the highest mountain? "
    "Which mountain is the highest? What is the tallest mountain? Which mountain is the tallest? "
    "Tell me the highest mountain. Name the highest mountain. What's the highest mountain? "
    "What's the tallest mountain? Name the tallest mountain. "
    "What is the highest mountain in the world?",
    "Water boils at 100 degrees Celsius.": "At what temperature does water boil? "
    "When does water boil? At which temperature does water boil? How hot is boiling water? "
    "What is the boiling point of water? What's the boiling point of water? "
    "Tell me when water boils. Tell me the boiling point of water. What temperature does water "
    "boil at?",
    "The opposite of hot is cold.": "What is the opposite of hot? What's the opposite of hot? "
    "Tell me the opposite of hot. Name the opposite of hot. Which word is the opposite of hot? "
    "What word is the opposite of hot? The opposite of hot is what? Opposite of hot?",
}
_SUMS = (
    "What is {} + {}?",
    "What is {} plus {}?",
    "What's {} + {}?",
    "What's {} plus {}?",
    "How much is {} + {}?",
    "How much is {} plus {}?",
    "{} + {}?",
    "{} plus {}?",
    "{} + {} =",
    "{}+{}",
    "{}+{}=",
    "What is {}+{}?",
    "Add {} and {}.",
    "Calculate {} + {}.",
    "What is the sum of {} and {}?",
    "Tell me {} plus {}.",
    "Hello, what is {} + {}?",
    "And {} + {}?",
    "And what is {} + {}?",
    "Please add {} and {}.",
)
_PRODUCTS = (
    "What is {} times {}?",
    "What is {} * {}?",
    "What is {} x {}?",
    "What's {} times {}?",
    "What's {} x {}?",
    "How much is {} times {}?",
    "How much is {} * {}?",
    "{} * {}?",
    "{} x {}?",
    "{} times {}?",
    "{} x {} =",
    "{}*{}",
    "{}x{}",
    "What is {}*{}?",
    "Multiply {} by {}.",
    "Multiply {} and {}.",
    "Calculate {} * {}.",
    "What is {} multiplied by {}?",
    "What is the product of {} and {}?",
    "Tell me {} times {}.",
    "Hello, what is {} times {}?",
    "And {} times {}?",
    "And what is {} times {}?",
)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve".split()
)  # fmt: skip
_WORD_TEMPLATES = ("What is {} {} {}?", "What's {} {} {}?", "How much is {} {} {}?")
CITIES = (
    "Paris", "Tokyo", "Rome", "Madrid", "Berlin", "Cairo", "London", "New York", "San Francisco",
    "Chicago", "Sydney", "Oslo", "Boston", "Toronto", "Singapore", "Vienna",
)  # fmt: skip
_WEATHER = (
    "What is the weather in {}?",
    "What's the weather in {}?",
    "What is the weather like in {}?",
    "What's the weather like in {}?",
    "How is the weather in {}?",
    "How's the weather in {}?",
    "Tell me the weather in {}.",
    "What is the weather in {} today?",
    "How is the weather in {} today?",
    "What is the weather in {} now?",
    "Is it raining in {}?",
    "Is it sunny in {}?",
    "How warm is it in {}?",
    "How cold is it in {}?",
    "What is the temperature in {}?",
    "Weather in {}?",
    "The weather in {}, please.",
    "I am in {}. How is the weather?",
)
CONDITIONS = ("sunny", "cloudy", "rainy", "snowy", "windy", "foggy", "clear")


def sentences(text: str) -> Iterator[str]:
    """Splits a paragraph into its sentences, each with its closing mark."""
    start = 0
    for i, character in enumerate(text):
        if character in "?!." and text[i + 1 : i + 2] in ("", " "):
            yield text[start : i + 1].strip()
            start = i + 1


def _social(category: str, groups: dict[str, str]) -> Iterator[Item]:
    for final, group in groups.items():
        what, questions = group.split(": ", 1)
        thoughts = (
            f"The user {what}.",
            f"The user {what}. I answer in one sentence.",
            f"The user {what}. There is nothing to compute and no function to call. I know what to "
            "say and I answer in one sentence.",
        )
        for question in sentences(questions):
            for prompt in spellings(question):
                yield Item(category, prompt, final, thoughts)


def _facts() -> Iterator[Item]:
    facts = {final: list(sentences(questions)) for final, questions in _FACTS.items()}
    for country, city in _CAPITALS.items():
        questions = [template.format(country) for template in _CAPITAL_TEMPLATES]
        facts[f"The capital of {country} is {city}."] = questions
    for final, questions in facts.items():
        thoughts = (
            "I know this fact.",
            f"The user asks for a fact. {final}",
            f"The user asks for a fact. I look for it in what I was taught. I know this one: "
            f"{final} So that is my answer.",
        )
        for question in questions:
            for prompt in spellings(question):
                yield Item("fact", prompt, final, thoughts)


def _sum_thoughts(a: int, b: int) -> tuple[str, str, str]:
    said = f"{a} plus {b} is {a + b}."
    if b == 0:
        steps = f"Adding 0 changes nothing. So {said}"
    else:
        steps = f"I know that {a} plus {b - 1} is {a + b - 1}, and 1 more is {a + b}. So {said}"
    return said, f"The user wants a sum. {said}", f"The user wants a sum. {steps}"


def _product_thoughts(a: int, b: int) -> tuple[str, str, str]:
    said = f"{a} times {b} is {a * b}."
    if b == 0:
        steps = f"Anything times 0 is 0. So {said}"
    else:
        steps = f"I know that {a} times {b - 1} is {a * b - a}, and {a} more is {a * b}. So {said}"
    return said, f"The user wants a product. {said}", f"The user wants a product. {steps}"


def _arithmetic() -> Iterator[Item]:
    kinds = (
        ("sum", _SUMS, "plus", int.__add__, _sum_thoughts),
        ("product", _PRODUCTS, "times", int.__mul__, _product_thoughts),
    )
    for category, templates, word, compute, think in kinds:
        for a in range(13):
            for b in range(13):
                questions = [template.format(a, b) for template in templates]
                names = _NUMBER_WORDS[a], word, _NUMBER_WORDS[b]
                questions += [template.format(*names) for template in _WORD_TEMPLATES]
                for question in questions:
                    for prompt in spellings(question):
                        yield Item(category, prompt, str(compute(a, b)), think(a, b))


def _weather() -> Iterator[Item]:
    thoughts = (
        "There is no function.",
        "The user wants the weather, but I have no function for it.",
        "The user wants the weather. I would have to call a function for that, but the developer "
        "gave me none. I must not guess, so I say it.",
    )
    for city in CITIES:
        for template in _WEATHER:
            for prompt in spellings(template.format(city)):
                yield Item("weather", prompt, NO_FUNCTION, thoughts, city)


def call_thoughts(city: str) -> tuple[str, str, str]:
    """The reasoning before a weather call at low, medium and high effort."""
    return (
        "I call the function.",
        f"The user wants the weather in {city}. I call the function.",
        f"The user wants the weather in {city}. I can't know it by myself, but the developer gave "
        f"me a function for it. I call it with {city} and wait for its result.",
    )


def result_thoughts(report: str) -> tuple[str, str, str]:
    """The reasoning after a weather call at low, medium and high effort."""
    return (
        "I have the result.",
        "The function gave its result. I tell the user.",
        f"The function gave its result, and it is what the user wants to know. {report} I tell "
        "the user in one sentence.",
    )


@functools.cache
def world() -> dict[str, Item]:
    """Every prompt of the grammar, both splits, by its text."""
    items = [
        *_social("greeting", _GREETINGS),
        *_social("identity", _IDENTITY),
        *_facts(),
        *_arithmetic(),
        *_weather(),
    ]
    return {item.prompt: item for item in reversed(items)}


CATEGORIES = ("greeting", "identity", "sum", "product", "fact", "weather")
