"""What `mosaic_gpu` computes, in plain XLA: what it is held against, and where gradients come from.

The model's layers compute the same with names for what lies between. Nothing is read `early`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.contract import einsum
from gpt_oss_jax.kernels.ptx import EMPTY
from gpt_oss_jax.kernels.routing.xla import choose


def queries_keys_values(
    x_MD, scale_D, weight_OD, bias_O, cos_Mh, sin_Mh, *, epsilon, group, room=0, early=False
):
    """See `mosaic_gpu.queries_keys_values`."""
    H = 2 * cos_Mh.shape[1]
    y_MO = _product(_normalised(x_MD, scale_D, epsilon), weight_OD, bias_O)
    y_MKCH = y_MO.reshape(len(x_MD), -1, group + 2, H)
    a, b = jnp.split(y_MKCH[:, :, : group + 1], 2, axis=-1)
    cos, sin = (z.astype(jnp.float32)[:, None, None] for z in (cos_Mh, sin_Mh))
    turned = jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    q, k, v = turned[:, :, :group], turned[:, :, group], y_MKCH[:, :, group + 1]
    return *(x.astype(x_MD.dtype) for x in (q, k, v)), _empty(room)


def add_product(x_MI, weight_OI, bias_O, residual_MO, *, early=False):
    """See `mosaic_gpu.add_product`."""
    y_MO = residual_MO.astype(jnp.float32) + _product(x_MI, weight_OI, bias_O)
    return y_MO.astype(residual_MO.dtype)


def part_of_product(x_MI, weight_OI, *, early=False):
    """See `mosaic_gpu.part_of_product`."""
    return _product(x_MI, weight_OI, jnp.zeros(len(weight_OI)))


def route(x_MD, scale_D, weight_ED, bias_E, *, epsilon, choices, room, early=False):
    """See `mosaic_gpu.route`."""
    h_MD = _normalised(x_MD, scale_D, epsilon)
    logits_ME = _product(h_MD, weight_ED, bias_E)
    return h_MD, *choose(logits_ME, choices=choices), _empty(room)


def _empty(room):
    return jnp.full(room, EMPTY, jnp.int32) if room else None


def _normalised(x_MD, scale_D, epsilon):
    x32 = x_MD.astype(jnp.float32)
    x32 *= jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + epsilon)
    return (x32 * scale_D.astype(jnp.float32)).astype(x_MD.dtype)


def _product(x_MI, weight_OI, bias_O):
    if len(x_MI) == 1:  # As in `model.layers.Linear`.
        y_MO = (weight_OI.astype(jnp.float32) * x_MI[0].astype(jnp.float32)).sum(axis=-1)[None]
    else:
        y_MO = einsum("MI,OI->MO", x_MI, weight_OI)
    return y_MO + bias_O.astype(jnp.float32)
