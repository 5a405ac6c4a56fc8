"""The expert layer on TPU, through Pallas' Mosaic: MXFP4 in 4 bits, or folded into 8.

Few rows: every expert that any of them chose is read once and meets all of them. Many rows: sorted
into tiles of one expert each. Bias, SwiGLU and routing weight are applied inside.

Folded weights are float8_e5m2, which the matrix unit multiplies with bfloat16 as they are. Packed
ones are decoded in VMEM. For few rows they become float8 too, and the scales are applied to
the results: x is spread over eight rows, of which each keeps one block in eight, so that the
products of eight blocks come out apart. For many rows they are decoded to bfloat16 once.

float32 rows are the exact sum of three bfloat16 rows, so they take the same way three times.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from gpt_oss_jax.kernels.expert_matmul import tpu_decode, xla
from gpt_oss_jax.kernels.expert_matmul.tiles import sort_into_tiles
from gpt_oss_jax.kernels.expert_matmul.tpu_tiles import tiles
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.target import device_kind
from gpt_oss_jax.quant import MXArray
from gpt_oss_jax.quant.mxfp4 import BLOCK
from gpt_oss_jax.quant.tpu_words import CHUNK

FEW_ROWS = 8
_SPREAD = CHUNK // BLOCK
LANES = 128  # Of a register.
_MIN_TILE = 16
_VMEM = 48 << 20


def expert_mlp(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    some_elsewhere: bool = False,
    num_experts: int | None = None,
) -> jax.Array:
    """See `api.expert_mlp`. With `some_elsewhere`, ids past the experts add nothing.

    `num_experts` are those of all devices; None: only these. Many rows take memory for twice the
    share that a device has of them, and go in rounds where it has more.

    Raises:
      NotImplementedError: On other devices, and for experts that are not in TPU words.
    """
    if not device_kind().startswith("TPU"):
        raise NotImplementedError(f"needs a TPU, this is {device_kind()}")
    if not all(isinstance(m, MXArray) for m in (w.up, w.down)):
        raise NotImplementedError("experts are not MXFP4")
    if w.up.words_of is None or w.down.words_of is None:
        raise NotImplementedError("experts are not in TPU words; MXArray.in_words makes them once")
    total = num_experts or w.up.shape[0]
    return _differentiable(x_MD, experts_MX, weights_MX, w, limit, some_elsewhere, total)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _differentiable(x_MD, experts_MX, weights_MX, w: ExpertWeights, limit, some_elsewhere, total):
    if x_MD.shape[0] <= FEW_ROWS:
        return _few(x_MD, experts_MX, weights_MX, w, limit, some_elsewhere)
    return _many(x_MD, experts_MX, weights_MX, w, limit, some_elsewhere, total)


def _forward(x_MD, experts_MX, weights_MX, w, limit, some_elsewhere, total):
    kept = (x_MD, experts_MX, weights_MX, w)
    return _differentiable(*kept, limit, some_elsewhere, total), kept


def _backward(limit, some_elsewhere, total, kept, dy_MD):
    del total
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

    steps = _Steps(experts_S.astype(jnp.int32), count, few=True)
    up = functools.partial(_activate, limit=limit)
    h_SMF = _call(up, "expert_up_few", steps, x_MD[None], w.up, w.up_bias, x_MD.dtype)
    y_1MD = _call(
        _add, "expert_down_few", steps, h_SMF, w.down, w.down_bias, jnp.float32, weights_SM1
    )
    return y_1MD[0].astype(x_MD.dtype)


def _many(x_MD, experts_MX, weights_MX, w: ExpertWeights, limit, some_elsewhere, total):
    """Rows in tiles of one expert each: all of them at once, or those of some experts in rounds."""
    M, X = experts_MX.shape
    E = w.up.shape[0]
    size = tile_size(M * X, total)
    sorted_ = sort_into_tiles(experts_MX.reshape(-1), E, size)
    pairs_TP = jnp.maximum(sorted_.pairs, 0)  # Of no pair: a row whose result nobody reads.
    count = jnp.maximum(sorted_.count.astype(jnp.int32), 1)
    up = functools.partial(_activate, limit=limit)

    def through(experts_S, pairs_SP, count, write, *weights_SP1):
        steps = _Steps(experts_S.astype(jnp.int32), count, few=False)
        x_SPD = x_MD[pairs_SP // X]
        h_SPF = _call(up, "expert_up_many", steps, x_SPD, w.up, w.up_bias, x_MD.dtype)
        args = h_SPF, w.down, w.down_bias, x_MD.dtype, *weights_SP1
        return _call(write, "expert_down_many", steps, *args).reshape(pairs_SP.size, -1)

    if not some_elsewhere:
        weights_TP1 = weights_MX.reshape(-1)[pairs_TP][..., None].astype(jnp.float32)
        y_ZD = through(sorted_.expert_of_tile, pairs_TP, count, _weigh, weights_TP1)
        y_ZD = y_ZD[sorted_.place_of_pair]
        return y_ZD.reshape(M, X, -1).astype(jnp.float32).sum(axis=1).astype(x_MD.dtype)

    slots = tiles_of_round(M * X, E, total)
    # Pairs of other devices' experts are in no tile.
    place_MX = jnp.where(experts_MX < E, sorted_.place_of_pair.reshape(M, X), -1)

    def add_round(i, before_MD):
        tiles_S = i * slots + jnp.arange(slots)  # Past the last they are the last again.
        left = jnp.minimum(count - i * slots, slots)
        y_ZD = through(sorted_.expert_of_tile[tiles_S], pairs_TP[tiles_S], left, _store)

        # One by one: side by side the choices of all rows, most of which are others', are larger
        # than all else. Weighted here, as in the kernel the weights take a register a row.
        def add_choice(j, before_MD):
            place_M1 = place_MX[:, j, None] - i * slots * size
            # What no tile of this round has was never written.
            is_here = (place_M1 >= 0) & (place_M1 < slots * size)
            y_MD = weights_MX[:, j, None] * y_ZD[place_M1[:, 0]].astype(jnp.float32)
            return before_MD + jnp.where(is_here, y_MD, 0)

        return jax.lax.fori_loop(0, X, add_choice, before_MD)

    rounds = 1 if slots >= len(sorted_.expert_of_tile) else pl.cdiv(count, slots)
    # Not a constant: XLA would fill those of all layers at the start, and keep them.
    zero = jnp.minimum(sorted_.count, 0).astype(jnp.float32)
    y_MD = jax.lax.fori_loop(0, rounds, add_round, jnp.broadcast_to(zero, x_MD.shape))
    return y_MD.astype(x_MD.dtype)


def tiles_of_round(pairs: int, experts: int, total: int) -> int:
    """Tiles that some of all experts have memory for: of twice their share of the pairs."""
    # Every expert may leave one tile part empty.
    return min(2 * pairs * experts // total, pairs) // tile_size(pairs, total) + experts


def tile_size(pairs: int, experts: int) -> int:
    """Rows of a tile, where there are many."""
    mean = -(-pairs // experts)
    return min(tiles(device_kind()).rows, max(_MIN_TILE, 1 << (mean - 1).bit_length()))


def outputs_of_step(parts: int, few: bool) -> int:
    """Outputs of one step, of how many parts, whose weights are copied ahead."""
    sizes = tiles(device_kind())
    return sizes.few // parts if few else sizes.many


def _activate(out, at, sums, *, limit):
    out[0, :, at] = xla.swiglu(sums(0, at), sums(1, at), limit).astype(out.dtype)


def _weigh(out, at, sums, weights):
    out[0, :, at] = (weights[0] * sums(0, at)).astype(out.dtype)


def _store(out, at, sums):
    out[0, :, at] = sums(0, at).astype(out.dtype)


def _add(out, at, sums, weights):
    before = jnp.where(pl.program_id(1) == 0, 0.0, out[0, :, at])
    out[0, :, at] = before + weights[0] * sums(0, at)


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The experts that a kernel goes through.

    Attributes:
      experts: int32 [S], one for each step; several in a row may be the same.
      count: int32 [], the steps there are.
      few: Whether all steps have the same rows, and few of them.
    """

    experts: jax.Array
    count: jax.Array
    few: bool


