"""The choice of experts on Hopper, in one launch: a sort of XLA's takes four times as long."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.launch import launch
from gpt_oss_jax.kernels.routing import xla
from gpt_oss_jax.kernels.routing.ptx import Choice

MAX_CHOICES = 32  # A lane has one.


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def choose(logits_ME: jax.Array, choices: int) -> tuple[jax.Array, jax.Array]:
    """See `api.choose`; compiles for Hopper on any machine. Gradients come from the XLA version."""
    M, E = logits_ME.shape
    outs = tuple(jax.ShapeDtypeStruct((M, choices), dtype) for dtype in (jnp.int32, jnp.float32))
    return _launch(Choice(M, E, choices), outs, logits_ME)


def _forward(logits_ME, choices):
    return choose(logits_ME, choices), logits_ME


def _backward(choices, logits_ME, gradients):
    return jax.vjp(functools.partial(xla.choose, choices=choices), logits_ME)[1](gradients)


choose.defvjp(_forward, _backward)


# One function of a program: in line, each layer's kernels would be different ones to the compiler,
# since they know from where they were called, and be compiled again.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _launch(run: Choice, outs: tuple, logits_ME: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = {"grid": run.grid, "warpgroups": run.warps // 4}
    return launch("choose_experts", run.ptx(), outs, (logits_ME,), **size)
