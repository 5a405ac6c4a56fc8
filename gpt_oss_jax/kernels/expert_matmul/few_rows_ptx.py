"""The thread program of `mosaic_gpu.few_rows`, as PTX for compute capability 9.0. Knows no JAX.

A warp computes 16 outputs of one expert for up to eight rows (a unit), then the next 16 that fall
to it. Two warps share a unit, each half of the input axis. A thread copies the MXFP4 blocks that it
will need to shared memory well ahead, one block of 16 bytes of each of two rows a step; it reads
only what it copied itself, so no warp waits for another but to add up the halves. It decodes in
registers and multiplies with `mma.sync`: weights are the matrix of 16 rows, x that of 8 columns.

The matrix instruction does not care which element of a block is called which, as long as both sides
agree: x and the hidden rows are kept in the order in which the decoding leaves the weights.
"""

from __future__ import annotations

import dataclasses
import struct

MAX_ROWS = 8
MAX_PAIRS = 32
TILE = 16
WARPS = 4
_UNROLLED = 1
_SPLIT = 2
BLOCKS = 6 * 132  # That run at a time on an H100 or H200.
_AHEAD = 5  # Steps, of four blocks of a row each, that are on their way to a warp.

# A code, moved to where bf16 has its sign and the last bits of its exponent and first of its
# mantissa, is its value times 2^-126. The scale's power of two puts back 62 of these exponents, the
# end of the sum 64, so that scales up to 2^65 are exact; a larger one would count as that.
_SCALE_BIAS, _LARGEST_SCALE, _LAST_FACTOR = 62, 192, 2.0**64


