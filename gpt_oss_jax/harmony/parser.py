"""From token ids to messages, whatever the ids are.

`Parser` takes one id at a time, `parse` a whole sequence; neither raises for any ints. What a model
was trained to write becomes messages. What deviates is read as the nearest thing that makes sense,
and every such reading is a repair. The spans of messages and repairs tile the input: each id
belongs to exactly one of them, and a repair with an empty span marks where something is missing.
An ordinary token is never lost: it is in a message's header, in its text or in a repair's text.

It agrees with openai-harmony on whatever that renders and reads back, with one exception: a content
type without a recipient is a content type here and a recipient there.
"""

import bisect
import codecs
import dataclasses
import operator
import re
from collections.abc import Iterable

from gpt_oss_jax.harmony.encoding import (
    CALL,
    CHANNEL,
    CONSTRAIN,
    END,
    MESSAGE,
    RANKS,
    RETURN,
    START,
    VOCAB_SIZE,
    decode,
    ranks,
)
from gpt_oss_jax.harmony.message import (
    CHANNEL_MARK,
    CONSTRAIN_MARK,
    OTHER_MARK,
    ROLES,
    Message,
    guess_header,
    is_cut_header,
    read_header,
)

_ENDS = (END, RETURN, CALL)
_MARKS = {CHANNEL: CHANNEL_MARK, CONSTRAIN: CONSTRAIN_MARK}

# A header that is still open after this much is none: its tokens are text without a header, and
# streaming should not wait for the end of it. The renderer writes at most four words.
_MOST_WORDS = 5
_MOST_TOKENS = 256
_GAP = re.compile(r"(?<!\s)\s++\S", re.ASCII)  # Possessive: a run of blanks is read once.


@dataclasses.dataclass(frozen=True)
class Repair:
    """One place where the ids were not harmony, and what was made of it.

    Attributes:
      kind: `missing_start` or `missing_end` (read as if it were there), `missing_message` (a
        header without its `<|message|>`), `bad_header` (read as far as it makes sense),
        `cut_header` (the input ended in it) or `stray_token` (left out).
      note: The same for people, with the particulars.
      span: [start, end) into the ids, empty where something is missing between two tokens.
      text: The ordinary text within the span, none of which is in a message's text.
    """

    kind: str
    note: str
    span: tuple[int, int]
    text: str


@dataclasses.dataclass(frozen=True)
class Parsed:
    """Messages and repairs, each in the order of their spans."""

    messages: tuple[Message, ...]
    repairs: tuple[Repair, ...]


@dataclasses.dataclass(frozen=True)
class Delta:
    """New text of the message in progress; `header` is that message with no text or span yet."""

    header: Message
    text: str


def parse(tokens: Iterable[int], role: str | None = None) -> Parsed:
    """Reads a whole sequence.

    Args:
      tokens: Any ints: whole messages, or what follows `<|start|>assistant`.
      role: As for `Parser`.

    Raises:
      ValueError: The role is none of `ROLES`.
    """
    parser = Parser(role)
    for token in tokens:
        parser.push(token)
    parser.finish()
    return parser.parsed


