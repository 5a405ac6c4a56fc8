"""`gpt-oss-jax chat`: a harmony conversation in the terminal, or one question and its answer."""

import argparse
import contextlib
import datetime
import sys

from gpt_oss_jax import distributed
from gpt_oss_jax.chat import Chat, preamble
from gpt_oss_jax.cli.processes import add_process_options
from gpt_oss_jax.cli.terminal import (
    DIM,
    add_model_options,
    add_sampling_options,
    announced,
    load_model,
    positive,
    remark,
    sampling,
    waiting,
    write,
)
from gpt_oss_jax.directories import user_state
from gpt_oss_jax.harmony import REASONING_EFFORTS, Message, System, decode, render

_HISTORY_LINES = 1000


def add(commands) -> None:
    """Declare `chat MODEL ["PROMPT"]`."""
    parser = commands.add_parser("chat", help="talk to a model, or ask it one thing")
    add_model_options(parser)
    add_process_options(parser)
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="ask this and leave")
    parser.add_argument(
        "-r", "--reasoning-effort", choices=REASONING_EFFORTS, default="medium", metavar="EFFORT",
        help=f"{', '.join(REASONING_EFFORTS)}; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--show-reasoning",
        action="store_true",
        help="print what the model thinks on the way, too; it is not meant for end users",
    )
    parser.add_argument(
        "--developer-message", default="", metavar="TEXT", help="instructions to the model"
    )
    parser.add_argument(
        "--date",
        default=datetime.date.today().isoformat(),
        metavar="YYYY-MM-DD",
        help="what the model is told; default today",
    )
    parser.add_argument(
        "-c", "--context", type=positive, default=8192, metavar="N",
        help="most tokens of conversation and reply together; default %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", type=positive, metavar="N", help="most tokens of a reply; default what fits"
    )
    parser.add_argument(
        "--raw", action="store_true", help="print each reply's tokens as they are, when it is whole"
    )
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Answer the prompt, or each line that is typed until the end of input."""
    if args.prompt is not None and not args.prompt.strip():
        raise ValueError("PROMPT must not be empty; leave it out for a conversation.")
    # Before the model is loaded, which takes a while: whatever may be wrong with the rest.
    params = sampling(args)
    system = System(args.reasoning_effort, args.date)
    # What will be typed is not known, and is mostly short.
    asked = [*preamble(system, args.developer_message), Message("user", args.prompt or "")]
    prompt = len(render(asked))
    first = prompt, prompt + (args.max_tokens or args.context), params
    model = load_model(args, context=args.context, first=first)
    if args.context > model.config.max_context:
        remark(f"--context is cut to the model's {model.config.max_context:,} tokens")
    chat = Chat(
        model,
        reasoning_effort=args.reasoning_effort,
        developer_message=args.developer_message,
        sampling=params,
        max_tokens=args.max_tokens,
        context=min(args.context, model.config.max_context),
        date=args.date,
    )
    if args.prompt is not None:
        return 0 if answer(chat, args.prompt, args) else 1
    return 0 if converse(chat, args) else 1


def answer(chat: Chat, text: str, args: argparse.Namespace) -> bool:
    """Ask, print the reply as it comes, and say on stderr why there is no answer if there is none.

    Returns:
      Whether there was an answer.
    """
    if args.raw:
        with waiting():
            reply = chat(text)
        write(decode(reply.tokens) + "\n")
    else:
        _print_pieces(chat, text, args.show_reasoning)
        reply = chat.reply
    if reply.stop_reason == "length":
        hidden = ", all of it reasoning (--show-reasoning prints it)" if reply.analysis else ""
        remark(
            f"cut short after {len(reply.tokens)} tokens{'' if reply.final else hidden}; "
            "raise --max-tokens or --context, or lower -r"
        )
    elif not reply.final:
        remark(f"no answer came in {len(reply.tokens)} tokens")
    return bool(reply.final)


def _print_pieces(chat: Chat, text: str, show_reasoning: bool) -> None:
    last = None
    for channel, piece in announced(chat.stream(text)):
        if channel in ("analysis", "call") and not show_reasoning:
            continue
        if last is not None and channel != last:
            write("\n\n")
        write(piece, DIM if channel in ("analysis", "call") else "")
        last = channel
    if last is not None:
        write("\n")


def converse(chat: Chat, args: argparse.Namespace) -> bool:
    """Answer line after line. Ctrl-C drops the line or the reply, never the conversation.

    Of several processes one cannot drop what the others go on with: there it ends all.

    Returns:
      Whether there is no script that missed an answer: a person at the terminal has seen it.
    """
    by_hand, alone = distributed.broadcast(sys.stdin.isatty()), distributed.count() == 1
    if by_hand:
        if not distributed.index():
            _remember_lines()
        remark("Ctrl-C stops a reply, Ctrl-D leaves" if alone else "Ctrl-D leaves")
    well = True
    while True:
        try:
            try:
                text = _next_line(by_hand)
                if text.strip():
                    well &= answer(chat, text, args)
            except EOFError:
                if by_hand:
                    write("\n")
                return well or by_hand
            except KeyboardInterrupt:
                if not (by_hand and alone):
                    raise
                write("\n")
                remark("stopped; the conversation goes on without that")
            except ValueError as error:
                well = False
                remark(str(error))
        except KeyboardInterrupt:
            # Again, while that was said.
            if not (by_hand and alone):
                raise


def _next_line(by_hand: bool) -> str:
    """What is typed next, at process 0.

    Raises:
      EOFError: At the end of what is typed.
    """
    line = None
    if not distributed.index():
        with contextlib.suppress(EOFError):
            line = _typed(by_hand)
    line = distributed.broadcast(line)
    if line is None:
        raise EOFError
    return line


def _typed(by_hand: bool) -> str:
    """The prompt is no part of answers that go elsewhere."""
    if by_hand and not sys.stdout.isatty():
        sys.stderr.write("> ")
        sys.stderr.flush()
        return input()
    return input("> " if by_hand else "")


def _remember_lines() -> None:
    """Line editing, with what was typed in earlier conversations."""
    import atexit

    try:
        import readline
    except ImportError:
        return
    readline.set_history_length(_HISTORY_LINES)
    try:
        history = user_state() / "history"
        history.parent.mkdir(parents=True, exist_ok=True)
        history.touch(mode=0o600)
        readline.read_history_file(history)
    except OSError as error:
        remark(f"what you type is not kept for the next conversation: {error}")
        return
    atexit.register(readline.write_history_file, history)