@dataclasses.dataclass(frozen=True)
class Projection:
    """One launch, and the program of its threads.

    Attributes:
      rows: Outputs of an expert.
      blocks: MXFP4 blocks of its input axis.
      choices: Experts of a token.
      tokens: Rows of x.
      bias_bytes: float32 or bfloat16.
      limit: Clamp of the SwiGLU that pairs of outputs go through; None for the down projection,
        whose outputs are multiplied with the routing weight instead.
      out_width: Of the hidden rows, what comes after the last being zero.
      grid: Thread blocks.
    """

    rows: int
    blocks: int
    choices: int
    tokens: int
    bias_bytes: int
    limit: float | None = None
    out_width: int = 0
    grid: int = BLOCKS

    @property
    def pairs(self) -> int:
        return self.tokens * self.choices

    def ptx(self) -> str:
        """The thread program. Operands: block, blocks, scales, x, experts, bias, for down weights, result, scratch."""
        down = self.limit is None
        operands = ["cta", "blocks", "scales", "x", "experts", "bias"]
        operands += ["weights"] * down + ["out", "shared"]
        width = 64 * _SPLIT * self._span  # Bytes of a row of x.
        row_of_x = "mov.u32 t0, pair;" if down else f"div.u32 t0, pair, {self.choices};"
        text = f"""{_REGISTERS}
mov.u32 warp, %tid.x; and.b32 lane, warp, 31; shr.u32 warp, warp, 5;
shr.u32 g, lane, 2; and.b32 q, lane, 3;
mad.lo.u32 ring, warp, {self._warp_bytes}, <shared>; add.u32 spare, ring, {self._ring_bytes};
mad.lo.u32 ring, lane, 32, ring; mov.u32 slot, ring; mov.u32 turn, 0;
add.u32 now, spare, {self._scale_bytes};
shr.u32 unit, warp, {_SPLIT - 1}; and.b32 part, warp, {_SPLIT - 1};
mad.lo.u32 unit, unit, {self.grid}, <cta>;
mad.lo.u32 first, part, {self._span}, q; mad.lo.u32 stop, part, {self._span}, {self._span};
{self._count()}
setp.ge.u32 p, unit, total; @p bra DONE;
{self._locate()}
{self._copy_scales()}
{"".join(self._copy_weights(slot) for slot in range(self._slots))}
add.u64 at, at, {64 * self._slots}; add.u32 coming, coming, {4 * self._slots};
{"griddepcontrol.wait;" if down else "griddepcontrol.launch_dependents;"}
UNIT:
mov.u32 expert, next_expert; mad.lo.u32 row, g, 2, next_row; mov.u32 members, next_members;
xor.b32 now, now, spare; xor.b32 spare, spare, now; xor.b32 now, now, spare;
{self._pair("g")}
{row_of_x} mul.wide.u32 atx, t0, {width}; add.u64 atx, atx, <x>;
mul.wide.u32 more, q, 16; add.u64 atx, atx, more;
mul.wide.u32 more, part, {64 * self._span}; add.u64 atx, atx, more;
mad.lo.u32 ats, g, {2 * self.blocks}, now; add.u32 ats, ats, first; mov.u32 rounds, {self._span // (4 * self._unrolled)};
{"".join(f"mov.f32 {c}{i}, 0f00000000;" for c in "cd" for i in range(4))}
ROUND:
setp.lt.u32 p, coming, stop; @p bra GO;
add.u32 unit, unit, {WARPS // _SPLIT * self.grid}; mov.u32 coming, {1 << 30};
setp.ge.u32 p, unit, total; @p bra GO;
{self._locate()}
{self._copy_scales()}
GO:
{self._round()}
add.u64 at, at, {64 * self._unrolled}; add.u32 coming, coming, {4 * self._unrolled};
add.u32 slot, slot, {1024 * self._unrolled}; add.u32 t0, ring, {self._ring_bytes};
setp.eq.u32 p, slot, t0; @p mov.u32 slot, ring;
add.u32 ats, ats, {4 * self._unrolled}; add.u64 atx, atx, {256 * self._unrolled};
sub.u32 rounds, rounds, 1; setp.ne.u32 p, rounds, 0; @p bra ROUND;
{"".join(f"add.f32 c{i}, c{i}, d{i};" for i in range(4))}
{self._join()}
{self._finish(0)}
{self._finish(1)}
REST:
setp.lt.u32 p, unit, total; @p bra UNIT;
DONE:"""
        for i, name in enumerate(operands):
            text = text.replace(f"<{name}>", f"${i}")
        return "{\n" + text + "\n}"

    @property
    def _unrolled(self) -> int:
        return min(_UNROLLED, -(-self.blocks // (4 * _SPLIT)))

    @property
    def _span(self) -> int:
        """Blocks of the input axis that are a warp's, some of which may not exist."""
        return -(-self.blocks // (4 * _SPLIT * self._unrolled)) * 4 * self._unrolled

    @property
    def width(self) -> int:
        """Of a row of x, as it is read."""
        return 32 * _SPLIT * self._span

    @property
    def _slots(self) -> int:
        return min(_AHEAD // self._unrolled * self._unrolled, self._span // 4)

    @property
    def _ring_bytes(self) -> int:
        return 1024 * self._slots

    @property
    def _scale_bytes(self) -> int:
        return -(-TILE * _SPLIT * self._span // 128) * 128

    @property
    def shared_bytes(self) -> int:
        """Shared memory of a thread block."""
        return WARPS * (self._warp_bytes + 512)

    @property
    def _warp_bytes(self) -> int:
        return self._ring_bytes + 2 * self._scale_bytes

    def _join(self) -> str:
        """The second warp of a pair hands its sums to the first, through two buffers in turn."""
        if _SPLIT == 1:
            return ""
        return f"""xor.b32 turn, turn, 512; shr.u32 t0, warp, 1;
mad.lo.u32 t1, t0, 1024, <shared>; add.u32 t1, t1, turn; mad.lo.u32 t1, lane, 16, t1;
add.u32 t0, t0, 1; setp.eq.u32 p, part, 0; @p bra FIRST;
st.shared.v4.f32 [t1 + {WARPS * self._warp_bytes}], {{c0, c1, c2, c3}};
bar.sync t0, 64; bra REST;
FIRST:
bar.sync t0, 64; ld.shared.v4.f32 {{d0, d1, d2, d3}}, [t1 + {WARPS * self._warp_bytes}];
{"".join(f"add.f32 c{i}, c{i}, d{i};" for i in range(4))}"""

    def _count(self) -> str:
        """Which experts there are to visit, and `total` units of 16 outputs of one expert."""
        tiles = self.rows // TILE
        if self.tokens == 1:
            return f"mov.u32 total, {self.pairs * tiles}; mov.u32 next_members, 0;"
        return f"""mov.u32 mine, -1; setp.lt.u32 p, lane, {self.pairs};
mul.wide.u32 more, lane, 4; add.u64 more, more, <experts>; @p ld.global.u32 mine, [more];
match.any.sync.b32 same, mine, -1; brev.b32 t0, same; clz.b32 t0, t0;
setp.eq.and.u32 p, t0, lane, p; vote.sync.ballot.b32 leaders, p, -1;
popc.b32 total, leaders; mul.lo.u32 total, total, {tiles};"""

    def _locate(self) -> str:
        """Expert, first row and addresses of `unit`, for what is copied ahead."""
        tiles = self.rows // TILE
        text = f"div.u32 visit, unit, {tiles}; mul.lo.u32 t0, visit, {tiles};"
        text += "sub.u32 t0, unit, t0; shl.b32 next_row, t0, 4;\n"
        if self.tokens == 1:
            text += "mul.wide.u32 more, visit, 4; add.u64 more, more, <experts>;"
            text += "ld.global.u32 next_expert, [more]; mov.u32 next_members, visit;"
        else:
            text += "add.u32 t0, visit, 1; fns.b32 t0, leaders, 0, t0;"
            text += "shfl.sync.idx.b32 next_expert, mine, t0, 31, -1;"
            text += "shfl.sync.idx.b32 next_members, same, t0, 31, -1;"
        return f"""{text}
mad.lo.u32 t0, next_expert, {self.rows}, next_row;
mul.wide.u32 from, t0, {self.blocks}; add.u64 from, from, <scales>;
mul.wide.u32 more, lane, 16; add.u64 from, from, more;
mad.lo.u32 t0, g, 2, t0; mul.wide.u32 at, t0, {16 * self.blocks}; add.u64 at, at, <blocks>;
mul.wide.u32 more, first, 16; add.u64 at, at, more; mov.u32 coming, first;"""

    def _pair(self, column: str) -> str:
        """`pair` (token, choice) of a column, and in `p` whether there is one."""
        if self.tokens == 1:
            return f"setp.eq.u32 p, {column}, 0; mov.u32 pair, members;"
        return f"""add.u32 t0, {column}, 1; fns.b32 t0, members, 0, t0; setp.ne.u32 p, t0, -1;
brev.b32 pair, members; clz.b32 pair, pair; selp.u32 pair, t0, pair, p;"""

    def _copy_scales(self) -> str:
        """The scales of 16 rows lie together: all of a unit's, copied by all lanes."""
        text = "mad.lo.u32 t0, lane, 16, spare;\n"
        for first in range(0, self.blocks, 32):
            text += f"setp.lt.u32 p, lane, {self.blocks - first};"
            text += (
                f"@p cp.async.cg.shared.global [t0 + {16 * first}], [from + {16 * first}], 16;\n"
            )
        return text

    def _copy_weights(self, slot: int) -> str:
        """One block of each of a thread's two rows, and the end of a group of copies."""
        text = f"setp.lt.u32 p, coming, {self.blocks - 4 * slot};"
        for row in range(2):
            text += f"@p cp.async.cg.shared.global [slot + {1024 * slot + 16 * row}], "
            text += f"[at + {64 * slot + 16 * self.blocks * row}], 16;"
        return text + "cp.async.commit_group;\n"

    def _round(self) -> str:
        text = ""
        for slot in range(self._unrolled):
            text += f"cp.async.wait_group {self._slots - 1};\n"
            if slot == 0:
                text += "bar.warp.sync -1;\n"
            text += self._load_x(slot)
            for row in range(2):
                words = ", ".join(f"w{row}_{i}" for i in range(4))
                text += f"ld.shared.v4.u32 {{{words}}}, [slot + {1024 * slot + 16 * row}];"
                text += f"ld.shared.u8 s{row}, [ats + {self.blocks * row + 4 * slot}];\n"
            text += self._copy_weights(slot)
            text += self._step(slot)
        return text

    def _load_x(self, slot: int) -> str:
        text = ""
        for i in range(4):
            words = ", ".join(f"x{4 * i + r}" for r in range(4))
            text += f"ld.global.v4.u32 {{{words}}}, [atx + {256 * slot + 64 * i}];\n"
        return text

    def _step(self, slot: int) -> str:
        """Decodes and multiplies one block of each of two rows."""
        text = ""
        for row in range(2):
            text += f"min.u32 s{row}, s{row}, {_LARGEST_SCALE};"
            text += f"mad.lo.u32 s{row}, s{row}, {0x00800080}, {_SCALE_BIAS * 0x00800080};\n"
        for i in range(4):
            for row in range(2):
                text += _decode(f"w{row}_{i}", f"s{row}", f"v{row}_")
            for half, c in enumerate("cd"):
                x = 4 * i + 2 * half
                a = ", ".join(f"v{row}_{2 * half + k}" for k in range(2) for row in range(2))
                acc = ", ".join(f"{c}{r}" for r in range(4))
                text += (
                    "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                    f"{{{acc}}}, {{{a}}}, {{x{x}, x{x + 1}}}, {{{acc}}};\n"
                )
        return text

    def _finish(self, column: int) -> str:
        """Bias, then SwiGLU or routing weight, for one of a thread's two columns."""
        text = f"shl.b32 n, q, 1; add.u32 n, n, {column};"
        text += self._pair("n")
        text += f"mad.lo.u32 t0, expert, {self.rows}, row;"
        text += f"mul.wide.u32 to, t0, {self.bias_bytes};"
        text += "add.u64 to, to, <bias>;"
        if self.bias_bytes == 2:
            text += "@p ld.global.nc.u32 t0, [to]; shl.b32 t1, t0, 16; mov.b32 b0, t1;"
            text += "and.b32 t1, t0, 0xFFFF0000; mov.b32 b1, t1;"
        else:
            text += "@p ld.global.nc.v2.f32 {b0, b1}, [to];"
        for r in range(2):
            text += f"fma.rn.f32 f{r}, c{2 * r + column}, {_float(_LAST_FACTOR)}, b{r};"
        text += "\n"
        if self.limit is None:
            text += f"mad.lo.u32 t0, pair, {self.rows}, row;"
            text += "mul.wide.u32 to, t0, 4; add.u64 to, to, <out>;"
            text += "mul.wide.u32 more, pair, 4; add.u64 more, more, <weights>;"
            text += "@p ld.global.nc.f32 b0, [more]; mul.f32 f0, f0, b0; mul.f32 f1, f1, b0;"
            return text + "@p st.global.v2.f32 [to], {f0, f1};"
        limit, minus = _float(self.limit), _float(-self.limit)
        text += f"min.NaN.f32 f0, f0, {limit}; min.NaN.f32 f1, f1, {limit};"
        text += f"max.NaN.f32 f1, f1, {minus}; add.f32 f1, f1, {_float(1.0)};"
        text += f"mul.f32 b0, f0, {_float(-1.702 * 1.4426950408889634)}; ex2.approx.f32 b0, b0;"
        text += f"add.f32 b0, b0, {_float(1.0)}; rcp.approx.f32 b0, b0;"
        text += "mul.f32 f0, f0, b0; mul.f32 f0, f0, f1; cvt.rn.bf16.f32 h, f0;\n"
        text += "shr.u32 t1, row, 1;" + self._place_hidden() + "@p st.global.b16 [to], h;\n"
        # The first units also write the zeros.
        empty = self.out_width - self.rows // 2
        text += f"shr.u32 t1, row, 1; setp.lt.and.u32 p, t1, {empty}, p; mov.b16 h, 0;"
        text += f"add.u32 t1, t1, {self.rows // 2};"
        return text + self._place_hidden() + "@p st.global.b16 [to], h;"

    def _place_hidden(self) -> str:
        """Address of hidden value t1 of a pair, in the order of `interleave`."""
        return f"""mul.lo.u32 t0, pair, {self.out_width};
shr.u32 n, t1, 7; mad.lo.u32 t0, n, 128, t0; bfe.u32 n, t1, 3, 2; mad.lo.u32 t0, n, 32, t0;
bfe.u32 n, t1, 5, 2; mad.lo.u32 t0, n, 8, t0; and.b32 n, t1, 3; mad.lo.u32 t0, n, 2, t0;
bfe.u32 n, t1, 2, 1; add.u32 t0, t0, n; mul.wide.u32 to, t0, 2; add.u64 to, to, <out>;
"""


def _float(value: float) -> str:
    return f"0f{struct.pack('>f', value).hex()}"


def _decode(word: str, scale: str, out: str) -> str:
    """Eight codes to four registers of two bf16: 0 and 4, 1 and 5, 2 and 6, 3 and 7.

    One product with two powers of two moves sign and magnitude to their places.
    """
    text = ""
    for i, (mask, factor) in enumerate(((0x000F000F, 0x1040), (0x00F000F0, 0x0104)) * 2):
        if i == 2:
            text += f"shr.u32 t0, {word}, 8;"
        text += f"and.b32 t1, {word if i < 2 else 't0'}, {mask}; mul.lo.u32 t1, t1, {factor};"
        text += f"and.b32 t1, t1, {0x81C081C0}; mul.bf16x2 {out}{i}, t1, {scale};"
    return text


_REGISTERS = """
.reg .pred p;
.reg .b16 h;
.reg .b32 t<2>, warp, lane, g, q, n, rounds, coming, visit, unit, total, pair, row, expert, members;
.reg .b32 mine, same, leaders, next_row, next_expert, next_members, ring, slot, spare, now, ats;
.reg .b32 part, first, stop, turn;
.reg .b32 w0_<4>, w1_<4>, s<2>, v0_<4>, v1_<4>, x<16>;
.reg .f32 c<4>, d<4>, b<2>, f<2>;
.reg .b64 at, from, atx, to, more;"""
