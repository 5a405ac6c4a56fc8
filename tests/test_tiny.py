"""The small trained model of the package: scored on what it was never trained on.

The held-out prompts come from the grammar in `examples/tiny_world.py`, by the rule stated there;
the questions of `tiny_outside.txt` are nowhere in the training data. All go through the package's
own load and generate_batch, greedy, and an answer is right only if its harmony needs no repair.
"""

import collections
import dataclasses
import json
import random
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from gpt_oss_jax import harmony
from gpt_oss_jax.checkpoint import load, tiny
from gpt_oss_jax.config import Config
from gpt_oss_jax.generate import generate_batch
from gpt_oss_jax.harmony import Message, System
from gpt_oss_jax.sampling import SamplingParams

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import tiny_batches
import tiny_conversations as talk
import tiny_world as world

OUTSIDE = Path(__file__).with_name("tiny_outside.txt").read_text().splitlines()
HELD_OUT = [item for item in world.world().values() if world.held_out(item.prompt)]
BATCH = 64


@pytest.fixture(autouse=True, scope="module")
def compiles_quickly():
    """Not here: hundreds of answers are generated."""


@dataclasses.dataclass(frozen=True)
class Asked:
    """One question of the exam and what the model wrote after it.

    Attributes:
      category: Of the question.
      prompt: What the user typed.
      level: Effort, 0 is low, 2 is high.
      right: The reply that is right.
      given: Tokens.
    """

    category: str
    prompt: str
    level: int
    right: talk.Reply
    given: list[int] = ()

    @property
    def messages(self):
        """Analysis and answer, None if it is not exactly those two in harmony without repairs."""
        parsed = harmony.parse(self.given, role="assistant")
        channels = [message.channel for message in parsed.messages]
        well = channels in (["analysis", "final"], ["analysis", "commentary"])
        return parsed.messages if well and not parsed.repairs else None

    @property
    def is_right(self) -> bool:
        if self.messages is None:
            return False
        answer = self.messages[-1]
        if self.category == "outside":
            return answer.channel == "final" and "don't know" in answer.text
        if not self.right.function:
            return answer.channel == "final" and answer.text == self.right.text
        return (
            answer.recipient == f"functions.{self.right.function}"
            and answer.content_type == "<|constrain|>json"
            and answer.text == self.right.text
            and self.given[-1] == harmony.CALL
        )

    @property
    def thinking(self) -> int:
        """Tokens of the analysis."""
        return len(harmony.encode_text(self.messages[0].text))


