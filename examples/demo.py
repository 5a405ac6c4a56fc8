"""The whole way in a minute: unpack the small model, convert it to Orbax, load that, talk to it.

Run it as `make demo`, or `python examples/demo.py` where gpt-oss-jax is installed. Every word of
the model comes from the model, which is trained on little more than what is asked here; the weather
is made up by `get_weather` below.
"""

import shutil
import sys
import time
from pathlib import Path

from gpt_oss_jax import Chat, Function, SamplingParams, compile_cache, load
from gpt_oss_jax.checkpoint import convert, resolve

TARGET = Path("demo") / "tiny-orbax"
# What is asked, and a part of the answer.
QUESTIONS = {
    "Hello!": "How can I help you?",
    "What is 7 times 8?": "56",
    "What is the weather in Paris?": "in Paris, 11 degrees",
    "What is the capital of France?": "Paris",
    "Who wrote Don Quixote?": "don't know",
}


def get_weather(location: str) -> dict:
    """Some weather for any place, always the same for one place."""
    luck = sum(location.encode())
    return {"temperature": luck % 25, "condition": ("sunny", "cloudy", "rainy")[luck % 3]}


WEATHER = Function(
    name="get_weather",
    description="Gets the current weather in a city.",
    parameters={
        "type": "object",
        "properties": {"location": {"type": "string", "description": "The name of the city."}},
        "required": ["location"],
    },
    call=get_weather,
)


def timed(what, function, *args, **kwargs):
    start = time.perf_counter()
    result = function(*args, **kwargs)
    print(f"{what:<60} {time.perf_counter() - start:5.1f} s", flush=True)
    return result


def main() -> None:
    compile_cache.enable()
    shutil.rmtree(TARGET, ignore_errors=True)
    folder = timed("Unpacked the small model, a Hugging Face folder", resolve, "tiny")
    timed(f"Converted it to Orbax, {TARGET}", convert, folder, TARGET)
    model = timed("Loaded that", load, TARGET)

    chat = Chat(
        model,
        reasoning_effort="medium",
        tools=(WEATHER,),
        sampling=SamplingParams(temperature=0.0),
        max_tokens=200,
    )
    tokens, wrong, start = 0, [], time.perf_counter()
    for question, answer in QUESTIONS.items():
        reply = chat(question)
        tokens += len(reply.tokens)
        wrong += [] if answer in reply.final else [question]
        print(f"\nyou        {question}")
        print(f"reasoning  {reply.analysis}")
        for call in reply.tool_calls:
            print(f"call       {call.name}({call.arguments}) -> {call.result}")
        print(f"tiny       {reply.final}", flush=True)
    print(f"\n{tokens} tokens in {time.perf_counter() - start:.1f} s, compiling included.")

    program = Path(sys.executable).with_name("gpt-oss-jax")
    if program.is_relative_to(Path.cwd()):
        program = program.relative_to(Path.cwd())
    print(f"""
Type next:
  {program} chat tiny                            talk to it yourself
  {program} chat tiny "What is 7 times 8?" -r high --show-reasoning
  {program} --help                               what else there is
With a downloaded gpt-oss-20b folder in place of tiny, the same commands run the real model.""")
    if wrong:
        sys.exit(f"The answer should have been another, so something is wrong here: {wrong}")


if __name__ == "__main__":
    main()
