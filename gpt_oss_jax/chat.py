"""A conversation with a model: generate, parse, run the functions it calls, go on, answer.

It knows neither how tokens are generated nor how harmony is written, and it prints nothing.

    chat = Chat(model, reasoning_effort="low")
    reply = chat("What is 2 + 2?")
    reply.final
"""

import dataclasses
import json
from collections.abc import Generator, Iterator, Sequence

from gpt_oss_jax.generate import Step, generate
from gpt_oss_jax.harmony import (
    Delta,
    Developer,
    Function,
    Message,
    Parser,
    Repair,
    System,
    render,
)
from gpt_oss_jax.model import Transformer
from gpt_oss_jax.sampling import SamplingParams

_CHANNELS = ("analysis", "commentary", "final", "call")


@dataclasses.dataclass(frozen=True)
class ToolCall:
    """A function that the model called.

    Attributes:
      name: As the model wrote it, without `functions.`.
      arguments: The text that the model wrote, JSON if it is well.
      result: The text that the model got; begins with `Error: ` if the call failed.
    """

    name: str
    arguments: str
    result: str


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came of one question.

    Attributes:
      final: The answer.
      analysis: The reasoning, which is not meant for end users.
      commentary: What the model told the user on the way, between calls.
      tool_calls: The calls that were run, in order.
      tokens: All generated ids, round after round.
      repairs: Where the ids were not harmony, with spans into `tokens`. The kind `wrong_role` is
        a message that the model wrote in somebody else's name; it is left out.
      stop_reason: "stop"; "length" if max_tokens or the context cut it short; "tool_rounds" if
        the model would not stop calling. A call that was not run is not in the history.
    """

    final: str
    analysis: str
    commentary: str
    tool_calls: tuple[ToolCall, ...]
    tokens: tuple[int, ...]
    repairs: tuple[Repair, ...]
    stop_reason: str


class Chat:
    """A conversation, kept from question to question.

    The history changes only when a reply is complete, question and all: after an exception, after
    Ctrl-C (`KeyboardInterrupt`) or when a stream is closed early, the conversation is what it was
    before the question. Functions that ran have run. Analysis stays in `messages`; what of it the
    model still sees is harmony's own rule.

    Args:
      model: The model.
      reasoning_effort: "low", "medium" or "high".
      developer_message: Instructions, what others call a system prompt.
      tools: Functions that the model may call. What one raises the model gets to read.
      sampling: How tokens are drawn; None for the defaults.
      max_tokens: Most tokens of one reply, all its rounds together; None is as many as fit.
      context: Most tokens that conversation and reply have together; None is the model's maximum.
      max_tool_rounds: Most times that one reply may go on after calls.
      date: Today for the model, YYYY-MM-DD; None tells it nothing, so that replies do not depend
        on the day.
      knowledge_cutoff: YYYY-MM, or None.

    Raises:
      ValueError: The effort or the date is none, a number is out of range, or two tools have one
        name.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        reasoning_effort: str = "medium",
        developer_message: str = "",
        tools: Sequence[Function] = (),
        sampling: SamplingParams | None = None,
        max_tokens: int | None = None,
        context: int | None = None,
        max_tool_rounds: int = 16,
        date: str | None = None,
        knowledge_cutoff: str | None = "2024-06",
    ):
        longest = model.config.max_context
        for name, value, least, most in (
            ("max_tokens", max_tokens, 1, longest),
            ("context", context, 1, longest),
            ("max_tool_rounds", max_tool_rounds, 0, None),
        ):
            optional = name != "max_tool_rounds" and value is None
            whole = isinstance(value, int) and value >= least and (most is None or value <= most)
            if not (optional or whole):
                up_to = "" if most is None else f" and at most {most}"
                raise ValueError(f"{name} must be at least {least}{up_to}, got {value!r}.")
        self.model = model
        self.messages: tuple[Message, ...] = ()
        self.reply: Reply | None = None
        self._functions = {tool.name: tool for tool in tools}
        if len(self._functions) < len(tools):
            names = ", ".join(tool.name for tool in tools)
            raise ValueError(f"tools must have different names, got {names}.")
        system = System(reasoning_effort, date=date, knowledge_cutoff=knowledge_cutoff)
        self._preamble = preamble(system, developer_message, tools)
        self._sampling = sampling
        self._max_tokens = max_tokens
        self._context = context
        self._max_tool_rounds = max_tool_rounds

    def __call__(self, text: str) -> Reply:
        """Asks and waits for the reply.

        Raises:
          ValueError: The conversation does not fit the context; it stays as it was.
        """
        for _ in self.stream(text):
            pass
        return self.reply

    def stream(self, text: str) -> Iterator[tuple[str, str]]:
        """Asks and yields the reply as it comes; `reply` has all of it afterwards.

        Yields:
          Pairs of channel and text, which is never half a character. The channel is "analysis",
          "commentary", "final", or "call" for arguments on their way to a function. The texts of
          one channel, joined, are what the reply has; messages on one channel are two newlines
          apart.

        Raises:
          ValueError: As `__call__`, when the first piece is asked for.
        """
        if not isinstance(text, str):
            raise ValueError(f"a question must be a string, got {text!r}.")
        turn = _Turn([Message("user", text)])
        for rounds in range(self._max_tool_rounds + 1):
            prompt = render([*self._preamble, *self.messages, *turn.messages])
            limit = self._limit(len(prompt), len(turn.tokens))
            if limit < 1:
                turn.stop_reason = "length"
                break
            steps = generate(self.model, prompt, max_tokens=limit, sampling=self._sampling)
            said = yield from turn.listen(steps)
            calls = bool(said) and _is_call(said[-1]) and said[-1].end is not None
            goes_on = calls and rounds < self._max_tool_rounds
            for message in said:
                if not _is_call(message):
                    turn.messages.append(message)
                elif goes_on and message.end is not None:
                    turn.messages += [message, self._answer(message, turn)]
            if not goes_on:
                turn.stop_reason = "tool_rounds" if calls else turn.stop_reason
                break
        self.messages += tuple(turn.messages)
        self.reply = turn.reply()

    def _limit(self, prompt: int, spent: int) -> int:
        """Tokens that the next round may generate."""
        context = self.model.config.max_context if self._context is None else self._context
        if prompt >= context and not spent:
            raise ValueError(
                f"the conversation has {prompt:,} tokens and the context holds {context:,}: "
                "start a new conversation or raise context."
            )
        room = context - prompt
        return room if self._max_tokens is None else min(room, self._max_tokens - spent)

    def _answer(self, call: Message, turn: "_Turn") -> Message:
        """Runs a call; the message with its result, or with what went wrong."""
        name = call.recipient.removeprefix("functions.")
        try:
            result = self._run(name, call.text)
        except Exception as error:
            result = f"Error: {type(error).__name__}: {error}"
        turn.calls.append(ToolCall(name, call.text, result))
        return Message("tool", result, call.recipient, call.channel, "assistant")

    def _run(self, name: str, text: str) -> str:
        if name not in self._functions:
            known = ", ".join(self._functions) or "none"
            raise ValueError(f"there is no function {name}; the functions are: {known}.")
        arguments = json.loads(text) if text.strip() else {}
        if not isinstance(arguments, dict):
            raise ValueError(f"wanted the arguments as a JSON object, got {text}.")
        result = self._functions[name].call(**arguments)
        return result if isinstance(result, str) else json.dumps(result, ensure_ascii=False)