def _call(write, name, steps: _Steps, x_SPK, w: MXArray, bias_EN, dtype, *weights_SP1):
    """Rows of each step times its expert, plus the bias, as `write` puts them out: [S, P, N].

    Of x there may be one for all steps, and `_add` leaves one.
    """
    (S,), P, N, C = steps.experts.shape, x_SPK.shape[1], w.shape[1], w.blocks.shape[1]
    folded = w.factors is not None
    if folded:
        stored, K, factors_S = (w.blocks,), w.blocks.shape[2], w.factors[steps.experts]
    else:
        stored, K = (w.blocks, w.scales), 8 * w.blocks.shape[2]
        factors_S = jnp.full(S, 1.0 if w.native else tpu_decode.LACKS, jnp.float32)
    x = _in_parts(jnp.pad(x_SPK, ((0, 0), (0, 0), (0, K - x_SPK.shape[-1]))))
    if steps.few and not folded:
        x = _spread(x)
    bias_SCN = bias_EN[steps.experts].reshape(S, N, C).swapaxes(1, 2).astype(jnp.float32)
    lanes = tiles(device_kind()).lanes
    tile = min(outputs_of_step(C, steps.few), lanes * pl.cdiv(N, lanes))
    slots = 1 if write is _add else S

    def of_step(array):
        """All of what a step has."""
        zeros = (0,) * (array.ndim - 1)
        each = array.shape[0] > 1
        return pl.BlockSpec((1, *array.shape[1:]), lambda n, s, *_: (s if each else 0, *zeros))

    def of_expert(array):
        """Some outputs and all of the input axis, of the expert of a step."""
        block = (1, *array.shape[1:3], tile)
        return pl.BlockSpec(block, lambda n, s, experts, _: (experts[s], 0, 0, n))

    return pl.pallas_call(
        functools.partial(_kernel, write=write, N=N, native=w.native),
        name=name,
        out_shape=jax.ShapeDtypeStruct((slots, P, N), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(pl.cdiv(N, tile), steps.count),
            in_specs=[
                of_step(x),
                tuple(map(of_expert, stored)),
                pl.BlockSpec((1, C, tile), lambda n, s, *_: (s, 0, n)),
                tuple(map(of_step, weights_SP1)),
            ],
            out_specs=pl.BlockSpec((1, P, tile), lambda n, s, *_: (s if slots > 1 else 0, 0, n)),
            scratch_shapes=[] if steps.few or folded else [pltpu.VMEM((C, K, tile), jnp.bfloat16)],
        ),
        # Where a chip has two cores, each takes half of the outputs.
        compiler_params=pltpu.CompilerParams(
            vmem_limit_bytes=_VMEM, dimension_semantics=("parallel", "arbitrary")
        ),
    )(steps.experts, factors_S, x, stored, bias_SCN, weights_SP1)


