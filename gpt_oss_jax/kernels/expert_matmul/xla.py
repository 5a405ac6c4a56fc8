"""The expert layer in plain XLA: works everywhere, differentiable, in bounded memory.

Two ways, chosen by the number of (row, expert) pairs. Few pairs: each multiplies the packed
weights of its expert as they stream past, a product and a sum that XLA fuses with the decoding on
accelerators, so no decoded copy exists (a CPU keeps partial products, 110 MB a pair of 20b). Many
pairs: rows sorted by expert in tiles of one expert each, whose weights are decoded once a tile.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.blocks import map_blocks
from gpt_oss_jax.kernels.contract import einsum
from gpt_oss_jax.kernels.expert_matmul.tiles import sort_into_tiles
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights, in_checkpoint_order
from gpt_oss_jax.quant import MXArray, mxfp4

_FEW_PAIRS = 32
_MIN_TILE, _MAX_TILE = 16, 512


def swiglu(gate: jax.Array, linear: jax.Array, limit: float) -> jax.Array:
    """The clamped SwiGLU of gpt-oss, in float32."""
    gate = jnp.minimum(gate, limit)
    linear = jnp.clip(linear, -limit, limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (linear + 1)


def expert_mlp(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    some_elsewhere: bool = False,
) -> jax.Array:
    """See `api.expert_mlp`. With `some_elsewhere`, ids past the experts add nothing."""
    w = in_checkpoint_order(w)
    if some_elsewhere:
        weights_MX = jnp.where(experts_MX < w.up.shape[0], weights_MX, 0)
    if experts_MX.size <= _FEW_PAIRS:
        y_MXD = _gathered(x_MD, experts_MX, w, limit)
    else:
        y_MXD = _grouped(x_MD, experts_MX, w, limit, skip_empty=some_elsewhere)
    return (y_MXD * weights_MX[..., None]).sum(axis=1).astype(x_MD.dtype)


def _multiply_reduce(w: MXArray | jax.Array, chosen_Z: jax.Array, x: jax.Array) -> jax.Array:
    """Products of `w[chosen]` with x along the last axis, summed; float32.

    A product and a sum, not a dot: XLA fuses the gather and the decoding into it, so the packed
    bytes are read once and nothing else is.
    """
    x = x.astype(jnp.float32)
    if not isinstance(w, MXArray):
        return (w[chosen_Z].astype(jnp.float32) * x).sum(axis=-1)
    # Four bytes at a time: XLA loads an element a thread, and single bytes would waste the bus.
    # Before the gather: after it, the change of type would be a copy.
    words = w.blocks.reshape(*w.blocks.shape[:-1], 4, 4)
    words = jax.lax.bitcast_convert_type(words, jnp.uint32)[chosen_Z]
    x = x.reshape(*x.shape[:-1], *words.shape[-2:], 8)
    products = sum(mxfp4.decode_codes(words >> (4 * i)) * x[..., i] for i in range(8))
    return (products * mxfp4.decode_scales(w.scales[chosen_Z])[..., None]).sum(axis=(-2, -1))


# Recomputed in the backward pass: kept, what was decoded for every pair would add up.
@functools.partial(jax.checkpoint, static_argnums=(3,))
def _gathered(x_MD, experts_MX, w: ExpertWeights, limit):
    """Every pair on its own: reads the packed weights of each pair's expert once."""
    M, X = experts_MX.shape
    chosen = experts_MX.reshape(-1)
    x_ZD = jnp.repeat(x_MD, X, axis=0)
    u_ZF2 = _multiply_reduce(w.up, chosen, x_ZD[:, None, None])
    u_ZF2 += w.up_bias[chosen].astype(jnp.float32)
    hidden_ZF = swiglu(u_ZF2[..., 0], u_ZF2[..., 1], limit).astype(x_MD.dtype)
    y_ZD = _multiply_reduce(w.down, chosen, hidden_ZF[:, None])
    return (y_ZD + w.down_bias[chosen].astype(jnp.float32)).reshape(M, X, -1)


def _grouped(x_MD, experts_MX, w: ExpertWeights, limit, *, skip_empty):
    """Pairs sorted by expert, in tiles of one expert each."""
    M, X = experts_MX.shape
    E = w.up.shape[0]
    chosen = experts_MX.reshape(-1)
    mean = -(-M * X // E)
    tile = min(_MAX_TILE, max(_MIN_TILE, 1 << (mean - 1).bit_length()))
    tiles = sort_into_tiles(chosen, E, tile)

    # Recomputed in the backward pass: kept, the decoded experts of all tiles would add up.
    @jax.checkpoint
    def one_tile(expert, pairs):
        # Places of no pair take a row whose result nobody reads.
        x_PD = x_MD[jnp.maximum(pairs, 0) // X]
        up = _decoded(w.up, expert, x_PD.dtype)
        u_PF2 = einsum("PD,FCD->PFC", x_PD, up) + w.up_bias[expert].astype(jnp.float32)
        hidden_PF = swiglu(u_PF2[..., 0], u_PF2[..., 1], limit).astype(x_PD.dtype)
        down = _decoded(w.down, expert, x_PD.dtype)
        y_PD = einsum("PF,DF->PD", hidden_PF, down) + w.down_bias[expert].astype(jnp.float32)
        return y_PD.astype(x_PD.dtype)

    def one_that_exists(args):
        tile, expert, pairs = args
        nothing = lambda *_: jnp.zeros((*pairs.shape, x_MD.shape[1]), x_MD.dtype)
        return jax.lax.cond(tile < tiles.count, one_tile, nothing, expert, pairs)

    # The last tiles may be empty. To skip them costs a GPU a wait for the host at each tile, which
    # pays where most of the rows are other devices'.
    of_tiles = (tiles.expert_of_tile, tiles.pairs)
    if skip_empty:
        numbers = jnp.arange(len(tiles.expert_of_tile))
        y_TPD = map_blocks(one_that_exists, (numbers, *of_tiles), after=x_MD)
    else:
        y_TPD = map_blocks(lambda args: one_tile(*args), of_tiles, after=x_MD)
    y_ZD = y_TPD.reshape(-1, y_TPD.shape[-1])[tiles.place_of_pair]
    return y_ZD.reshape(M, X, -1).astype(jnp.float32)


def _decoded(w: MXArray | jax.Array, expert: jax.Array, dtype) -> jax.Array:
    return w[expert].dequantize(dtype) if isinstance(w, MXArray) else w[expert].astype(dtype)
