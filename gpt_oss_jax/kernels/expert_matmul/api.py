"""The expert layer of a mixture: the signature and the choice of implementation."""

from __future__ import annotations

import functools

import jax
from jax.sharding import Mesh

from gpt_oss_jax.kernels import sharded
from gpt_oss_jax.kernels.dispatch import dispatch
from gpt_oss_jax.kernels.expert_matmul import mosaic_gpu, mosaic_tpu, xla
from gpt_oss_jax.kernels.expert_matmul.few_rows import words_of_room
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.launch import check_room

IMPLEMENTATIONS = {
    "mosaic_gpu": mosaic_gpu.expert_mlp,
    "mosaic_tpu": mosaic_tpu.expert_mlp,
    "xla": xla.expert_mlp,
}


def expert_mlp(
    x_MD: jax.Array,
    experts_MX: jax.Array,
    weights_MX: jax.Array,
    w: ExpertWeights,
    *,
    limit: float,
    implementation: str | None = None,
    mesh: Mesh | None = None,
    room: jax.Array | None = None,
    residual: jax.Array | None = None,
) -> jax.Array:
    """Sends each row through its experts and sums their outputs, weighted.

    For expert e: `gate, linear = up[e] @ x + up_bias[e]`, both clamped (gate from above only),
    `hidden = gate * sigmoid(1.702 * gate) * (linear + 1)`, `y = down[e] @ hidden + down_bias[e]`.
    The bias of the down projection is inside the weighted sum.

    Args:
      x_MD: Rows, along any number of axes.
      experts_MX: int32 expert of each row, X of them, all different.
      weights_MX: float32 routing weights.
      w: Weights of all experts.
      limit: Clamp of gate and linear part.
      implementation: "mosaic_gpu", "mosaic_tpu", "xla", or None for the fastest that can.
      mesh: Devices to split rows and experts over; None: one device.
      room: int32 [`words_of_room`], all -1: what "mosaic_gpu" needs for few rows, and else makes.
        Used twice, it is copied. With it, the kernel for a single row takes the whole device: no
        other one may run beside it, as in branches of a program that do not wait for each other, or
        in another process under CUDA's MPS; both would wait for ever. Not for a mesh.
      residual: What the result is added to, as the rows are; "mosaic_gpu" rounds after that, others
        before, too. Not for a mesh.

    Returns:
      [M, D] in the dtype of the rows.

    Raises:
      ValueError: If shapes disagree, or `implementation` is unknown.
    """
    *M, D = x_MD.shape
    E, F = w.up.shape[:2]
    wanted = (tuple(M), (E, F, 2, D), (E, F, 2), (E, D, F), (E, D), experts_MX.shape)
    came = (
        experts_MX.shape[:-1],
        w.up.shape,
        w.up_bias.shape,
        w.down.shape,
        w.down_bias.shape,
        weights_MX.shape,
    )
    if wanted != came:
        raise ValueError(
            f"with rows {x_MD.shape}, the rows of experts, up, up_bias, down, down_bias and "
            f"weights must be {wanted}, got {came}."
        )

    if room is not None:
        X = experts_MX.shape[-1]
        check_room(room, words_of_room(experts_MX.size // X, X, w), mesh)

    if residual is not None:
        wanted, came = ((x.dtype, x.shape) for x in (x_MD, residual))
        if mesh is not None or wanted != came:
            raise ValueError(
                f"residual must be as the rows, {wanted[0]} {wanted[1]}, and there must be no "
                f"mesh; got {came[0]} {came[1]}{'' if mesh is None else ' and a mesh'}."
            )

    def kernel(x, experts, weights, w):
        # Of a mesh, a device has some of the experts: an id past them is that of another one.
        more = {"limit": limit, "some_elsewhere": mesh is not None}
        rows = (y.reshape(-1, y.shape[-1]) for y in (x, experts, weights))
        to_MD = None if residual is None else residual.reshape(-1, residual.shape[-1])
        others = IMPLEMENTATIONS | {
            "mosaic_tpu": functools.partial(mosaic_tpu.expert_mlp, num_experts=E)
        }
        implementations = {name: _added(to_MD, f) for name, f in others.items()}
        implementations["mosaic_gpu"] = functools.partial(
            mosaic_gpu.expert_mlp, room=room, residual=to_MD
        )
        y_MD = dispatch("expert_mlp", implementations, implementation, *rows, w, **more)
        return y_MD.reshape(x.shape)

    args = (x_MD, experts_MX, weights_MX, w)
    return kernel(*args) if mesh is None else sharded.expert_mlp(mesh, kernel, *args)


def _added(residual_MD: jax.Array | None, kernel):
    """A kernel whose result is added to something, if there is something."""
    if residual_MD is None:
        return kernel
    return lambda *args, **more: residual_MD + kernel(*args, **more)
