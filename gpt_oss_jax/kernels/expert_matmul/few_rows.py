"""The expert layer on Hopper for few rows, when the time goes into reading weights.

Each expert that any row chose is read once for up to 8 of them, in one launch: up projection with
bias and SwiGLU, and down projection with bias and routing weight. What a thread does is in
`few_rows_ptx`, and for a model's single row in `one_row_ptx`; this prepares its operands and
launches it, on any machine for Hopper.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.expert_matmul.few_rows_ptx import SeveralRows
from gpt_oss_jax.kernels.expert_matmul.few_rows_tiles_ptx import COLUMNS, MAX_BLOCKS, Layer
from gpt_oss_jax.kernels.expert_matmul.one_row_ptx import MAX_CHOICES, OneRow
from gpt_oss_jax.kernels.expert_matmul.rows import add_parts, most_tiles
from gpt_oss_jax.kernels.expert_matmul.rows_ptx import MAX_SORTED
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.launch import launch
from gpt_oss_jax.kernels.ptx import EMPTY
from gpt_oss_jax.kernels.target import multiprocessors


def few_rows(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    some_elsewhere: bool = False,
    room: jax.Array | None = None,
    residual_MD: jax.Array | None = None,
) -> jax.Array:
    """See `mosaic_gpu.on_hopper`; for few rows to an expert, though it takes any number.

    Raises:
      NotImplementedError: For experts that are too wide, and for too many.
    """
    M, X = experts_MX.shape
    if M * X > MAX_SORTED >= X:
        return _in_parts(x_MD, experts_MX, weights_MX, w, limit, residual_MD)
    # Whoever brings the room is a model, whose launches wait for each other.
    program = layer(w, M, X, limit, alone=room is not None and not some_elsewhere)
    if max(M * X, program.experts) > MAX_SORTED:
        raise NotImplementedError(
            f"takes up to {MAX_SORTED:,} pairs of row and expert and as many experts, got "
            f"{M * X:,} and {program.experts:,}"
        )
    if max(program.up.blocks, program.down.blocks) > MAX_BLOCKS:
        raise NotImplementedError(f"takes widths up to {32 * MAX_BLOCKS}, got experts {w.up.shape}")
    experts = experts_MX.reshape(-1).astype(jnp.int32)
    weights = weights_MX.reshape(-1).astype(jnp.float32)
    up, down = (w.up.blocks, w.up.scales, w.up_bias), (w.down.blocks, w.down.scales, w.down_bias)
    if room is None:
        room = jnp.full(program.room, EMPTY, jnp.int32)
    if isinstance(program, OneRow):
        residual = () if residual_MD is None else (residual_MD,)
        program = dataclasses.replace(program, adds=bool(residual))
        out = jax.ShapeDtypeStruct(x_MD.shape, jnp.bfloat16)
        return _launch(program, out, x_MD, experts, weights, *up, *down, *residual, room)
    out = jax.ShapeDtypeStruct((M, X, program.inputs), jnp.float32)
    y_MXD = _launch(program, out, x_MD, experts, weights, *up, *down, room)
    if some_elsewhere:
        # What no visit has was never written.
        y_MXD = jnp.where(experts_MX[..., None] < program.experts, y_MXD, 0)
    if residual_MD is not None:
        return add_parts(residual_MD, y_MXD)
    return y_MXD.sum(axis=1).astype(x_MD.dtype)


def _in_parts(x_MD, experts_MX, weights_MX, w: ExpertWeights, limit, residual_MD) -> jax.Array:
    """Of more rows than can be sorted, so many at a time."""
    M, X = experts_MX.shape
    rows = MAX_SORTED // X
    rest = -M % rows

    def parts(x, nothing):
        x = jnp.pad(x, ((0, rest), (0, 0)), constant_values=nothing)
        return x.reshape(-1, rows, x.shape[-1])

    # An id past the experts adds nothing.
    arrays = parts(x_MD, 0), parts(experts_MX, w.up.shape[0]), parts(weights_MX, 0)
    residual = None if residual_MD is None else parts(residual_MD, 0)

    def run(part):
        arrays, residual = part
        more = {"limit": limit, "some_elsewhere": True, "residual_MD": residual}
        return few_rows(*arrays, w, **more)

    return jax.lax.map(run, (arrays, residual)).reshape(M + rest, -1)[:M]


def words_of_room(M: int, X: int, w: ExpertWeights) -> int:
    """Of the `room` that M rows of X experts each take, int32."""
    return layer(w, M, X, 0.0, alone=True).room


def layer(w: ExpertWeights, M: int, X: int, limit: float, *, alone: bool = False) -> Layer:
    """The launch for M rows of X experts each.

    Args:
      w: Weights of all experts.
      M: Rows.
      X: Experts of a row, all of them here if it is `alone`.
      limit: Clamp of the SwiGLU.
      alone: No such launch runs beside it, as `OneRow` needs.
    """
    E, F, _, D = w.up.shape
    sizes = {
        "inputs": D,
        "hidden": F,
        "experts": E,
        "choices": X,
        "rows": M,
        "bias_bytes": w.up_bias.dtype.itemsize,
        "limit": limit,
        "multiprocessors": multiprocessors(),
    }
    if M == 1 and X <= MAX_CHOICES and alone:
        return OneRow(**sizes)
    return SeveralRows(**sizes, visits=most_tiles(M * X, E, COLUMNS))


def _launch(program: Layer, out: jax.ShapeDtypeStruct, *inputs: jax.Array) -> jax.Array:
    # What is written in place has no batching rule.
    @jax.custom_batching.sequential_vmap
    def run(*inputs):
        *inputs, room = inputs
        return launch(
            "mxfp4_one_row" if isinstance(program, OneRow) else "mxfp4_few_rows",
            program.ptx(),
            out,
            (*inputs, jax.new_ref(room)),
            grid=program.grid,
            warpgroups=program.block_warps // 4,
            shared_bytes=program.shared_bytes,
        )

    return run(*inputs)