class Parser:
    """Reads one id at a time.

    Args:
      role: Of the first message, when the prompt already said it: "assistant" for what a model
        writes after `<|start|>assistant`. None finds out: ids that begin with `<|start|>` are
        whole messages, others the continuation of `<|start|>assistant`.

    Raises:
      ValueError: The role is none of `ROLES`.
    """

    def __init__(self, role: str | None = None):
        if role is not None and role not in ROLES:
            raise ValueError(f"role must be None or one of {', '.join(ROLES)}, got {role!r}.")
        self.messages: list[Message] = []
        self.repairs: list[Repair] = []
        self._ranks = ranks()
        self._deltas: list[Delta] = []
        self._length = 0
        self._may_start = role is None
        self._open_header(0, 0, role or "assistant")

    @property
    def parsed(self) -> Parsed:
        """What is complete so far; everything, after `finish`."""
        return Parsed(tuple(self.messages), tuple(self.repairs))

    def push(self, token: int) -> list[Delta]:
        """Takes the next id and returns the text that it completed: seldom more than one piece."""
        self._deltas = []
        self._length += 1
        self._step(operator.index(token), self._length - 1)
        return self._deltas

    def finish(self) -> list[Delta]:
        """Closes what the end of the input cut off and returns the last text.

        More ids may follow; they are read as if a message had just ended.
        """
        self._deltas = []
        while self._step == self._header and self._start < self._length:
            self._end_header(at_end=True)
        if self._step == self._content:
            self._close(self._length, None)
        self._step = self._between
        return self._deltas

    # Three states, of which `_step` is the current one. Each takes an id and its index.

    def _between(self, token: int, index: int) -> None:
        if token == START:
            self._open_header(index, index + 1, None)
        elif 0 <= token < RANKS or token in (CHANNEL, CONSTRAIN, MESSAGE):
            self._repair("missing_start", "a message without <|start|>", index, index)
            self._open_header(index, index, None if token < RANKS else "assistant")
            self._header(token, index)
        else:
            self._stray(index, index, token)

    def _header(self, token: int, index: int) -> None:
        if 0 <= token < RANKS or token in _MARKS:
            self._extend_header(token)
        elif token == MESSAGE:
            self._read_header(index + 1)
        elif index == self._start and token == START and self._may_start:
            self._open_header(index, index + 1, None)
        elif index == self._start and token not in _ENDS:
            # The prompt gave the beginning of this header and nothing has come of the rest yet.
            self._stray(index, index, token)
            self._open_header(index + 1, index + 1, None if token == START else self._role)
        elif token == START or token in _ENDS:
            self._end_header(at_end=False)
            self._step(token, index)
        else:
            self._extend_header(token)

    def _content(self, token: int, index: int) -> None:
        if 0 <= token < RANKS:
            self._filled = True
            self._emit(self._decoder.decode(self._ranks[token]))
        elif token in _ENDS:
            self._close(index + 1, token)
        elif token in (START, CHANNEL):
            if self._start < index:
                self._close(index, None)
                self._repair("missing_end", "a message without its end", index, index)
            if token == START:
                self._open_header(index, index + 1, None)
            else:
                self._open_header(index, index, "assistant")
                self._header(token, index)
        elif self._filled:
            self._close(index, None)
            self._stray(index, index, token)
            self._open_content(self._message, index + 1)
        else:
            # With no text yet there is no message to cut: the header goes into the repair.
            self._stray(self._start, index, token)
            self._open_content(self._message, index + 1)

    # What the states do.

    def _open_header(self, start: int, first: int, role: str | None) -> None:
        """A message begins at `start`, its header's text at `first`; `role` if it is known."""
        self._start, self._first, self._role = start, first, role
        self._tokens: list[int] = []
        self._head = ""
        self._ends: list[int] = []
        self._step = self._header

    def _extend_header(self, token: int) -> None:
        self._tokens.append(token)
        if 0 <= token < RANKS:
            self._head += self._ranks[token].decode("latin-1")
        else:
            self._head += _MARKS.get(token, OTHER_MARK)
        self._ends.append(len(self._head))
        if len(self._tokens) > _MOST_TOKENS or len(_GAP.findall(self._head)) >= _MOST_WORDS:
            self._end_header(at_end=False)

    def _read_header(self, stop: int) -> None:
        """`<|message|>` came: content begins at `stop`."""
        header, notes = read_header(self._head, self._role)
        if notes:
            self._repair("bad_header", "; ".join(notes), self._start, stop)
        self._open_content(header, stop if notes else self._start)

    def _end_header(self, at_end: bool) -> None:
        """No `<|message|>` came: what cannot be of the header is text."""
        is_first = self._first > self._start
        if at_end and is_cut_header(self._head, is_first):
            self._repair("cut_header", "the input ends in a header", self._start, self._length)
            self._step = self._between
            return
        header, length = guess_header(self._head, self._role, is_first)
        kept = bisect.bisect_right(self._ends, length)
        rest, self._tokens = self._tokens[kept:], self._tokens[:kept]
        stop = self._first + kept
        self._repair("missing_message", "a header without <|message|>", self._start, stop)
        self._open_content(header, stop)
        for index, token in enumerate(rest, stop):
            self._step(token, index)

    def _open_content(self, header: Message, start: int) -> None:
        self._message, self._start = header, start
        self._filled = False
        self._parts: list[str] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._step = self._content

    def _emit(self, text: str) -> None:
        if text:
            self._parts.append(text)
            self._deltas.append(Delta(self._message, text))

    def _close(self, stop: int, end: int | None) -> None:
        if self._start < stop:
            self._emit(self._decoder.decode(b"", final=True))
            self.messages.append(
                dataclasses.replace(
                    self._message, text="".join(self._parts), span=(self._start, stop), end=end
                )
            )
        self._tokens = []
        self._step = self._between

    def _stray(self, start: int, index: int, token: int) -> None:
        name = decode([token]) if token in range(RANKS, VOCAB_SIZE) else f"id {token}"
        self._repair("stray_token", f"{name} where it has no meaning", start, index + 1)

    def _repair(self, kind: str, note: str, start: int, stop: int) -> None:
        """Only a header's text can be inside, so the text is that of the tokens held for it."""
        text = ""
        if start < stop:
            text = decode(token for token in self._tokens if 0 <= token < RANKS)
            self._tokens = []
        self.repairs.append(Repair(kind, note, (start, stop), text))