def preamble(
    system: System, developer_message: str = "", tools: Sequence[Function] = ()
) -> list[System | Developer]:
    """What a conversation begins with."""
    if not developer_message and not tools:
        return [system]
    return [system, Developer(developer_message, tuple(tools))]


class _Turn:
    """What one question has brought so far; becomes history when it is complete."""

    def __init__(self, messages: list[Message]):
        self.messages = messages
        self.texts: dict[str, list[str]] = {name: [] for name in _CHANNELS}
        self.headers: dict[str, Message] = {}
        self.tokens: list[int] = []
        self.repairs: list[Repair] = []
        self.calls: list[ToolCall] = []
        self.stop_reason = "stop"

    def listen(self, steps: Iterator[Step]) -> Generator[tuple[str, str], None, list[Message]]:
        """Yields the pieces of one round and returns the model's messages."""
        parser, start = Parser("assistant"), len(self.tokens)
        for step in steps:
            self.tokens.append(step.token)
            self.stop_reason = step.stop_reason
            yield from self._pieces(parser.push(step.token))
        yield from self._pieces(parser.finish())

        said = [message for message in parser.messages if message.role == "assistant"]
        wrong = [
            Repair("wrong_role", f"the model wrote as {message.role}", message.span, message.text)
            for message in parser.messages
            if message.role != "assistant"
        ]
        for repair in sorted([*parser.repairs, *wrong], key=lambda repair: repair.span):
            span = (start + repair.span[0], start + repair.span[1])
            self.repairs.append(dataclasses.replace(repair, span=span))
        return said

    def _pieces(self, deltas: list[Delta]) -> Iterator[tuple[str, str]]:
        for delta in deltas:
            header = delta.header
            if header.role != "assistant":
                continue
            channel = "call" if _is_call(header) else header.channel
            if channel not in self.texts:
                channel = "final"
            # A message that a stray token cut in two goes on under the same header.
            new = self.headers.get(channel, header) is not header
            self.headers[channel] = header
            text = f"\n\n{delta.text}" if new else delta.text
            self.texts[channel].append(text)
            yield channel, text

    def reply(self) -> Reply:
        """All of it."""
        return Reply(
            final="".join(self.texts["final"]),
            analysis="".join(self.texts["analysis"]),
            commentary="".join(self.texts["commentary"]),
            tool_calls=tuple(self.calls),
            tokens=tuple(self.tokens),
            repairs=tuple(self.repairs),
            stop_reason=self.stop_reason,
        )


def _is_call(message: Message) -> bool:
    return message.recipient not in (None, "all", "user")
