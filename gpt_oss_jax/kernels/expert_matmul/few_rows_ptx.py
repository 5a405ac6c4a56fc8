"""The thread program of `mosaic_gpu.few_rows`, as PTX for compute capability 9.0. Knows no JAX.

A block of four warps computes 16 outputs of one expert for up to 32 rows (a tile), then the next
tile that falls to it. In checkpoint order the weights of a tile lie together: the copy engine
brings them to shared memory in one piece, some tiles ahead. The warps share out the input axis. A
thread takes MXFP4 blocks of 16 bytes, decodes them in registers and multiplies with `mma.sync`:
weights are the matrix of 16 rows, x one to four of 8 columns.

The matrix instruction does not care which element of a block is called which, as long as both sides
agree: x and the hidden rows are kept in the order in which the decoding leaves the weights.
"""

from __future__ import annotations

import dataclasses

from gpt_oss_jax.kernels.expert_matmul.mxfp4_ptx import (
    LAST_FACTOR,
    decode,
    literal,
    scale,
    swiglu,
)

MAX_COLUMNS = 32
MAX_BLOCKS = 128  # On the input axis.
TILE = 16
# By matrices of eight columns: thread blocks that a multiprocessor holds, and tiles that each has
# in shared memory or on their way, as registers and shared memory allow.
RESIDENT = {1: (4, 2), 2: (3, 2), 3: (3, 2), 4: (2, 4)}


