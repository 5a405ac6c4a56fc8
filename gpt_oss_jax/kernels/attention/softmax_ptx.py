"""Pieces of PTX with which `few_queries_ptx` attends to one tile, and joins what came of several.

They work on its registers: q, k and v hold queries, keys and values as the matrix instructions take
them, s scores, w weights, o sums of weighted values, largest and total what the softmax needs.
"""

from __future__ import annotations

import math

from gpt_oss_jax.kernels.ptx import literal

HEAD = 64
# Scores count in powers of two.
SCALE = literal(HEAD**-0.5 * math.log2(math.e))
_MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def scores() -> str:
    """Of query g with keys 4 q and 4 q + 1 (s0), 4 q + 2 and 4 q + 3 (s1)."""
    text = "".join(f"mov.f32 s{n}_{i}, 0f00000000;" for n in range(2) for i in range(4)) + "\n"
    for j in range(0, 8, 2):
        for n in range(2):
            s = ", ".join(f"s{n}_{i}" for i in range(4))
            text += f"{_MMA} {{{s}}}, {{q{j}, zero, q{j + 1}, zero}}, "
            text += f"{{k{n}_{j}, k{n}_{j + 1}}}, {{{s}}};\n"
    return text


def across(operation: str, register: str) -> str:
    """Over the four lanes of a query."""
    return "".join(
        f"mov.b32 t0, {register}; shfl.sync.bfly.b32 t0, t0, {lanes}, 31, -1; mov.b32 f, t0;"
        f"{operation}.f32 {register}, {register}, f;\n"
        for lanes in (1, 2)
    )


def weights() -> str:
    """Scores to weights; what was summed up before shrinks as the largest score grows."""
    names = [f"s{n}_{i}" for n in range(2) for i in range(2)]
    text = "mov.f32 before, largest;"
    text += "".join(f"max.f32 largest, largest, {name};" for name in names) + "\n"
    text += across("max", "largest")
    text += f"mul.f32 f, largest, {literal(-(HEAD**-0.5) * math.log2(math.e))};"
    text += f"fma.rn.f32 before, before, {SCALE}, f; ex2.approx.f32 before, before;"
    text += "mul.f32 total, total, before;\n"
    for name in names:
        text += f"fma.rn.f32 {name}, {name}, {SCALE}, f; ex2.approx.f32 {name}, {name};"
        text += f"add.f32 total, total, {name};\n"
    text += "cvt.rn.bf16x2.f32 w0, s0_1, s0_0; cvt.rn.bf16x2.f32 w1, s1_1, s1_0;\n"
    # The sums of a lane are of queries 2 q and 2 q + 1.
    text += "mov.b32 t0, before; shl.b32 t1, q, 3; shfl.sync.idx.b32 t2, t0, t1, 31, -1;"
    text += "mov.b32 f, t2; add.u32 t1, t1, 4; shfl.sync.idx.b32 t2, t0, t1, 31, -1;"
    text += "mov.b32 before, t2;\n"
    return text + "".join(f"mul.f32 o{i}, o{i}, {'before' if i % 2 else 'f'};" for i in range(16))


def values() -> str:
    """Adds weighted values: o[4 w + 2 e + n] of element 8 g + 2 w + e and query 2 q + n."""
    text = ""
    for w in range(4):
        for i, (a, b, halves) in enumerate(
            ((0, 1, 0x5410), (0, 1, 0x7632), (2, 3, 0x5410), (2, 3, 0x7632))
        ):
            text += f"prmt.b32 a{i}, v{a}_{w}, v{b}_{w}, {halves};"
        o = ", ".join(f"o{4 * w + i}" for i in range(4))
        text += f"\n{_MMA} {{{o}}}, {{a0, a1, a2, a3}}, {{w0, w1}}, {{{o}}};\n"
    return text


def combine(parts: int) -> str:
    """Parts (largest m, total l, elements x and y) to one: largest, total, o0, o1."""
    text = "mov.f32 largest, m0;"
    text += "".join(f"max.f32 largest, largest, m{n};" for n in range(1, parts))
    text += "mov.f32 total, 0f00000000; mov.f32 o0, total; mov.f32 o1, total;\n"
    for n in range(parts):
        text += f"sub.f32 m{n}, m{n}, largest; ex2.approx.f32 m{n}, m{n};"
        for to, part in (("total", "l"), ("o0", "x"), ("o1", "y")):
            text += f"fma.rn.f32 {to}, m{n}, {part}{n}, {to};"
        text += "\n"
    return text
