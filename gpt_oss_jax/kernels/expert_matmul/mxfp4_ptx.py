"""Pieces of PTX that the Hopper kernels share: decoding MXFP4, and the clamped SwiGLU.

A code, moved to where bf16 has its sign and the last bits of its exponent and first of its
mantissa, is its value times 2^-126. The scale's power of two puts back 62 of these exponents, the
end of the sum 64 (`LAST_FACTOR`), so that scales from 2^-60 to 2^65 are exact; larger ones give
infinity.
"""

from __future__ import annotations

from gpt_oss_jax.kernels.ptx import literal
from gpt_oss_jax.quant.hopper_words import LAST_FACTOR as LAST_PAIR_FACTOR, LAST_PAIR, PAIR, TURN

LAST_FACTOR = 2.0**64
_SCALE_BIAS, _LARGEST_SCALE = 62, 193


def scale(byte: str, out: str) -> str:
    """A scale byte, which is changed, to what `decode` multiplies with."""
    return (
        f"min.u32 {byte}, {byte}, {_LARGEST_SCALE};"
        f"mad.lo.u32 {out}, {byte}, {0x00800080}, {_SCALE_BIAS * 0x00800080};"
    )


def decode(word: str, scale: str, out: str) -> str:
    """Eight shuffled codes to registers of two bf16: 0 and 4, 1 and 5, 2 and 6, 3 and 7.

    Twelve instructions, which is what small products wait for. Uses t0.
    """
    text = f"and.b32 t0, {word}, {PAIR}; mul.bf16x2 {out}0, t0, {scale};"
    for i in (1, 2):
        text += f"shf.r.wrap.b32 t0, {word}, {word}, {TURN * i}; and.b32 t0, t0, {PAIR};"
        text += f"mul.bf16x2 {out}{i}, t0, {scale};"
    text += f"and.b32 t0, {word}, {LAST_PAIR}; mul.lo.u32 t0, t0, {LAST_PAIR_FACTOR};"
    return text + f"and.b32 t0, t0, {PAIR}; mul.bf16x2 {out}3, t0, {scale};"


def swiglu(gate: str, linear: str, limit: float) -> str:
    """`xla.swiglu` of two registers, which are changed, to the first; uses b0."""
    return (
        f"min.NaN.f32 {gate}, {gate}, {literal(limit)};"
        f"min.NaN.f32 {linear}, {linear}, {literal(limit)};"
        f"max.NaN.f32 {linear}, {linear}, {literal(-limit)};"
        f"add.f32 {linear}, {linear}, {literal(1.0)};"
        f"mul.f32 b0, {gate}, {literal(-1.702 * 1.4426950408889634)}; ex2.approx.f32 b0, b0;"
        f"add.f32 b0, b0, {literal(1.0)}; rcp.approx.f32 b0, b0;"
        f"mul.f32 {gate}, {gate}, b0; mul.f32 {gate}, {gate}, {linear};"
    )
