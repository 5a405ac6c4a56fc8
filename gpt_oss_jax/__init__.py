"""OpenAI's gpt-oss in JAX: load a checkpoint, run it, speak harmony with it.

The public face is re-exported here; `help(gpt_oss_jax.load)` and its neighbours say the rest.
Importing changes no setting of JAX or of the process.
"""

from gpt_oss_jax.chat import Chat as Chat
from gpt_oss_jax.checkpoint import load as load, save as save
from gpt_oss_jax.distributed import distributed_init as distributed_init
from gpt_oss_jax.generate import (
    generate as generate,
    generate_batch as generate_batch,
    score as score,
)
from gpt_oss_jax.harmony import Function as Function
from gpt_oss_jax.sampling import SamplingParams as SamplingParams
from gpt_oss_jax.sharding import make_mesh as make_mesh

__version__ = "0.1.0"
