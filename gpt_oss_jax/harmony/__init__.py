"""Harmony, the format that gpt-oss speaks: messages to token ids and back.

Rendering goes through openai-harmony, which only this package knows; parsing is our own, because a
model may write anything and a reply must never be lost to it.
"""

from gpt_oss_jax.harmony.encoding import (
    CALL as CALL,
    CHANNEL as CHANNEL,
    CONSTRAIN as CONSTRAIN,
    END as END,
    ENDOFTEXT as ENDOFTEXT,
    MESSAGE as MESSAGE,
    RETURN as RETURN,
    START as START,
    STARTOFTEXT as STARTOFTEXT,
    VOCAB_SIZE as VOCAB_SIZE,
    decode as decode,
    encode_text as encode_text,
    read_vocabulary as read_vocabulary,
    token_bytes as token_bytes,
    vocabulary_path as vocabulary_path,
)
from gpt_oss_jax.harmony.message import ROLES as ROLES, Message as Message
from gpt_oss_jax.harmony.parser import (
    Delta as Delta,
    Parsed as Parsed,
    Parser as Parser,
    Repair as Repair,
    parse as parse,
)
from gpt_oss_jax.harmony.render import (
    REASONING_EFFORTS as REASONING_EFFORTS,
    Developer as Developer,
    Function as Function,
    System as System,
    render as render,
)