def _exam():
    """Yields the messages of every question, and the question."""
    rng = random.Random(1)
    plenty = {"sum": 52, "product": 52, "fact": 80, "weather": 108}
    items = [
        item
        for category in world.CATEGORIES
        for some in [[item for item in HELD_OUT if item.category == category]]
        for item in rng.sample(some, min(len(some), plenty.get(category, len(some))))
    ]
    for i, item in enumerate(items):
        # Small categories at every effort, of the others each fourth prompt at the two outer ones;
        # half of all in what a program sends by default.
        some = [0, 2] if i % 4 == 0 else [i // 3 % 3]
        for level in some if item.category in plenty else range(3):
            system = System(world.EFFORTS[level], rng.choice([None, "2026-03-14"]))
            context = talk.make_context(system)
            if rng.random() < 0.5:
                drawn = talk.sample_context(rng)
                context = dataclasses.replace(drawn, system=system)
            if item.city and i % 3:
                context = talk.make_context(system, weather=talk.sample_weather(rng))
            category, messages, reply = item.category, [Message("user", item.prompt)], None
            if item.city and i % 3 == 1:
                category = "weather answer"
                messages, reply = talk.weather_turn(item, context, rng)
            elif item.city and context.weather:
                category = "weather call"
            reply = reply or talk.answer(item, context)
            yield [*context.messages, *messages], Asked(category, item.prompt, level, reply)
    for i, item in enumerate(rng.sample(items, 60)):
        system = System(world.EFFORTS[i % 3], "2026-03-14")
        context = talk.make_context(system, weather=talk.Weather() if i % 2 else None)
        history = []
        for _ in range(1 + i // 30):
            earlier = rng.choice(
                tiny_batches.items_by_category(False)[rng.choice(world.CATEGORIES)]
            )
            messages, reply = talk.sample_turn(earlier, context, rng)
            history += [*messages, *reply.messages]
        messages = [*context.messages, *history, Message("user", item.prompt)]
        reply = talk.answer(item, context)
        yield messages, Asked("later turn", item.prompt, context.level, reply)
    for i, prompt in enumerate(OUTSIDE):
        system = System(world.EFFORTS[i % 3], "2026-03-14")
        context = talk.make_context(system, weather=talk.Weather() if i % 4 == 0 else None)
        asked = Asked("outside", prompt, context.level, talk.unknown(context))
        yield [*context.messages, Message("user", prompt)], asked


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield tiny.unpack()


@pytest.fixture(scope="module")
def model(folder):
    return load(folder, dtype=jnp.float32)


@pytest.fixture(scope="module")
def exam(model):
    """The whole exam, answered; then the tests only look at it."""
    questions = [(harmony.render(messages), asked) for messages, asked in _exam()]
    # A batch takes as long as its longest answer: answers of like length together.
    questions.sort(key=lambda question: len(question[1].right.tokens))
    done = []
    for start in range(0, len(questions), BATCH):
        some = questions[start : start + BATCH]
        completions = generate_batch(
            model,
            [prompt for prompt, _ in some],
            max_tokens=120,
            sampling=SamplingParams(temperature=0.0),
        )
        for (_, asked), completion in zip(some, completions, strict=True):
            done.append(dataclasses.replace(asked, given=completion.tokens))
    return done


def _wrong(some):
    return [f"{a.prompt!r} at {a.level}: {harmony.decode(a.given)}" for a in some if not a.is_right]


def test_at_least_300_prompts_are_held_out():
    assert len(HELD_OUT) >= 300
    trained = {i.prompt for items in tiny_batches.items_by_category(False).values() for i in items}
    assert len(trained) + len(HELD_OUT) == len(world.world())
    assert not any(world.held_out(prompt) for prompt in trained)


def test_no_held_out_or_outside_prompt_is_in_the_training_data():
    rows = np.array([*tiny_batches.vocabulary(), 200013])
    stream = tiny_batches.sequences(0, 384)
    seen = set()
    for _ in range(100):
        sequence = next(stream)
        for segment in range(1, sequence["segments"].max() + 1):
            tokens = rows[sequence["tokens"][sequence["segments"] == segment]].tolist()
            text = harmony.decode(tokens)
            seen.update(re.findall(r"<\|start\|>user<\|message\|>(.*?)<\|end\|>", text, re.DOTALL))
    assert len(seen) > 300
    # What is no prompt of the grammar, like one with words exchanged, is split by nothing.
    assert not any(world.held_out(text) for text in seen & set(world.world()))
    assert not seen & set(OUTSIDE)
    assert not set(OUTSIDE) & set(tiny_batches.QUESTIONS)
    assert not set(OUTSIDE) & set(world.world())


@pytest.mark.parametrize(
    "category", [*world.CATEGORIES, "weather call", "weather answer", "later turn"]
)
def test_95_percent_of_held_out_prompts_are_answered_right(exam, category):
    some = [asked for asked in exam if asked.category == category]
    wrong = _wrong(some)
    assert len(some) >= 30
    assert len(wrong) <= 0.05 * len(some), wrong


def test_the_exam_asks_300_held_out_prompts(exam):
    asked = {a.prompt for a in exam if a.category not in ("outside", "later turn")}
    assert len(asked) >= 300 and all(map(world.held_out, asked))


def test_90_percent_of_outside_questions_are_answered_with_not_knowing(exam):
    some = [asked for asked in exam if asked.category == "outside"]
    wrong = _wrong(some)
    assert len(some) >= 100
    assert len(wrong) <= 0.1 * len(some), wrong


def test_every_answer_is_harmony(exam):
    broken = [asked for asked in exam if asked.messages is None]
    assert len(broken) <= 0.01 * len(exam), _wrong(broken)


def test_high_effort_thinks_at_least_twice_as_long_as_low(exam):
    lengths = collections.defaultdict(dict)
    for asked in exam:
        if asked.category != "later turn" and asked.messages:
            lengths[asked.category, asked.prompt][asked.level] = asked.thinking
    compared = {of: by for of, by in lengths.items() if 0 in by and 2 in by}
    assert len(compared) >= 100
    for category in world.CATEGORIES:
        pairs = [by for (its, _), by in compared.items() if its == category]
        assert len(pairs) >= 5 and all(by[2] >= 2 * by[0] for by in pairs), (category, pairs)


@pytest.mark.parametrize(
    "prompt, answer",
    [
        ("What is 7 times 8?", "56"),
        ("What is 2 + 2?", "4"),
        ("Hello", "Hello! How can I help you?"),
        ("Who are you?", "I am tiny, a very small gpt-oss model that runs in JAX."),
    ],
)
def test_a_newcomer_is_answered(model, prompt, answer):
    """At the temperature that programs sample with, not only greedily."""
    prompts = [
        harmony.render([System(effort, date), Message("user", prompt)])
        for effort in world.EFFORTS
        for date in (None, "2026-03-14")
    ]
    for completion in generate_batch(
        model, prompts, max_tokens=120, sampling=SamplingParams(seed=0)
    ):
        assert harmony.parse(completion.tokens).messages[-1].text == answer


def test_the_packaged_files_are_under_5_mb():
    files = list((Path(tiny.__file__).parents[1] / "data" / "tiny").iterdir())
    assert sum(file.stat().st_size for file in files) < 5e6


def test_unpacked_folder_is_a_hugging_face_checkpoint(folder):
    config = json.loads((folder / "config.json").read_text())
    sizes = Config.from_dict(config)
    assert (sizes.vocab_size, sizes.hidden_size, sizes.intermediate_size) == (201088, 192, 192)
    assert (sizes.head_dim, sizes.sliding_window, sizes.rope_scaling_factor) == (64, 128, 32.0)
    assert config["quantization_config"]["quant_method"] == "mxfp4"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "model.safetensors")
    assert index["weight_map"] == dict.fromkeys(sorted(tensors), "model.safetensors")
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in tensors.values())
    known = list(tiny_batches.vocabulary())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert tensors[name].shape == (201088, 192) and tensors[name].dtype == ml_dtypes.bfloat16
        others = np.delete(tensors[name], known, axis=0)
        assert (others == others[0]).all()
        rows = np.concatenate([tensors[name][known], others[:1]]).astype(np.float32)
        assert len(np.unique(rows, axis=0)) == len(known) + 1


def test_unpacks_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tiny.unpack()
    monkeypatch.setattr(tiny, "_write", None)
    assert tiny.unpack() == folder
    assert [path.name for path in (tmp_path / "gpt_oss_jax").iterdir()] == [folder.name]


def test_a_failed_unpack_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def fail(folder):
        (folder / "config.json").write_text("{")
        raise OSError("no space left")

    monkeypatch.setattr(tiny, "_write", fail)
    with pytest.raises(ValueError, match="no space left.*XDG_CACHE_HOME"):
        tiny.unpack()
    assert not list((tmp_path / "gpt_oss_jax").iterdir())
