"""`gpt-oss-jax generate`: what the model writes after a text, as it comes, without harmony."""

import argparse
import codecs

from gpt_oss_jax.cli.processes import add_process_options
from gpt_oss_jax.cli.terminal import (
    add_model_options,
    add_sampling_options,
    announced,
    load_model,
    positive,
    remark,
    sampling,
    write,
)
from gpt_oss_jax.generate import STOP_TOKENS, generate
from gpt_oss_jax.harmony import encode_text, token_bytes


def add(commands) -> None:
    """Declare `generate MODEL "TEXT"`."""
    parser = commands.add_parser("generate", help="continue a text, without harmony")
    add_model_options(parser)
    add_process_options(parser)
    parser.add_argument(
        "text", metavar="TEXT", help="what to continue; special tokens are plain text"
    )
    parser.add_argument(
        "--max-tokens", type=positive, default=256, metavar="N", help="default %(default)s"
    )
    add_sampling_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the continuation as it comes."""
    if not args.text:
        raise ValueError("TEXT must not be empty: there is nothing to continue.")
    remark("these models expect harmony, which `gpt-oss-jax chat` speaks; this is raw text")
    # Checked before the model is loaded, which takes a while.
    params, ids = sampling(args), encode_text(args.text)
    whole = len(ids) + args.max_tokens
    model = load_model(args, context=whole, first=(len(ids), whole, params))
    steps = generate(model, ids, max_tokens=args.max_tokens, sampling=params)
    # A character may be spread over several tokens.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for step in announced(steps):
        if step.token not in STOP_TOKENS:
            write(decoder.decode(token_bytes(step.token)))
    write(decoder.decode(b"", final=True) + "\n")
    return 0