@dataclasses.dataclass(frozen=True)
class Projection:
    """One launch, and the program of its threads.

    Attributes:
      rows: Outputs of an expert.
      blocks: MXFP4 blocks of its input axis.
      choices: Experts of a token.
      pairs: Pairs (row of x, choice).
      visits: Experts to visit, at most; one for each pair if that many.
      columns: Pairs of a visit, a multiple of 8, or 1 if every pair is a visit.
      bias_bytes: 2 for bfloat16, 4 for float32.
      limit: Clamp of the SwiGLU that pairs of outputs go through; None for the down projection,
        whose outputs are multiplied with the routing weight instead.
      multiprocessors: Of the device; it runs with any number.
    """

    rows: int
    blocks: int
    choices: int
    pairs: int
    visits: int
    columns: int
    bias_bytes: int
    limit: float | None = None
    multiprocessors: int = 132

    @property
    def _groups(self) -> int:
        """Matrices of eight columns."""
        return -(-self.columns // 8)

    @property
    def grid(self) -> int:
        """Thread blocks; those for which nothing is left end at once."""
        return min(
            self.visits * (self.rows // TILE), self.multiprocessors * RESIDENT[self._groups][0]
        )

    @property
    def stage_bytes(self) -> int:
        """Packed blocks and scales of a tile."""
        return TILE * 17 * self.blocks

    @property
    def shared_bytes(self) -> int:
        """Tiles, the sums of three warps twice, and a barrier for each tile."""
        return self._stages * self.stage_bytes + 2 * self._sum_bytes + 8 * self._stages

    @property
    def _stages(self) -> int:
        return RESIDENT[self._groups][1]

    @property
    def _sum_bytes(self) -> int:
        return 3 * 32 * 16 * self._groups

    @property
    def width(self) -> int:
        """Values of a row of x, as it is read."""
        return 128 * -(-self.blocks // 4)

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block, pointers to packed blocks, scales, x, experts, members of
        the visits, bias, for the down projection routing weights, the result and shared memory.
        """
        down = self.limit is None
        order = "griddepcontrol.wait;" if down else "griddepcontrol.launch_dependents;"
        operands = ["block", "blocks", "scales", "x", "experts", "members", "bias"]
        operands += ["weights"] * down + ["out", "shared"]
        sums = self._stages * self.stage_bytes
        text = f"""{_REGISTERS}
mov.u32 warp, %tid.x; and.b32 lane, warp, 31; shr.u32 warp, warp, 5;
shr.u32 g, lane, 2; and.b32 q, lane, 3; mad.lo.u32 blk, warp, 4, q;
add.u32 bars, <shared>, {sums + 2 * self._sum_bytes};
or.b32 t0, warp, lane; setp.eq.u32 p, t0, 0;
{"".join(f"@p mbarrier.init.shared.b64 [bars + {8 * i}], 1;" for i in range(self._stages))}
@p fence.mbarrier_init.release.cluster; bar.sync 1, 128;
{self._count()}
rem.u32 unit, <block>, {self.grid}; mov.u32 ahead, unit; mov.u32 slot, 0;
setp.ge.u32 p, unit, total; @p bra DONE;
setp.ne.u32 p, warp, 0; @p bra READY;
FILL:
{self._fetch("FILLED")}
add.u32 slot, slot, 1; setp.lt.u32 p, slot, {self._stages}; @p bra FILL;
mov.u32 slot, 0;
READY:
{order}
mov.u32 phase, 0; mov.u32 turn, 0;
UNIT:
{self._locate("unit")}
{self._addresses()}
mad.lo.u32 t1, slot, 8, bars;
WAIT:
mbarrier.try_wait.parity.shared.b64 p, [t1], phase; @!p bra WAIT;
{self._products()}
{self._hand_over(sums)}
{self._fetch("FETCHED")}
{self._take_over(sums)}
{"".join(self._finish(n, column) for n in range(self._groups) for column in range(2))}
REST:
sub.u32 turn, {self._sum_bytes}, turn;
add.u32 slot, slot, 1; setp.eq.u32 p, slot, {self._stages}; @p xor.b32 phase, phase, 1;
@p mov.u32 slot, 0;
add.u32 unit, unit, {self.grid}; setp.lt.u32 p, unit, total; @p bra UNIT;
DONE:"""
        for i, name in enumerate(operands):
            text = text.replace(f"<{name}>", f"${i}")
        return "{\n" + text + "\n}"

    @property
    def _steps(self) -> int:
        return -(-self.blocks // 16)

    def _count(self) -> str:
        """How many tiles there are. Visits that are empty come last."""
        tiles = self.rows // TILE
        if self.columns == 1:
            return f"mov.u32 total, {self.visits * tiles};"
        text = "mov.u32 total, 0;\n"
        for first in range(0, self.visits, 32):
            text += f"mov.u32 t0, -1; setp.lt.u32 p, lane, {self.visits - first};"
            text += f"mul.wide.u32 at, lane, {4 * self.columns}; add.u64 at, at, <members>;"
            text += f"@p ld.global.u32 t0, [at + {4 * self.columns * first}];"
            text += "setp.ne.u32 p, t0, -1; vote.sync.ballot.b32 t0, p, -1;"
            text += "popc.b32 t0, t0; add.u32 total, total, t0;\n"
        return text + f"mul.lo.u32 total, total, {tiles};"

    def _locate(self, unit: str) -> str:
        """Visit, expert and number of a tile."""
        tiles = self.rows // TILE
        text = f"div.u32 visit, {unit}, {tiles}; mul.lo.u32 t0, visit, {tiles};"
        text += f"sub.u32 tile, {unit}, t0; mov.u32 t0, visit;\n"
        if self.columns > 1:
            text += f"mul.wide.u32 at, visit, {4 * self.columns}; add.u64 at, at, <members>;"
            text += "ld.global.u32 t0, [at];"
        text += "mul.wide.u32 at, t0, 4; add.u64 at, at, <experts>;"
        return text + "ld.global.u32 expert, [at];"

    def _member(self, column: str) -> str:
        """`pair` of a column, and in `p` whether there is one; elsewhere some pair."""
        if self.columns == 1:
            return f"setp.eq.u32 p, {column}, 0; mov.u32 pair, visit;"
        return f"""mad.lo.u32 t0, visit, {self.columns}, {column};
mul.wide.u32 at, t0, 4; add.u64 at, at, <members>; ld.global.u32 pair, [at];
setp.ne.u32 p, pair, -1; selp.u32 pair, pair, 0, p;"""

    def _fetch(self, label: str) -> str:
        """Starts to copy tile `ahead` to `slot`, if there is one; leaves what `_locate` said."""
        size, codes = self.stage_bytes, 16 * TILE * self.blocks
        bulk = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        return f"""setp.ge.u32 p, ahead, total; @p bra {label};
mov.u32 kept_visit, visit; mov.u32 kept_tile, tile; mov.u32 kept_expert, expert;
{self._locate("ahead")}
mad.lo.u32 t0, expert, {self.rows // TILE}, tile; setp.eq.u32 p, lane, 0;
mad.lo.u32 t1, slot, {size}, <shared>; mad.lo.u32 bar, slot, 8, bars;
@p mbarrier.arrive.expect_tx.shared.b64 _, [bar], {size};
mul.wide.u32 at, t0, {codes}; add.u64 at, at, <blocks>; @p {bulk} [t1], [at], {codes}, [bar];
mul.wide.u32 at, t0, {size - codes}; add.u64 at, at, <scales>; add.u32 t1, t1, {codes};
@p {bulk} [t1], [at], {size - codes}, [bar];
mov.u32 visit, kept_visit; mov.u32 tile, kept_tile; mov.u32 expert, kept_expert;
add.u32 ahead, ahead, {self.grid};
{label}:"""

    def _addresses(self) -> str:
        """Of a thread's rows of x, of the weights and of the scales."""
        choice = "" if self.limit is None else f"div.u32 pair, pair, {self.choices};"
        text = ""
        for n in range(self._groups):
            text += f"add.u32 n, g, {8 * n};{self._member('n')}{choice}\n"
            text += f"mul.wide.u32 atx{n}, pair, {2 * self.width}; add.u64 atx{n}, atx{n}, <x>;"
            text += f"mul.wide.u32 more, warp, 256; add.u64 atx{n}, atx{n}, more;"
            text += f"mul.wide.u32 more, q, 16; add.u64 atx{n}, atx{n}, more;\n"
        return f"""{text}
mad.lo.u32 aw, slot, {self.stage_bytes}, <shared>;
mad.lo.u32 as, g, {2 * self.blocks}, blk; add.u32 as, as, aw;
add.u32 as, as, {16 * TILE * self.blocks};
mad.lo.u32 aw, g, {32 * self.blocks}, aw; mad.lo.u32 aw, blk, 16, aw;
shl.b32 row, tile, 3; add.u32 row, row, g; shl.b32 row, row, 1;"""

    def _guard(self, step: int) -> str:
        """Empty where every thread has a block of the input axis."""
        return "" if 16 * step + 16 <= self.blocks else "@in"

    def _products(self) -> str:
        text = "".join(f"mov.f32 c{i}, 0f00000000;" for i in range(8 * self._groups))
        for step in range(self._steps):
            if guard := self._guard(step):
                text += f"setp.lt.u32 in, blk, {self.blocks - 16 * step};"
            for row in range(2):
                words = [f"w{row}_{i}" for i in range(4)]
                if guard:
                    text += "".join(f"mov.u32 {word}, 0;" for word in (*words, f"s{row}"))
                text += (
                    f"{guard} ld.shared.v4.u32 {{{', '.join(words)}}}, "
                    f"[aw + {256 * step + 16 * self.blocks * row}];"
                    f"{guard} ld.shared.u8 s{row}, [as + {16 * step + self.blocks * row}];\n"
                )
            for row in range(2):
                text += scale(f"s{row}", f"k{row}") + "\n"
            for i in range(4):
                text += "".join(self._load_x(step, i, n) for n in range(self._groups))
                for row in range(2):
                    text += decode(f"w{row}_{i}", f"k{row}", f"v{row}_") + "\n"
                for n in range(self._groups):
                    for half in range(2):
                        a = ", ".join(f"v{r}_{2 * half + k}" for k in range(2) for r in range(2))
                        acc = ", ".join(f"c{8 * n + 4 * half + r}" for r in range(4))
                        text += (
                            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {"
                            f"{acc}}}, {{{a}}}, {{x{4 * n + 2 * half}, x{4 * n + 2 * half + 1}}}, "
                            f"{{{acc}}};\n"
                        )
        for n in range(self._groups):
            for r in range(8 * n, 8 * n + 4):
                text += f"add.f32 c{r}, c{r}, c{r + 4};"
        return text

    def _load_x(self, step: int, i: int, n: int) -> str:
        words = [f"x{4 * n + r}" for r in range(4)]
        guard = self._guard(step)
        text = "".join(f"mov.u32 {word}, 0;" for word in words) if guard else ""
        at = f"atx{n} + {1024 * step + 64 * i}"
        return f"{text}{guard} ld.global.v4.u32 {{{', '.join(words)}}}, [{at}];\n"

    def _hand_over(self, sums: int) -> str:
        """Three warps hand their sums to the first, through two places in turn, and go on.

        Once all are here the tile has been read, and the next may come to its place.
        """
        text = "add.u32 t0, turn, <shared>; mad.lo.u32 t0, lane, 16, t0;"
        text += f"setp.ne.u32 p, warp, 0; mad.lo.u32 t1, warp, {512 * self._groups}, t0;"
        for n in range(self._groups):
            place = sums + 512 * (n - self._groups)
            acc = ", ".join(f"c{8 * n + r}" for r in range(4))
            text += f"@p st.shared.v4.f32 [t1 + {place}], {{{acc}}};\n"
        return text + "bar.sync 1, 128; @p bra REST;"

    def _take_over(self, sums: int) -> str:
        text = "add.u32 t0, turn, <shared>; mad.lo.u32 t0, lane, 16, t0;\n"
        for warp in range(3):
            for n in range(self._groups):
                place = sums + 512 * (warp * self._groups + n)
                text += f"ld.shared.v4.f32 {{d0, d1, d2, d3}}, [t0 + {place}];"
                text += "".join(f"add.f32 c{8 * n + r}, c{8 * n + r}, d{r};" for r in range(4))
        return text

    def _finish(self, group: int, column: int) -> str:
        """Bias, then SwiGLU or routing weight, for one of a thread's two columns of a group."""
        text = f"shl.b32 n, q, 1; add.u32 n, n, {8 * group + column}; {self._member('n')}"
        text += f"mad.lo.u32 t0, expert, {self.rows}, row;"
        text += f"mul.wide.u32 at, t0, {self.bias_bytes};"
        text += "add.u64 at, at, <bias>;"
        if self.bias_bytes == 2:
            text += "@p ld.global.nc.u32 t0, [at]; shl.b32 t1, t0, 16; mov.b32 b0, t1;"
            text += "and.b32 t1, t0, 0xFFFF0000; mov.b32 b1, t1;"
        else:
            text += "@p ld.global.nc.v2.f32 {b0, b1}, [at];"
        for r in range(2):
            text += f"fma.rn.f32 f{r}, c{8 * group + 2 * r + column}, {literal(LAST_FACTOR)}, b{r};"
        text += "\n"
        if self.limit is None:
            text += f"mad.lo.u32 t0, pair, {self.rows}, row;"
            text += "mul.wide.u32 at, t0, 4; add.u64 at, at, <out>;"
            text += "mul.wide.u32 more, pair, 4; add.u64 more, more, <weights>;"
            text += "@p ld.global.nc.f32 b0, [more]; mul.f32 f0, f0, b0; mul.f32 f1, f1, b0;"
            return text + "@p st.global.v2.f32 [at], {f0, f1};\n"
        width = 128 * -(-self.rows // 256)
        text += swiglu("f0", "f1", self.limit)
        text += "cvt.rn.bf16.f32 h, f0;\n"
        # Where `interleave` puts number 8 tile + g of the row.
        text += f"mul.lo.u32 t0, pair, {width};"
        text += "shr.u32 t1, tile, 4; mad.lo.u32 t0, t1, 128, t0;"
        text += "and.b32 t1, tile, 3; mad.lo.u32 t0, t1, 32, t0;"
        text += "shr.u32 t1, tile, 2; and.b32 t1, t1, 3; mad.lo.u32 t0, t1, 8, t0;"
        text += "and.b32 t1, g, 3; mad.lo.u32 t0, t1, 2, t0; shr.u32 t1, g, 2; add.u32 t0, t0, t1;"
        text += "mul.wide.u32 at, t0, 2; add.u64 at, at, <out>;"
        return text + "@p st.global.b16 [at], h;\n"


_REGISTERS = """
.reg .pred p, in;
.reg .b16 h;
.reg .b32 t<2>, warp, lane, g, q, n, blk, unit, ahead, total, slot, phase, turn, bars, bar;
.reg .b32 visit, tile, expert, kept_visit, kept_tile, kept_expert, pair, row, aw, as;
.reg .b32 w0_<4>, w1_<4>, s<2>, k<2>, v0_<4>, v1_<4>, x<16>;
.reg .f32 c<32>, d<4>, b<2>, f<2>;
.reg .b64 at, atx<4>, more;"""
