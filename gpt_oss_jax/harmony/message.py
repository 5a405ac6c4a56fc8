"""A message, and how its header reads.

A header is given as its tokens' bytes, one character a byte (latin-1), with a character beyond
latin-1 for each special token in it: so it can be matched exactly, whatever bytes it holds, and
text that merely looks like a special token is text. It does not know tokens or where they were.
"""

import dataclasses
import re

ROLES = ("system", "developer", "user", "assistant", "tool")

CHANNEL_MARK, CONSTRAIN_MARK, OTHER_MARK = "\u0100", "\u0101", "\u0102"
_MARKS = f"{CHANNEL_MARK}-{OTHER_MARK}"
_MEANING = {
    "": "",
    CHANNEL_MARK: "the channel ",
    CONSTRAIN_MARK: "the content type ",
    OTHER_MARK: "a special token and ",
}
_WORD = re.compile(rf"([{_MARKS}]?)\s*([^\s{_MARKS}]*)", re.ASCII)

# What is of a header when text may follow it: less than what a header may hold.
_OPEN_HEADER = re.compile(
    rf"""(?:\s*(?P<role>assistant|(?:system|developer|user|tool)\b))?
    (?:\s*to=(?P<recipient>[\w.-]+))?
    (?:\s*{CHANNEL_MARK}(?:\s*(?P<channel>analysis|commentary|final))?)?
    (?:\s*to=(?P<late_recipient>[\w.-]+))?
    (?:\s*{CONSTRAIN_MARK}(?:\s*(?P<type>\w+))?)?""",
    re.ASCII | re.VERBOSE,
)
# A header up to any point of it.
_W = rf"[^\s{_MARKS}]*"
_CUT_HEADER = re.compile(
    rf"""(?P<role>\s*(?!to\b){_W}) (?:\s*to(?:={_W})?)?
    (?:\s*{CHANNEL_MARK}\s*{_W} (?:\s+to(?:={_W})?)?)?
    (?:\s+{_W} | \s*{CONSTRAIN_MARK}\s*{_W})?""",
    re.ASCII | re.VERBOSE,
)


@dataclasses.dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
      role: One of `ROLES`.
      text: The content.
      name: Of the author; of a tool its full name, such as `functions.get_weather`.
      channel: `analysis`, `commentary`, `final` or whatever the header said.
      recipient: Whom it is addressed to, None for everybody.
      content_type: Such as `<|constrain|>json` or `code`.
      span: Where it was parsed from, [start, end) into the ids.
      end: The id that closed it; None if it was cut off, or not parsed at all.
    """

    role: str
    text: str = ""
    name: str | None = None
    channel: str | None = None
    recipient: str | None = None
    content_type: str | None = None
    span: tuple[int, int] = (0, 0)
    end: int | None = None


def read_header(head: str, role: str | None) -> tuple[Message, list[str]]:
    """Reads a header that `<|message|>` ended.

    Args:
      head: The header's characters, as the module describes.
      role: The role if the header does not say it, because the prompt did.

    Returns:
      A message without text, and what had to be guessed or left out: a note each, in words.
    """
    words = [(mark, _text(word)) for mark, word in _WORD.findall(head) if mark or word]
    name, notes = None, []
    if role is None and words and not words[0][0] and not words[0][1].startswith("to="):
        role, name = _author(words.pop(0)[1])
    elif role is None:
        role = "assistant"
        notes.append("no role, read as assistant")
    elif words and not words[0][0] and words[0][1].startswith(":"):
        name = words.pop(0)[1][1:] or None

    channel = recipient = content_type = None
    bare: list[str] = []
    for mark, word in words:
        if mark == CHANNEL_MARK and word and channel is None:
            channel = word
        elif mark == CONSTRAIN_MARK and content_type is None:
            content_type = f"<|constrain|>{word}"
            before_type = len(bare)
        elif not mark and word.startswith("to=") and word != "to=" and recipient is None:
            recipient = word.removeprefix("to=")
        elif not mark and not word.startswith("to="):
            bare.append(word)
        else:
            notes.append(f"left out {_MEANING[mark]}{word!r}")

    # The renderer writes `to=` before every recipient, so a word without it is a content type,
    # unless a content type follows or it looks like the name of a tool.
    followed = len(bare) > 1 if content_type is None else before_type > 0
    if recipient is None and bare and (followed or "." in bare[0]):
        recipient = bare.pop(0)
        notes.append(f"{recipient!r} read as the recipient, without to=")
    if bare and content_type is None:
        content_type = bare.pop(0)
    if bare:
        notes.append(f"left out {' '.join(bare)!r}")

    if role is None and (recipient is not None or "." in name):
        role = "tool"
    elif role is None:
        notes.append(f"unknown role {name!r}, read as assistant")
        role, name = "assistant", None
    return Message(role, "", name, channel, recipient, content_type), notes


def guess_header(head: str, role: str | None, is_first: bool) -> tuple[Message, int]:
    """Reads as much of a header as there is before text that began without `<|message|>`.

    Args:
      head: As for `read_header`.
      role: As for `read_header`.
      is_first: Whether the header came right after `<|start|>`; if not, only `assistant` is taken
        for a role, since "user" may well begin a sentence.

    Returns:
      A message without text, on the final channel if it names no channel and no recipient, and
      the number of characters of `head` that it took.
    """
    match = _OPEN_HEADER.match(head)
    if match["role"] not in (None, "assistant") and not is_first:
        match = _OPEN_HEADER.match("")
    role = role or match["role"] or "assistant"
    recipient = match["recipient"] or match["late_recipient"]
    channel = match["channel"]
    if role == "assistant" and not recipient:
        channel = channel or "final"
    has_type = CONSTRAIN_MARK in match[0]
    content_type = f"<|constrain|>{match['type'] or ''}" if has_type else None
    name = "tool" if role == "tool" else None
    return Message(role, "", name, channel, recipient, content_type), match.end()


def is_cut_header(head: str, is_first: bool) -> bool:
    """Whether this is a header up to somewhere, rather than text without one.

    Args:
      head: As for `read_header`.
      is_first: As for `guess_header`; if not, the header must show in its first word or token.
    """
    # Runs of blanks would be split in every possible way.
    head = re.sub(r"\s+", " ", head, flags=re.ASCII)
    match = _CUT_HEADER.fullmatch(head)
    if match is None or is_first:
        return match is not None
    return match["role"].strip() in ("", "assistant") and head.strip() != ""


def _author(word: str) -> tuple[str | None, str | None]:
    """Role and name; no role if the word is none, which is how tools are written."""
    role, _, name = word.partition(":")
    if role == "tool":
        return role, name or "tool"
    return (role, name or None) if role in ROLES else (None, word)


def _text(word: str) -> str:
    return word.encode("latin-1").decode("utf-8", "replace")
