"""What stands around attention and experts in a decode step on Hopper: three launches of a layer.

Each is a matrix product of a few rows with what comes before and after it: normalisation, rotation,
the residual stream, the choice of experts. What a thread does is in `ptx`; this prepares operands
and launches, on any machine for Hopper. Gradients come from the XLA version.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.dense import xla
from gpt_oss_jax.kernels.dense.ptx import MAX_INPUTS, TILE, WARPS, Product
from gpt_oss_jax.kernels.launch import launch
from gpt_oss_jax.kernels.target import multiprocessors

# Of all three, and of `route` alone: with more, XLA's products are faster.
MAX_ROWS, MAX_ROUTED = 32, 128
_MAX_EXPERTS = 128


def why_not(widths: tuple[int, ...], head: int, experts: int, dtype) -> str:
    """Why these sizes cannot run on Hopper; "" if they can.

    Args:
      widths: Of the rows that are multiplied.
      head: Width of a head.
      experts: Experts to choose from.
      dtype: Of weights and activations.
    """
    if dtype != jnp.bfloat16:
        return f"takes bfloat16, got {dtype}"
    if any(width % 32 or width > MAX_INPUTS for width in widths):
        return f"takes widths that are multiples of 32 up to {MAX_INPUTS}, got {widths}"
    if head % (2 * TILE) or experts % TILE or experts > _MAX_EXPERTS:
        return (
            f"takes heads that are multiples of {2 * TILE} wide, and multiples of {TILE} up to "
            f"{_MAX_EXPERTS} experts, got {head} and {experts}"
        )
    return ""


def _differentiable(kernel):
    """A kernel with the gradient of its namesake in `xla`."""

    @functools.wraps(kernel)
    def run(*arrays, **options):
        reference = functools.partial(getattr(xla, kernel.__name__), **options)
        forward = jax.custom_vjp(functools.partial(kernel, **options))
        forward.defvjp(
            lambda *arrays: (kernel(*arrays, **options), arrays),
            lambda arrays, gradient: jax.vjp(reference, *arrays)[1](gradient),
        )
        return forward(*arrays)

    return run


@_differentiable
def queries_keys_values(
    x_MD: jax.Array,
    scale_D: jax.Array,
    weight_OD: jax.Array,
    bias_O: jax.Array,
    cos_Mh: jax.Array,
    sin_Mh: jax.Array,
    *,
    epsilon: float,
    group: int,
    room: int = 0,
    early: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Normalises rows, multiplies, and rotates queries and keys.

    Args:
      x_MD: Rows of the residual stream.
      scale_D: Of the normalisation.
      weight_OD: For each key head: its `group` query heads, itself and its values, H rows each.
      bias_O: Likewise.
      cos_Mh: Rotations, [M, H/2].
      sin_Mh: Likewise.
      epsilon: Of the normalisation.
      group: Query heads to a key head.
      room: How often there is to be -1, for `store_and_attend`.
      early: As in `ptx.Product`: nothing in this program writes the weights.

    Returns:
      Queries [M, K, G, H], keys and values [M, K, H]; int32 [room] or None for none.
    """
    M, D = x_MD.shape
    H = 2 * cos_Mh.shape[1]
    K = weight_OD.shape[0] // (H * (group + 2))
    options = {"epsilon": epsilon, "head": H, "group": group, "room": room, "early": early}
    program = _product(M, D, weight_OD.shape[0], "rotate", **options)
    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
    outs = (shape(M, K, group, H), shape(M, K, H), shape(M, K, H), _room(room))
    inputs = x_MD, weight_OD, bias_O, scale_D, cos_Mh, sin_Mh
    *heads, empty = _launch(program, outs, inputs)
    return *heads, empty if room else None


@_differentiable
def add_product(
    x_MI: jax.Array,
    weight_OI: jax.Array,
    bias_O: jax.Array,
    residual_MO: jax.Array,
    *,
    early: bool = False,
) -> jax.Array:
    """Residual stream [M, O] plus the product, rounded once."""
    program = _product(*x_MI.shape, weight_OI.shape[0], "add", early=early)
    out = jax.ShapeDtypeStruct(residual_MO.shape, jnp.bfloat16)
    return _launch(program, (out,), (x_MI, weight_OI, bias_O, residual_MO))[0]


@_differentiable
def part_of_product(x_MI: jax.Array, weight_OI: jax.Array, *, early: bool = False) -> jax.Array:
    """float32 [M, O], of a part of the inputs, to be summed with what other devices have."""
    program = _product(*x_MI.shape, weight_OI.shape[0], "part", early=early)
    out = jax.ShapeDtypeStruct((len(x_MI), len(weight_OI)), jnp.float32)
    return _launch(program, (out,), (x_MI, weight_OI))[0]


@_differentiable
def route(
    x_MD: jax.Array,
    scale_D: jax.Array,
    weight_ED: jax.Array,
    bias_E: jax.Array,
    *,
    epsilon: float,
    choices: int,
    room: int,
    early: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Normalised rows, their experts and weights; and -1 so many times, for `expert_mlp`.

    Returns:
      bf16 [M, D], int32 [M, X], float32 [M, X], int32 [room] or None for none.
    """
    (M, D), E = x_MD.shape, weight_ED.shape[0]
    options = {"epsilon": epsilon, "choices": choices, "room": room, "early": early}
    program = _product(M, D, E, "route", **options)
    outs = (
        jax.ShapeDtypeStruct((M, D), jnp.bfloat16),
        jax.ShapeDtypeStruct((M, choices), jnp.int32),
        jax.ShapeDtypeStruct((M, choices), jnp.float32),
        _room(room),
    )
    *routed, empty = _launch(program, outs, (x_MD, weight_ED, bias_E, scale_D))
    return *routed, empty if room else None


def _room(words: int) -> jax.ShapeDtypeStruct:
    """Of one word where none is wanted: a kernel gives no empty array."""
    return jax.ShapeDtypeStruct((max(words, 1),), jnp.int32)


def _product(*sizes, **options) -> Product:
    return Product(*sizes, **options, multiprocessors=multiprocessors())


# One function of a program: in line, each layer's kernels would be different ones to the compiler,
# since they know from where they were called, and be compiled again.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _launch(program: Product, outs: tuple, inputs: tuple) -> tuple[jax.Array, ...]:
    if types := {str(x.dtype) for x in inputs} - {"bfloat16", "int32"}:
        raise ValueError(f"weights and rows must be bfloat16, got {', '.join(sorted(types))}.")
    return launch(
        f"few_rows_{program.ending}",
        program.ptx(),
        outs,
        inputs,
        grid=program.grid,
        cluster=program.cluster,
        warpgroups=WARPS // 4,
        shared_bytes=program.shared_bytes,
    )
