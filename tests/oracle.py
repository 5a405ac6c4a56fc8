"""What every kernel must equal, in a few dense lines of float32 each.

Slow, unbounded in memory and differentiable. Takes what the kernels take, except that expert
weights come decoded. Knows nothing of the package. Under `jit`, because a program for every line
and every shape takes longer to compile than one.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.jit, static_argnames="window")
def attention(q_BTKGH, k_BSKH, v_BSKH, sinks_KG, *, q_pos_BT, k_pos_BS, window):
    """Softmax over the visible keys and the sink, whose weight is then dropped: [B, T, K, G, H]."""
    q, k, v, sinks = (x.astype(jnp.float32) for x in (q_BTKGH, k_BSKH, v_BSKH, sinks_KG))
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("BTKGH,BSKH->BTKGS", q, k) / q.shape[-1] ** 0.5
        q_pos, k_pos = q_pos_BT[:, :, None], k_pos_BS[:, None, :]
        visible = (0 <= k_pos) & (k_pos <= q_pos) & (q_pos - k_pos < (window or 1 << 30))
        scores = jnp.where(visible[:, :, None, None, :], scores, -jnp.inf)
        sinks = jnp.broadcast_to(sinks[None, None, :, :, None], (*scores.shape[:-1], 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, sinks], -1))[..., :-1]
        return jnp.einsum("BTKGS,BSKH->BTKGH", weights, v)


@functools.partial(jax.jit, static_argnames="limit")
def expert_mlp(
    x_MD, experts_MX, weights_MX, up_EF2D, up_bias_EF2, down_EDF, down_bias_ED, *, limit
):
    """Every expert on every row, of which the chosen ones count: [M, D]."""
    x, weights, up, up_bias, down, down_bias = (
        a.astype(jnp.float32)
        for a in (x_MD, weights_MX, up_EF2D, up_bias_EF2, down_EDF, down_bias_ED)
    )
    with jax.default_matmul_precision("highest"):
        u = jnp.einsum("MD,EFCD->MEFC", x, up) + up_bias[None]
        gate, linear = jnp.minimum(u[..., 0], limit), jnp.clip(u[..., 1], -limit, limit)
        hidden = gate / (1 + jnp.exp(-1.702 * gate)) * (linear + 1)
        y = jnp.einsum("MEF,EDF->MED", hidden, down) + down_bias[None]
        chosen = jax.nn.one_hot(experts_MX, len(up)) * weights[..., None]
        return jnp.einsum("MXE,MED->MD", chosen, y)
