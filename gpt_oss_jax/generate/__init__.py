"""Generation: prompts of token ids in, sampled tokens and their log-probabilities out.

It knows models and sampling, and neither text nor tokenizers: ids come in, ids go out.

All of a prompt but its last token goes into the cache in chunks of fixed size. From there a loop on
the device feeds each row its newest token and draws the next one, up to 16 a call; the host reads
the tokens of one call while the next runs. What is compiled depends on the structure of the model,
on which sampling options are on and on sizes rounded up to powers of two; never on weights, values
of options, seeds, stop tokens or lengths of prompts.
"""

from gpt_oss_jax.generate.api import (
    STOP_TOKENS as STOP_TOKENS,
    Completion as Completion,
    Step as Step,
    generate as generate,
    generate_batch as generate_batch,
    score as score,
)
