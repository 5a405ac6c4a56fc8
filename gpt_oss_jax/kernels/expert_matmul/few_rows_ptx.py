"""The thread program of `mosaic_gpu.few_rows`, as PTX for compute capability 9.0. Knows no JAX.

A block of four warps computes 16 outputs of one expert for up to eight rows; the warps share out
the input axis. A thread loads whole MXFP4 blocks of 16 bytes, all of them before the first is used,
decodes them in registers and multiplies with `mma.sync`: weights are the matrix of 16 rows, x that
of 8 columns. Weights are not staged in shared memory.

The matrix instruction does not care which element of a block is called which, as long as both sides
agree: x and the hidden rows are kept in the order in which the decoding leaves the weights.
"""

from __future__ import annotations

import dataclasses
import struct

MAX_ROWS = 8
MAX_PAIRS = 32
MAX_BLOCKS = 128  # On the input axis; a thread keeps a sixteenth of them of two rows.
TILE = 16
SHARED_BYTES = 3 * 32 * 16  # The sums of three warps.

# A code, moved to where bf16 has its sign and the last bits of its exponent and first of its
# mantissa, is its value times 2^-126. The scale's power of two puts back 62 of these exponents, the
# end of the sum 64, so that scales from 2^-60 to 2^65 are exact; larger ones give infinity.
_SCALE_BIAS, _LARGEST_SCALE, _LAST_FACTOR = 62, 193, 2.0**64


