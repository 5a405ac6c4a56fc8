"""From messages to token ids, through openai-harmony, which knows what the models were trained on.

It does not know conversations beyond the list it is given: who keeps one decides what is in it.
No text that goes in comes out as a special token; the only ones are those that harmony's structure
needs, and the `<|constrain|>` that a content type may begin with.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Sequence
from typing import Any

import openai_harmony

from gpt_oss_jax.harmony.encoding import encoding
from gpt_oss_jax.harmony.message import ROLES, Message

REASONING_EFFORTS = ("low", "medium", "high")
_NAME = re.compile(r"[\w.-]+", re.ASCII)
_WORD = re.compile(r"\S+", re.ASCII)
_DATE = re.compile(r"\d{4}-(0[1-9]|1[0-2])-(0[1-9]|[12]\d|3[01])", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Function:
    """A function that the model may call, as `functions.NAME`.

    Attributes:
      name: ASCII letters, digits, `_`, `-` and `.`.
      description: What it does, for the model.
      parameters: JSON schema of its arguments, an object; None if it takes none.
      call: Takes the arguments by name. What it returns goes to the model: a string as it is,
        anything else as JSON. What it raises does too, as an error.

    Raises:
      ValueError: The name is none, or the parameters are not JSON.
    """

    name: str
    description: str
    parameters: dict[str, Any] | None
    call: Callable[..., Any]

    def __post_init__(self):
        if not _NAME.fullmatch(self.name):
            raise ValueError(f"a function's name must be of A-Z a-z 0-9 _ - ., got {self.name!r}.")
        if not isinstance(self.parameters, dict | None):
            raise ValueError(
                f"parameters of {self.name} must be a JSON schema or None, got {self.parameters!r}."
            )
        try:
            json.dumps(self.parameters, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"parameters of {self.name} must be JSON: {error}.") from error


@dataclasses.dataclass(frozen=True)
class System:
    """The system message.

    Attributes:
      reasoning_effort: "low", "medium" or "high".
      date: Today for the model, YYYY-MM-DD; None leaves the line out.
      knowledge_cutoff: YYYY-MM; None leaves the line out.
      identity: The first line.

    Raises:
      ValueError: A value is none of these.
    """

    reasoning_effort: str = "medium"
    date: str | None = None
    knowledge_cutoff: str | None = "2024-06"
    identity: str = "You are ChatGPT, a large language model trained by OpenAI."

    def __post_init__(self):
        if self.reasoning_effort not in REASONING_EFFORTS:
            raise ValueError(
                f"reasoning_effort must be {', '.join(REASONING_EFFORTS[:-1])} or "
                f"{REASONING_EFFORTS[-1]}, got {self.reasoning_effort!r}."
            )
        if self.date is not None and not _DATE.fullmatch(self.date):
            raise ValueError(f"date must be a day as YYYY-MM-DD or None, got {self.date!r}.")


@dataclasses.dataclass(frozen=True)
class Developer:
    """The developer message: what users call a system prompt, and the functions."""

    instructions: str = ""
    functions: tuple[Function, ...] = ()


def render(
    messages: Sequence[System | Developer | Message],
    *,
    completion: bool = True,
    drop_analysis: bool = True,
) -> list[int]:
    """Token ids of a conversation.

    Args:
      messages: In order. Spans and ends of `Message` play no part.
      completion: Whether `<|start|>assistant` follows, for the model to go on from.
      drop_analysis: Whether analysis that harmony no longer wants is left out: if the last
        assistant message is final, that before the first final one.

    Raises:
      ValueError: A message's role is none of `ROLES`, a tool's has no name, or a word of the
        header (name, channel, recipient, content type) is empty or has a space in it.
    """
    conversation = openai_harmony.Conversation(messages=[_harmony(message) for message in messages])
    config = openai_harmony.RenderConversationConfig(auto_drop_analysis=drop_analysis)
    if completion:
        role = openai_harmony.Role.ASSISTANT
        return encoding().render_conversation_for_completion(conversation, role, config)
    return encoding().render_conversation(conversation, config)


def _harmony(message: System | Developer | Message) -> openai_harmony.Message:
    if isinstance(message, System):
        content = openai_harmony.SystemContent(
            model_identity=_unicode(message.identity),
            reasoning_effort=openai_harmony.ReasoningEffort(message.reasoning_effort.capitalize()),
            conversation_start_date=message.date,
            knowledge_cutoff=message.knowledge_cutoff and _unicode(message.knowledge_cutoff),
        )
        return openai_harmony.Message.from_role_and_content(openai_harmony.Role.SYSTEM, content)
    if isinstance(message, Developer):
        content = openai_harmony.DeveloperContent()
        if message.instructions:
            content = content.with_instructions(_unicode(message.instructions))
        if message.functions:
            content = content.with_function_tools([_description(f) for f in message.functions])
        return openai_harmony.Message.from_role_and_content(openai_harmony.Role.DEVELOPER, content)

    if message.role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {message.role!r}.")
    if message.role == "tool" and message.name is None:
        raise ValueError("a message of role tool needs the tool's name, got None.")
    author = openai_harmony.Author(role=message.role, name=_word("name", message.name))
    return openai_harmony.Message(
        author=author,
        content=[openai_harmony.TextContent(text=_unicode(message.text))],
        channel=_word("channel", message.channel),
        recipient=_word("recipient", message.recipient),
        content_type=_word("content_type", message.content_type),
    )


def _description(function: Function) -> openai_harmony.ToolDescription:
    # Through JSON, so that strings at any depth pass `_unicode`.
    parameters = json.loads(_unicode(json.dumps(function.parameters, ensure_ascii=False)))
    return openai_harmony.ToolDescription(
        name=function.name, description=_unicode(function.description), parameters=parameters
    )


def _word(field: str, value: str | None) -> str | None:
    """Headers are separated by spaces, so a field with one would be read as something else."""
    if value is not None and not _WORD.fullmatch(value):
        raise ValueError(f"{field} must be None or one word without spaces, got {value!r}.")
    return value and _unicode(value)


def _unicode(text: str) -> str:
    """The text with lone surrogates, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