def _kernel(experts, factors, x, stored, bias, weights, out, *decoded, write, N, native):
    step = pl.program_id(1)

    def sums(c, at):
        if decoded:
            found = _product(x, decoded[0][c, :, at])
        elif len(stored) == 1:
            found = _product(x, tpu_decode.numbers(*stored, c, at))
        else:
            found = _spread_product(x, *stored, c, at, out.shape[1], native)
        return found * factors[step] + bias[0, c : c + 1, at]

    if decoded:
        is_new = (step == 0) | (experts[step] != experts[jnp.maximum(step - 1, 0)])
        decode = functools.partial(_decode, *stored, *decoded, native=native)
        pl.when(is_new)(lambda: _over_lanes(decode, out, N))
    _over_lanes(lambda at: write(out, at, sums, *weights), out, N)


def _over_lanes(body, out, N):
    """Calls `body` for each group of lanes of a step's outputs that exist; the last may be less."""
    tile = out.shape[-1]
    size = min(tiles(device_kind()).lanes, tile)
    left = N - pl.program_id(0) * tile
    whole = jnp.minimum(tile, left) // size

    def group(i, _):
        body(pl.ds(pl.multiple_of(i * size, size), size))

    jax.lax.fori_loop(0, whole, group, None)
    if rest := N % size:
        last = pl.ds(pl.multiple_of(whole * size, size), LANES * pl.cdiv(rest, LANES))
        # A loop, too: so it is seen in the schedule.
        jax.lax.fori_loop(0, jnp.int32(left < tile), lambda *_: body(last), None)


def _product(x, values):
    """Rows, in parts, times values."""
    dot = functools.partial(jnp.dot, preferred_element_type=jnp.float32)
    return sum(dot(x[0, part], values) for part in range(x.shape[1]))


def _spread_product(x, words, scales, c, at, M, native):
    """Spread rows times the weights of some outputs, float32 [M, lanes]."""
    total = jnp.zeros((x.shape[1] // _SPREAD, _SPREAD, at.size), jnp.float32)
    for chunk, start, stop in tpu_decode.chunks(words):
        values = tpu_decode.decode(words[0, c, start // 8 : stop // 8, at], native)
        if native:
            # The matrix unit takes it beside bfloat16, and every value is a normal number of it.
            values = values.astype(jnp.float8_e4m3fn)
        product = jnp.dot(x[0, :, start:stop], values, preferred_element_type=jnp.float32)
        total += product.reshape(total.shape) * tpu_decode.decode_scales(scales, c, chunk, at)
    return total.reshape(M, -1, at.size).sum(axis=1)


def _decode(words, scales, decoded, at, *, native):
    """The weights of some outputs, in bfloat16."""
    for c in range(words.shape[1]):
        for chunk, start, stop in tpu_decode.chunks(words):
            values = tpu_decode.decode(words[0, c, start // 8 : stop // 8, at], native)
            scale = tpu_decode.decode_scales(scales, c, chunk, at)[: (stop - start) // BLOCK]
            values = values.astype(jnp.bfloat16).reshape(-1, BLOCK, at.size)
            values = values * scale.astype(jnp.bfloat16)[:, None]
            decoded[c, start:stop, at] = values.reshape(-1, at.size)


def _in_parts(x_SPK):
    """bfloat16 [S, A, P, K] whose exact sum over A is x."""
    if x_SPK.dtype == jnp.bfloat16:
        return x_SPK[:, None]
    found, rest = [], x_SPK.astype(jnp.float32)
    for _ in range(3):
        # Not a conversion there and back, which XLA takes out.
        part = jax.lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        found.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.stack(found, axis=1)


def _spread(x_SAPK):
    """[S, A, P, K] -> [S, P A 8, K], of whose rows each keeps one block in eight."""
    S, _, _, K = x_SAPK.shape
    mine_8K = jnp.arange(K) // BLOCK % _SPREAD == jnp.arange(_SPREAD)[:, None]
    x_SPA1K = x_SAPK.swapaxes(1, 2)[..., None, :]
    return jnp.where(mine_8K, x_SPA1K, jnp.zeros((), x_SAPK.dtype)).reshape(S, -1, K)
