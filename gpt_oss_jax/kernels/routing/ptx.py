"""A warp chooses the experts of a row, as PTX for compute capability 9.0. Knows no JAX."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

from gpt_oss_jax.kernels.ptx import NEXT, WAIT, literal

_WARPS = 4


def choose(experts: int, choices: int) -> str:
    """The largest logits of a row, of equal ones those of lower ids, and a softmax over them.

    A lane has of all experts its own number, `lane`, and each 32 further: in `key0`, `key1` and so
    on come their logits, float32, anything for experts that there are not. Lane c gets in `place`
    choice c, largest first, and in `f1` its weight. Uses the predicates p and in, the words t0, t1,
    w0 and head, and the floats f0 and f2.
    """
    keys = range(-(-experts // 32))
    text = "mov.b32 head, 0;\n"
    for j in keys:
        # Integers that are ordered as the floats are; what has been taken becomes 0.
        text += f"setp.lt.u32 p, key{j}, {1 << 31}; selp.b32 t1, {1 << 31}, {(1 << 32) - 1}, p;"
        text += f"xor.b32 key{j}, key{j}, t1; add.u32 t0, lane, {32 * j};"
        text += f"setp.lt.u32 in, t0, {experts}; @!in mov.b32 key{j}, 0;\n"
    for choice in range(choices):
        text += "mov.b32 t0, key0;" + "".join(f"max.u32 t0, t0, key{j};" for j in keys[1:])
        text += "redux.sync.max.u32 t0, t0, -1; mov.b32 t1, -1;"
        for j in reversed(keys):
            text += f"setp.eq.u32 p, key{j}, t0; add.u32 w0, lane, {32 * j};"
            text += "selp.b32 t1, w0, t1, p;"
        text += "redux.sync.min.u32 t1, t1, -1;\n"
        text += f"setp.eq.u32 p, lane, {choice}; @p mov.b32 place, t1; @p mov.b32 head, t0;"
        for j in keys:
            text += f"add.u32 w0, lane, {32 * j}; setp.eq.u32 p, w0, t1; @p mov.b32 key{j}, 0;"
    text += f"""
setp.lt.u32 p, head, {1 << 31}; selp.b32 t1, {(1 << 32) - 1}, {1 << 31}, p; xor.b32 f1, head, t1;
mov.b32 t1, 0; shfl.sync.idx.b32 f0, f1, t1, 31, -1; sub.f32 f1, f1, f0;
mul.f32 f1, f1, {literal(math.log2(math.e))}; ex2.approx.f32 f1, f1;
setp.lt.u32 p, lane, {choices}; @!p mov.b32 f1, 0; mov.b32 f0, f1;
"""
    for distance in (d for d in (16, 8, 4, 2, 1) if d < choices):
        text += f"shfl.sync.bfly.b32 f2, f0, {distance}, 31, -1; add.f32 f0, f0, f2;"
    return text + "div.rn.f32 f1, f1, f0;\n"


@dataclasses.dataclass(frozen=True)
class Choice:
    """The choices of many rows, a warp to a row.

    Attributes:
      rows: Rows.
      experts: Experts to choose from.
      choices: Experts of a row, up to 32.
    """

    rows: int
    experts: int
    choices: int
    warps: ClassVar[int] = _WARPS

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return -(-self.rows // _WARPS)

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to the logits, float32 [rows, experts], the chosen
        experts, their weights and shared memory, which is not used.
        """
        keys = range(-(-self.experts // 32))
        text = f"""{{
.reg .pred p, in; .reg .b32 t<2>, w0, head, place, lane, row, f<3>, key<{len(keys)}>;
.reg .b64 at, more;
{NEXT} {WAIT}
mov.u32 lane, %tid.x; shr.u32 row, lane, 5; and.b32 lane, lane, 31;
rem.u32 t0, $0, {self.grid}; mad.lo.u32 row, t0, {_WARPS}, row;
setp.ge.u32 p, row, {self.rows}; @p bra DONE;
mad.lo.u32 t0, row, {self.experts}, lane; mul.wide.u32 at, t0, 4; add.u64 at, at, $1;
"""
        for j in keys:
            text += f"setp.lt.u32 p, lane, {self.experts - 32 * j};"
            text += f"mov.b32 key{j}, 0; @p ld.global.b32 key{j}, [at + {128 * j}];\n"
        return f"""{text}{choose(self.experts, self.choices)}
setp.lt.u32 p, lane, {self.choices}; mad.lo.u32 t0, row, {self.choices}, lane;
mul.wide.u32 at, t0, 4; add.u64 more, at, $2; @p st.global.b32 [more], place;
add.u64 more, at, $3; @p st.global.b32 [more], f1;
DONE:
}}"""
