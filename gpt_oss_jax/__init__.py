"""OpenAI's gpt-oss in JAX: load a checkpoint, run it, speak harmony with it.

The public face is re-exported here; `help(gpt_oss_jax.load)` and its neighbours say the rest.
Importing changes no setting of JAX or of the process.
"""

__version__ = "0.1.0"
