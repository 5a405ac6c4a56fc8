"""The choice of experts on Hopper, in one launch: a sort of XLA's takes four times as long."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.kernels.launch import launch
from gpt_oss_jax.kernels.routing.ptx import Choice

MAX_CHOICES = 32  # A lane has one.


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def choose(logits_ME: jax.Array, choices: int) -> tuple[jax.Array, jax.Array]:
    """See `api.choose`; compiles for Hopper on any machine."""
    M, E = logits_ME.shape
    outs = tuple(jax.ShapeDtypeStruct((M, choices), dtype) for dtype in (jnp.int32, jnp.float32))
    return _launch(Choice(M, E, choices), outs, logits_ME)


@choose.defjvp
def _choose(choices, primals, tangents):
    experts_MX, weights_MX = choose(*primals, choices)
    change_MX = jnp.take_along_axis(*tangents, experts_MX, axis=-1)
    change_MX -= (weights_MX * change_MX).sum(axis=-1, keepdims=True)
    none = np.zeros(experts_MX.shape, jax.dtypes.float0)
    return (experts_MX, weights_MX), (none, weights_MX * change_MX)


# One function of a program: in line, each layer's kernels would be different ones to the compiler,
# since they know from where they were called, and be compiled again.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _launch(run: Choice, outs: tuple, logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = {"grid": run.grid, "warpgroups": run.warps // 4}
    return launch("choose_experts", run.ptx(), outs, (logits_ME,), **size)
