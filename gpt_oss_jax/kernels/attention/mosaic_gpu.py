"""Attention on Hopper, through Pallas' Mosaic GPU back end.

Which kernel, and whether one can; `few_queries` knows how. Gradients come from the XLA version.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.kernels.attention import xla
from gpt_oss_jax.kernels.attention.few_queries import few_queries
from gpt_oss_jax.kernels.target import device_kind, platform

_JAX = (0, 11, 2)


def attention(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_KG: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """See `api.attention`.

    Raises:
      NotImplementedError: On other devices and versions of JAX, and for what it does not cover.
    """
    if jax.__version_info__ < _JAX:
        wanted = ".".join(map(str, _JAX))
        raise NotImplementedError(f"needs JAX {wanted}, this is {jax.__version__}")
    device = jax.devices()[0]
    if platform() != "gpu" or device.compute_capability != "9.0":
        raise NotImplementedError(f"needs a Hopper GPU, this is {device_kind()}")
    return _differentiable(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS, window)


@functools.partial(jax.custom_vjp, nondiff_argnums=(6,))
def _differentiable(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, q_pos_BT, k_pos_BS, window):
    where = {"q_pos_BT": q_pos_BT, "k_pos_BS": k_pos_BS, "window": window}
    return on_hopper(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, **where)


def _forward(q, k, v, sinks, q_pos, k_pos, window):
    kept = (q, k, v, sinks, q_pos, k_pos)
    return _differentiable(*kept, window), kept


def _backward(window, kept, dout):
    *floats, q_pos, k_pos = kept
    where = {"q_pos_BT": q_pos, "k_pos_BS": k_pos, "window": window}
    _, pull = jax.vjp(lambda *floats: xla.attention(*floats, **where), *floats)
    return *pull(dout), *(np.zeros(pos.shape, jax.dtypes.float0) for pos in (q_pos, k_pos))


_differentiable.defvjp(_forward, _backward)


def on_hopper(
    q_BTKGH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    sinks_KG: jax.Array,
    *,
    q_pos_BT: jax.Array,
    k_pos_BS: jax.Array,
    window: int | None,
) -> jax.Array:
    """Attention in bf16; compiles for Hopper on any machine.

    Raises:
      NotImplementedError: For sizes and types that it does not cover.
    """
    types = {x.dtype for x in (q_BTKGH, k_BSKH, v_BSKH)}
    if types != {jnp.dtype(jnp.bfloat16)}:
        names = ", ".join(sorted(map(str, types)))
        raise NotImplementedError(f"queries, keys and values are {names}, not bfloat16")
    # Kernels for other numbers of queries are chosen here.
    where = {"q_pos_BT": q_pos_BT, "k_pos_BS": k_pos_BS, "window": window}
    return few_queries(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, **where)