@dataclasses.dataclass(frozen=True)
class Projection:
    """One launch, and the program of its threads.

    Attributes:
      experts: Experts in all.
      rows: Outputs of an expert.
      blocks: MXFP4 blocks of its input axis.
      choices: Experts of a token.
      tokens: Rows of x.
      bias_bytes: 2 for bfloat16, 4 for float32.
      limit: Clamp of the SwiGLU that pairs of outputs go through; None for the down projection,
        whose outputs are multiplied with the routing weight instead.
    """

    experts: int
    rows: int
    blocks: int
    choices: int
    tokens: int
    bias_bytes: int
    limit: float | None = None

    @property
    def pairs(self) -> int:
        """Pairs (row of x, choice)."""
        return self.tokens * self.choices

    @property
    def grid(self) -> int:
        """Thread blocks; those of experts that nobody chose end at once."""
        return min(self.pairs, self.experts) * (self.rows // TILE)

    @property
    def overlaps(self) -> bool:
        """Whether the down projection starts before the up projection ends, for its weights.

        With one row it was 1.5 us slower.
        """
        return self.tokens > 1

    @property
    def width(self) -> int:
        """Values of a row of x, as it is read."""
        return 128 * -(-self.blocks // 4)

    def ptx(self) -> str:
        """The thread program.

        Its operands: the thread block, pointers to packed blocks, scales, x, experts, bias, for the
        down projection routing weights, the result and shared memory.
        """
        down = self.limit is None
        order = "griddepcontrol.wait;" if down else "griddepcontrol.launch_dependents;"
        operands = ["block", "blocks", "scales", "x", "experts", "bias"]
        operands += ["weights"] * down + ["out", "shared"]
        text = "\n".join(
            [
                _REGISTERS,
                self._who(),
                self._loads(),
                order if self.overlaps else "",
                self._products(),
                _SUM_OVER_WARPS,
                *(self._finish(column) for column in range(2)),
                "DONE:",
            ]
        )
        for i, name in enumerate(operands):
            text = text.replace(f"<{name}>", f"${i}")
        return "{\n" + text + "\n}"

    @property
    def _steps(self) -> int:
        return -(-self.blocks // 16)

    def _who(self) -> str:
        """Which expert, which outputs, and the pair (token, choice) of each column.

        Under vmap there are several grids, one after the other.
        """
        tiles = self.rows // TILE
        text = f"""
mov.u32 warp, %tid.x; and.b32 lane, warp, 31; shr.u32 warp, warp, 5;
shr.u32 g, lane, 2; and.b32 q, lane, 3; mad.lo.u32 blk, warp, 4, q;
rem.u32 t1, <block>, {self.grid};
div.u32 visit, t1, {tiles}; mul.lo.u32 t0, visit, {tiles}; sub.u32 tile, t1, t0;"""
        if self.tokens == 1:
            return f"""{text}
mul.wide.u32 at, visit, 4; add.u64 at, at, <experts>; ld.global.u32 expert, [at];
mov.u32 pair, visit;"""
        return f"""{text}
mov.u32 mine, -1; setp.lt.u32 p, lane, {self.pairs};
mul.wide.u32 at, lane, 4; add.u64 at, at, <experts>; @p ld.global.u32 mine, [at];
match.any.sync.b32 same, mine, -1; brev.b32 first, same; clz.b32 first, first;
setp.eq.and.u32 p, first, lane, p; vote.sync.ballot.b32 leaders, p, -1;
add.u32 t0, visit, 1; fns.b32 first, leaders, 0, t0; setp.eq.u32 p, first, -1; @p bra DONE;
shfl.sync.idx.b32 expert, mine, first, 31, -1; shfl.sync.idx.b32 members, same, first, 31, -1;
add.u32 t0, g, 1; fns.b32 pair, members, 0, t0;
setp.eq.u32 p, pair, -1; selp.u32 pair, first, pair, p;"""

    def _loads(self) -> str:
        """All weights and scales of a thread: w[row][step], s[row][step]."""
        row_of_x = "pair" if self.limit is None else "xrow"
        lines = [
            "shl.b32 row, tile, 3; add.u32 row, row, g; shl.b32 row, row, 1;",
            f"mad.lo.u32 t0, expert, {self.rows}, row;",
            f"mul.wide.u32 at, t0, {16 * self.blocks}; add.u64 at, at, <blocks>;",
            "mul.wide.u32 more, blk, 16; add.u64 at, at, more;",
            f"mul.wide.u32 ats, t0, {self.blocks}; add.u64 ats, ats, <scales>;",
            "cvt.u64.u32 more, blk; add.u64 ats, ats, more;",
            f"div.u32 xrow, pair, {self.choices};",
            f"mul.wide.u32 atx, {row_of_x}, {2 * self.width}; add.u64 atx, atx, <x>;",
            "mul.wide.u32 more, warp, 256; add.u64 atx, atx, more;",
            "mul.wide.u32 more, q, 16; add.u64 atx, atx, more;",
        ]
        for j in range(self._steps):
            guard = self._guard(j)
            if guard:
                lines.append(f"setp.lt.u32 in{j}, blk, {self.blocks - 16 * j};")
            for row in range(2):
                words = [f"w{row}_{4 * j + i}" for i in range(4)]
                lines += [f"mov.u32 {word}, 0;" for word in words if guard]
                lines += [f"mov.u32 s{row}_{j}, 0;" if guard else ""]
                lines.append(
                    f"{guard} ld.global.nc.L1::no_allocate.v4.u32 {{{', '.join(words)}}}, "
                    f"[at + {256 * j + 16 * self.blocks * row}];"
                )
        for j in range(self._steps):
            for row in range(2):
                lines.append(
                    f"{self._guard(j)} ld.global.nc.u8 s{row}_{j}, "
                    f"[ats + {16 * j + self.blocks * row}];"
                )
        return "\n".join(lines)

    def _guard(self, step: int) -> str:
        """Empty where every thread has a block of the input axis."""
        return "" if 16 * step + 16 <= self.blocks else f"@in{step}"

    def _products(self) -> str:
        lines = [f"mov.f32 {c}{i}, 0f00000000;" for c in "cd" for i in range(4)]
        for j in range(self._steps):
            lines += self._load_x(j)
            for row in range(2):
                lines.append(
                    f"min.u32 s{row}_{j}, s{row}_{j}, {_LARGEST_SCALE};"
                    f"mad.lo.u32 k{row}, s{row}_{j}, {0x00800080}, {_SCALE_BIAS * 0x00800080};"
                )
            for i in range(4):
                for row in range(2):
                    lines.append(_decode(f"w{row}_{4 * j + i}", f"k{row}", f"v{row}_"))
                for half, c in ((0, "c"), (1, "d")):
                    x = 4 * i + 2 * half
                    a = ", ".join(f"v{row}_{2 * half + k}" for k in range(2) for row in range(2))
                    acc = ", ".join(f"{c}{r}" for r in range(4))
                    lines.append(
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                        f"{{{acc}}}, {{{a}}}, {{x{x}, x{x + 1}}}, {{{acc}}};"
                    )
        return "\n".join(lines)

    def _load_x(self, step: int) -> list[str]:
        lines = []
        for i in range(4):
            words = [f"x{4 * i + r}" for r in range(4)]
            guard = self._guard(step)
            lines += [f"mov.u32 {word}, 0;" for word in words if guard]
            lines.append(
                f"{guard} ld.global.v4.u32 {{{', '.join(words)}}}, [atx + {1024 * step + 64 * i}];"
            )
        return lines

    def _finish(self, column: int) -> str:
        """Bias, then SwiGLU or routing weight, for one of a thread's two columns."""
        text = f"shl.b32 n, q, 1; add.u32 n, n, {column};"
        if self.tokens == 1:
            text += "setp.eq.u32 p, n, 0; mov.u32 pair, visit;"
        else:
            text += "add.u32 n, n, 1; fns.b32 pair, members, 0, n; setp.ne.u32 p, pair, -1;"
        text += f"mad.lo.u32 t0, expert, {self.rows}, row;"
        text += f"mul.wide.u32 at, t0, {self.bias_bytes};"
        text += "add.u64 at, at, <bias>;"
        if self.bias_bytes == 2:
            text += "@p ld.global.nc.u32 t0, [at]; shl.b32 t1, t0, 16; mov.b32 b0, t1;"
            text += "and.b32 t1, t0, 0xFFFF0000; mov.b32 b1, t1;"
        else:
            text += "@p ld.global.nc.v2.f32 {b0, b1}, [at];"
        for r in range(2):
            text += f"fma.rn.f32 f{r}, c{2 * r + column}, {_float(_LAST_FACTOR)}, b{r};"
        text += "\n"
        if self.limit is None:
            text += f"mad.lo.u32 t0, pair, {self.rows}, row;"
            text += "mul.wide.u32 at, t0, 4; add.u64 at, at, <out>;"
            text += "mul.wide.u32 more, pair, 4; add.u64 more, more, <weights>;"
            text += "@p ld.global.nc.f32 b0, [more]; mul.f32 f0, f0, b0; mul.f32 f1, f1, b0;"
            return text + "@p st.global.v2.f32 [at], {f0, f1};"
        width = 128 * -(-self.rows // 256)
        limit, minus = _float(self.limit), _float(-self.limit)
        text += f"min.NaN.f32 f0, f0, {limit}; min.NaN.f32 f1, f1, {limit};"
        text += f"max.NaN.f32 f1, f1, {minus}; add.f32 f1, f1, {_float(1.0)};"
        text += f"mul.f32 b0, f0, {_float(-1.702 * 1.4426950408889634)}; ex2.approx.f32 b0, b0;"
        text += f"add.f32 b0, b0, {_float(1.0)}; rcp.approx.f32 b0, b0;"
        text += "mul.f32 f0, f0, b0; mul.f32 f0, f0, f1; cvt.rn.bf16.f32 h, f0;\n"
        # Where `interleave` puts number 8 tile + g of the row.
        text += f"mul.lo.u32 t0, pair, {width};"
        text += "shr.u32 t1, tile, 4; mad.lo.u32 t0, t1, 128, t0;"
        text += "and.b32 t1, tile, 3; mad.lo.u32 t0, t1, 32, t0;"
        text += "shr.u32 t1, tile, 2; and.b32 t1, t1, 3; mad.lo.u32 t0, t1, 8, t0;"
        text += "and.b32 t1, g, 3; mad.lo.u32 t0, t1, 2, t0; shr.u32 t1, g, 2; add.u32 t0, t0, t1;"
        text += "mul.wide.u32 at, t0, 2; add.u64 at, at, <out>;"
        return text + "@p st.global.b16 [at], h;"


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
.reg .pred p, in<8>;
.reg .b16 h;
.reg .b32 t<2>, warp, lane, g, q, n, blk, visit, tile, expert, pair, row, xrow;
.reg .b32 mine, same, first, leaders, members;
.reg .b32 w0_<32>, w1_<32>, s0_<8>, s1_<8>, k<2>, v0_<4>, v1_<4>, x<16>;
.reg .f32 c<4>, d<4>, b<2>, f<2>;
.reg .b64 at, ats, atx, more;"""

# Three warps hand their sums to the first, which goes on alone.
_SUM_OVER_WARPS = "\n".join(
    [f"add.f32 c{i}, c{i}, d{i};" for i in range(4)]
    + [
        "shl.b32 t0, lane, 4; add.u32 t0, t0, <shared>;",
        "setp.ne.u32 p, warp, 0; shl.b32 t1, warp, 9; add.u32 t1, t1, t0;",
        "@p st.shared.v4.f32 [t1 + -512], {c0, c1, c2, c3};",
        "bar.sync 1, 128; @p bra DONE;",
    ]
    + [
        f"ld.shared.v4.f32 {{d0, d1, d2, d3}}, [t0 + {512 * i}];"
        + "".join(f"add.f32 c{r}, c{r}, d{r};" for r in range(4))
        for i in range(3)
    ]
)
