"""The expert layer on TPU, through Pallas' Mosaic: MXFP4 in `quant.tpu_words`, decoded in VMEM.

Few rows: every expert that any of them chose is read once and meets all of them. Weights become
float8_e5m2, which the matrix unit multiplies with bfloat16, and the scales are applied to its
results: x is spread over eight rows, of which each keeps one block in eight, so that the products
of eight blocks come out apart. Many rows: sorted into tiles of one expert each, whose weights are
decoded to bfloat16 once. Bias, SwiGLU and routing weight are applied inside.

float32 rows are the exact sum of three bfloat16 rows, so they take the same way three times.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gpt_oss_jax.kernels.expert_matmul import xla
from gpt_oss_jax.kernels.expert_matmul.tiles import sort_into_tiles
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.target import device_kind
from gpt_oss_jax.quant import MXArray
from gpt_oss_jax.quant.mxfp4 import BLOCK
from gpt_oss_jax.quant.tpu_words import CHUNK

FEW_ROWS = 8
_SPREAD = CHUNK // BLOCK
_LANES = 256  # Outputs that are worked on at a time, two registers wide.
_FEW_OUTPUTS, _MANY_OUTPUTS = 768, 512  # Outputs of one step, whose weights are copied ahead.
_MIN_TILE, _MAX_TILE = 16, 256
_VMEM = 48 << 20

# What a decoded weight lacks: the exponent of a half is coded as 4 and should be as 14.
_X_SCALE = 2.0**10


def expert_mlp(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    some_elsewhere: bool = False,
) -> jax.Array:
    """See `api.expert_mlp`. With `some_elsewhere`, ids past the experts add nothing.

    Raises:
      NotImplementedError: On other devices, and for experts that are not in TPU words.
    """
    if not device_kind().startswith("TPU"):
        raise NotImplementedError(f"needs a TPU, this is {device_kind()}")
    if not all(isinstance(m, MXArray) for m in (w.up, w.down)):
        raise NotImplementedError("experts are not MXFP4")
    if w.up.words_of is None or w.down.words_of is None:
        raise NotImplementedError("experts are not in TPU words; MXArray.in_words makes them once")
    return _differentiable(x_MD, experts_MX, weights_MX, w, limit, some_elsewhere)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _differentiable(x_MD, experts_MX, weights_MX, w: ExpertWeights, limit, some_elsewhere):
    mlp = _few if x_MD.shape[0] <= FEW_ROWS else _many
    return mlp(x_MD, experts_MX, weights_MX, w, limit, some_elsewhere)


def _forward(x_MD, experts_MX, weights_MX, w, limit, some_elsewhere):
    kept = (x_MD, experts_MX, weights_MX, w)
    return _differentiable(*kept, limit, some_elsewhere), kept


def _backward(limit, some_elsewhere, kept, dy_MD):
    x_MD, experts_MX, weights_MX, w = kept
    more = {"limit": limit, "some_elsewhere": some_elsewhere}
    _, pull = jax.vjp(
        lambda x, weights, w: xla.expert_mlp(x, experts_MX, weights, w, **more),
        x_MD,
        weights_MX,
        w,
    )
    dx_MD, dweights_MX, dw = pull(dy_MD)
    return dx_MD, np.zeros(experts_MX.shape, jax.dtypes.float0), dweights_MX, dw


_differentiable.defvjp(_forward, _backward)


def _few(x_MD, experts_MX, weights_MX, w: ExpertWeights, limit, some_elsewhere):
    """All rows meet each expert that any of them chose."""
    M, X = experts_MX.shape
    E = w.up.shape[0]
    slots = min(E, M * X)
    if M == 1 and not some_elsewhere:
        experts_S, count = experts_MX[0], jnp.int32(X)
    else:
        chosen_E = jnp.zeros(E, bool).at[experts_MX.reshape(-1)].set(True)
        (experts_S,) = jnp.nonzero(chosen_E, size=slots, fill_value=0)
        # One at least, of weight zero: without a step nothing would be written.
        count = jnp.maximum(chosen_E.sum(dtype=jnp.int32), 1)
    is_slot_SMX = experts_S[:, None, None] == experts_MX
    weights_SM1 = jnp.where(is_slot_SMX, weights_MX, 0.0).sum(axis=-1)[..., None]
    bias_S2F = w.up_bias[experts_S].swapaxes(1, 2).astype(jnp.float32)
    bias_S1D = w.down_bias[experts_S][:, None].astype(jnp.float32)

    parts = len(_parts(x_MD))
    spread = _spread(x_MD, w.up.blocks.shape[2])
    N = w.up.shape[1]
    tile = min(_FEW_OUTPUTS, _round_up(N, _LANES))
    outputs = pl.cdiv(N, tile)
    h_SMF = pl.pallas_call(
        functools.partial(_few_up, N=N, limit=limit, parts=parts),
        name="expert_up_few",
        out_shape=jax.ShapeDtypeStruct((slots, M, N), x_MD.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(outputs, count),
            in_specs=[
                pl.BlockSpec(spread.shape, lambda n, s, experts: (0, 0)),
                *_weight_specs(w.up, tile, lambda n, s, experts: (experts[s], 0, 0, n)),
                pl.BlockSpec((1, 2, tile), lambda n, s, experts: (s, 0, n)),
            ],
            out_specs=pl.BlockSpec((1, M, tile), lambda n, s, experts: (s, 0, n)),
        ),
        compiler_params=_params("parallel", "arbitrary"),
    )(experts_S.astype(jnp.int32), spread, w.up.blocks, w.up.scales, bias_S2F)

    spread = jax.vmap(lambda h: _spread(h, w.down.blocks.shape[2]))(h_SMF)
    N = w.down.shape[1]
    tile = min(2 * _FEW_OUTPUTS, _round_up(N, _LANES))
    outputs = pl.cdiv(N, tile)
    y_MD = pl.pallas_call(
        functools.partial(_few_down, N=N, parts=parts),
        name="expert_down_few",
        out_shape=jax.ShapeDtypeStruct((M, N), jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(outputs, count),
            in_specs=[
                pl.BlockSpec((1, *spread.shape[1:]), lambda n, s, experts: (s, 0, 0)),
                *_weight_specs(w.down, tile, lambda n, s, experts: (experts[s], 0, 0, n)),
                pl.BlockSpec((1, 1, tile), lambda n, s, experts: (s, 0, n)),
                pl.BlockSpec((1, M, 1), lambda n, s, experts: (s, 0, 0)),
            ],
            out_specs=pl.BlockSpec((M, tile), lambda n, s, experts: (0, n)),
        ),
        compiler_params=_params("parallel", "arbitrary"),
    )(experts_S.astype(jnp.int32), spread, w.down.blocks, w.down.scales, bias_S1D, weights_SM1)
    return y_MD.astype(x_MD.dtype)


def _few_up(experts, x_RD, words, scales, bias, out, *, N, limit, parts):
    del experts

    def lanes(at):
        gate, linear = (
            _spread_product(x_RD, words, scales, c, at, parts) + bias[0, c : c + 1, at]
            for c in range(2)
        )
        out[0, :, at] = xla.swiglu(gate, linear, limit).astype(out.dtype)

    _over_lanes(lanes, N, out.shape[-1], pl.program_id(0))


def _few_down(experts, h_RF, words, scales, bias, weights, out, *, N, parts):
    del experts

    @pl.when(pl.program_id(1) == 0)
    def _():
        out[...] = jnp.zeros_like(out)

    def lanes(at):
        y = _spread_product(h_RF.at[0], words, scales, 0, at, parts) + bias[0, :, at]
        out[:, at] += weights[0] * y

    _over_lanes(lanes, N, out.shape[-1], pl.program_id(0))


def _over_lanes(body, N, tile, step):
    """Calls `body` for each group of lanes of a step's outputs that exist."""
    size = min(_LANES, tile)
    groups = jnp.minimum(tile // size, pl.cdiv(N - step * tile, size))

    def group(i, _):
        body(pl.ds(pl.multiple_of(i * size, size), size))

    jax.lax.fori_loop(0, groups, group, None)


def _spread_product(x_RK, words, scales, c, at, parts):
    """Rows times the weights of some outputs, float32 [M, lanes]."""
    R = x_RK.shape[0]
    total = jnp.zeros((R // _SPREAD, _SPREAD, at.size), jnp.float32)
    for chunk, start, stop in _chunks(words):
        decoded = _decode(words[0, c, start // 8 : stop // 8, at])
        product = jnp.dot(x_RK[:, start:stop], decoded, preferred_element_type=jnp.float32)
        total += product.reshape(total.shape) * _decode_scales(scales, c, chunk, at)
    return total.reshape(-1, parts * _SPREAD, at.size).sum(axis=1)


def _many(x_MD, experts_MX, weights_MX, w: ExpertWeights, limit, some_elsewhere):
    """Rows in tiles of one expert each."""
    M, X = experts_MX.shape
    E = w.up.shape[0]
    mean = -(-M * X // E)
    size = min(_MAX_TILE, max(_MIN_TILE, 1 << (mean - 1).bit_length()))
    tiles = sort_into_tiles(experts_MX.reshape(-1), E, size)
    T = tiles.expert_of_tile.shape[0]
    experts_T = tiles.expert_of_tile.astype(jnp.int32)
    x_TAPD = _in_parts(x_MD[tiles.pairs // X], w.up.blocks.shape[2])
    weights_TP1 = weights_MX.reshape(-1)[tiles.pairs][..., None].astype(jnp.float32)
    bias_E2F = w.up_bias.swapaxes(1, 2).astype(jnp.float32)
    bias_E1D = w.down_bias[:, None].astype(jnp.float32)

    h_TPF = _many_call(
        functools.partial(_many_up, limit=limit),
        "expert_up_many",
        tiles,
        experts_T,
        x_TAPD,
        w.up,
        bias_E2F,
        (),
        x_MD.dtype,
    )
    y_TPD = _many_call(
        _many_down,
        "expert_down_many",
        tiles,
        experts_T,
        _in_parts(h_TPF, w.down.blocks.shape[2]),
        w.down,
        bias_E1D,
        (weights_TP1,),
        x_MD.dtype,
    )
    y_ZD = y_TPD.reshape(T * size, -1)[tiles.place_of_pair]
    if some_elsewhere:
        # What no tile has was never written.
        y_ZD = jnp.where(experts_MX.reshape(-1, 1) < E, y_ZD, 0)
    return y_ZD.reshape(M, X, -1).astype(jnp.float32).sum(axis=1).astype(x_MD.dtype)


def _many_call(body, name, tiles, experts_T, x_TAPK, w: MXArray, bias_ECN, weights, dtype):
    T, A, P, K = x_TAPK.shape
    C, N = w.blocks.shape[1], w.shape[1]
    tile = min(_MANY_OUTPUTS, _round_up(N, _LANES))
    return pl.pallas_call(
        functools.partial(body, N=N),
        name=name,
        out_shape=jax.ShapeDtypeStruct((T, P, N), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(pl.cdiv(N, tile), jnp.maximum(tiles.count.astype(jnp.int32), 1)),
            in_specs=[
                pl.BlockSpec((1, A, P, K), lambda n, t, experts: (t, 0, 0, 0)),
                *_weight_specs(w, tile, lambda n, t, experts: (experts[t], 0, 0, n)),
                pl.BlockSpec((1, C, tile), lambda n, t, experts: (experts[t], 0, n)),
                *(pl.BlockSpec((1, P, 1), lambda n, t, experts: (t, 0, 0)) for _ in weights),
            ],
            out_specs=pl.BlockSpec((1, P, tile), lambda n, t, experts: (t, 0, n)),
            scratch_shapes=[pltpu.VMEM((C, K, tile), jnp.bfloat16)],
        ),
        compiler_params=_params("parallel", "arbitrary"),
    )(experts_T, x_TAPK, w.blocks, w.scales, bias_ECN, *weights)


def _many_up(experts, x, words, scales, bias, out, decoded, *, N, limit):
    _decode_if_new(experts, words, scales, decoded, N)

    def lanes(at):
        gate, linear = (_product(x, decoded, c, at) + bias[0, c : c + 1, at] for c in range(2))
        out[0, :, at] = xla.swiglu(gate, linear, limit).astype(out.dtype)

    _over_lanes(lanes, N, out.shape[-1], pl.program_id(0))


def _many_down(experts, h, words, scales, bias, weights, out, decoded, *, N):
    _decode_if_new(experts, words, scales, decoded, N)

    def lanes(at):
        y = _product(h, decoded, 0, at) + bias[0, :, at]
        out[0, :, at] = (weights[0] * y).astype(out.dtype)

    _over_lanes(lanes, N, out.shape[-1], pl.program_id(0))


def _product(x, decoded, c, at):
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return sum(dot(x[0, a], decoded[c, :, at]) for a in range(x.shape[1]))


def _decode_if_new(experts, words, scales, decoded, N):
    """Decodes the weights of a step to bfloat16, unless the tile before had the same expert."""
    tile = pl.program_id(1)

    @pl.when((tile == 0) | (experts[tile] != experts[jnp.maximum(tile - 1, 0)]))
    def _():
        def lanes(at):
            for c in range(words.shape[1]):
                for chunk, start, stop in _chunks(words):
                    values = _decode(words[0, c, start // 8 : stop // 8, at]).astype(jnp.bfloat16)
                    scale = _decode_scales(scales, c, chunk, at)[: (stop - start) // BLOCK]
                    values = values.reshape(-1, BLOCK, at.size)
                    values = values * scale.astype(jnp.bfloat16)[:, None]
                    decoded[c, start:stop, at] = values.reshape(-1, at.size)

        _over_lanes(lanes, N, decoded.shape[-1], pl.program_id(0))


def _params(*order):
    """Where a chip has two cores, each takes half of what is "parallel"."""
    return pltpu.CompilerParams(vmem_limit_bytes=_VMEM, dimension_semantics=order)


def _weight_specs(w: MXArray, tile, index):
    """Blocks of words and scales: all of the input axis, `tile` outputs."""
    return [pl.BlockSpec((1, *array.shape[1:3], tile), index) for array in (w.blocks, w.scales)]


def _chunks(words):
    """Number and bounds of each chunk of the input axis."""
    K = 8 * words.shape[2]
    return [(i, start, min(start + CHUNK, K)) for i, start in enumerate(range(0, K, CHUNK))]


def _decode(words):
    """Words int32 [r, n] -> float8_e5m2 [8 r, n], 2^-10 times the values of their codes."""
    magnitudes = words & _int(0x77777777)
    # Adding 7 carries into the fourth bit unless the magnitude is 0: the highest bit of the
    # exponent. The bit of the mantissa is stored inverted, except in the codes of 0 and 0.5.
    some = (magnitudes + _int(0x77777777)) & _int(0x88888888)
    fields = (magnitudes ^ jax.lax.shift_right_logical(some, _int(3))) | some
    signs = _int(0x80808080)
    low = ((fields << 1) & _int(0x1E1E1E1E)) | ((words << 4) & signs)
    high = (jax.lax.shift_right_logical(fields, _int(3)) & _int(0x1E1E1E1E)) | (words & signs)
    halves = [pltpu.bitcast(half, jnp.float8_e5m2) for half in (low, high)]
    return jnp.concatenate(halves, axis=0)


def _decode_scales(scales, c, chunk, at):
    """Scales of one chunk, float32 [8, lanes]; byte 0, less than TPUs can tell from 0, is 0."""
    word = scales[0, c, chunk // 4 * 8 : chunk // 4 * 8 + 8, at]
    byte = chunk % 4
    word = word << (23 - 8 * byte) if byte < 3 else jax.lax.shift_right_logical(word, _int(1))
    return jax.lax.bitcast_convert_type(word & _int(0x7F800000), jnp.float32)


def _int(bits: int) -> jax.Array:
    return jnp.int32(bits - (1 << 32) if bits >> 31 else bits)


def _parts(x):
    """bfloat16 arrays whose exact sum is x."""
    if x.dtype == jnp.bfloat16:
        return [x]
    found, rest = [], x.astype(jnp.float32)
    for _ in range(3):
        # Not a conversion there and back, which XLA takes out.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return found


def _padded(x, rows_of_words):
    """Rows as the kernels take them: with the input axis of the words, times what these lack."""
    padding = [(0, 0)] * (x.ndim - 1) + [(0, 8 * rows_of_words - x.shape[-1])]
    return jnp.pad(x * jnp.asarray(_X_SCALE, x.dtype), padding)


def _in_parts(x_TPK, rows_of_words):
    return jnp.stack(_parts(_padded(x_TPK, rows_of_words)), axis=1)


def _spread(x_MK, rows_of_words):
    """[M, K] -> [M parts 8, K'], of whose rows each keeps one block in eight."""
    x_MAK = jnp.stack(_parts(_padded(x_MK, rows_of_words)), axis=1)
    block_K = jnp.arange(x_MAK.shape[-1]) // BLOCK % _SPREAD
    mine_8K = block_K == jnp.arange(_SPREAD)[:, None]
    spread = jnp.where(mine_8K, x_MAK[:, :, None], jnp.zeros((), x_MAK.dtype))
    return spread.reshape(-1, x_MAK.shape[-1])


def _round_up(n, multiple):
    return math.ceil(n / multiple) * multiple
