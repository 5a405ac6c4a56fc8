"""The thread program of `few_rows`, as PTX for compute capability 9.0. Knows no JAX.

A tile is 16 outputs of one expert, for up to 8 rows; a thread block takes a run of tiles, one
after the other. In checkpoint order the weights of a tile lie together: the copy engine brings them
to shared memory in one piece, some tiles ahead. The warps share out the input axis, and each keeps
its part of x in registers for as long as the expert stays the same. A thread takes MXFP4 blocks of
16 bytes, decodes them in registers and multiplies with `mma.sync`: weights are the matrix of 16
rows, x that of 8 columns. The warps take turns at adding up what all of them have of a
tile, while the others go on.

The matrix instruction does not care which element of a block is called which, as long as both sides
agree: x is put into the order in which the decoding leaves the weights.
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

COLUMNS = 8
MAX_BLOCKS = 128  # On the input axis.
TILE = 16
_MAX_STAGES = 8
WARPS = 4
# Thread blocks that a multiprocessor holds, bytes of shared memory for each.
_BLOCKS, _SHARED_BYTES = 3, 75_000


@dataclasses.dataclass(frozen=True)
class Projection:
    """One launch, and the program of its threads.

    Attributes:
      rows: Outputs of an expert.
      blocks: MXFP4 blocks of its input axis.
      choices: Experts of a token.
      visits: Experts to visit, at most; one for each pair (row of x, choice) if columns is 1.
      columns: Pairs of a visit, 8; 1 if every pair is a visit.
      bias_bytes: 2 for bfloat16, 4 for float32.
      limit: Clamp of the SwiGLU that pairs of outputs go through; None for the down projection,
        whose outputs are multiplied with the routing weight instead.
      multiprocessors: Of the device; it runs with any number.
      then: The launch after this one, whose first tiles are brought to L2 while this one ends.
    """

    rows: int
    blocks: int
    choices: int
    visits: int
    columns: int
    bias_bytes: int
    limit: float | None = None
    multiprocessors: int = 132
    then: Projection | None = None

    @property
    def grid(self) -> int:
        """Thread blocks; those for which nothing is left end at once."""
        return min(self.visits * self._tiles, self.multiprocessors * _BLOCKS)

    @property
    def _tiles(self) -> int:
        return self.rows // TILE

    @property
    def _steps(self) -> int:
        """Of the input axis, in which every thread takes a block of two outputs."""
        return -(-self.blocks // (4 * WARPS))

    @property
    def _stage_bytes(self) -> int:
        """Packed blocks, scales and biases of a tile."""
        return TILE * (17 * self.blocks + self.bias_bytes)

    @property
    def _stages(self) -> int:
        """Tiles in shared memory or on their way."""
        return min(_MAX_STAGES, (_SHARED_BYTES - 2 * _SUM_BYTES) // (self._stage_bytes + 8))

    @property
    def _sums(self) -> int:
        return self._stages * self._stage_bytes

    @property
    def _barriers(self) -> int:
        return self._sums + 2 * _SUM_BYTES

    @property
    def shared_bytes(self) -> int:
        """Tiles, two places for sums, barriers: one a tile, then full and free of each place."""
        return self._barriers + 8 * (self._stages + 4)

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block, pointers to packed blocks, scales, x, experts, members of
        the visits, bias, for the down projection routing weights, packed blocks, scales and bias
        of the launch after this one if there is one, which may begin to read them at once, the
        result and shared memory.
        """
        down = self.limit is None
        order = "griddepcontrol.wait;" if down else "griddepcontrol.launch_dependents;"
        operands = ["block", "blocks", "scales", "x", "experts", "members", "bias"]
        operands += ["weights"] * down
        operands += ["then_blocks", "then_scales", "then_bias"] * (self.then is not None) + [
            "out",
            "shared",
        ]
        full = [(self._barriers + 8 * i, 1) for i in range(self._stages)]
        sums = [(self._barriers + 8 * (self._stages + i), (WARPS, 1)[i // 2]) for i in range(4)]
        text = f"""{self._registers()}
mov.u32 warp, %tid.x; and.b32 lane, warp, 31; shr.u32 warp, warp, 5; setp.eq.u32 leads, lane, 0;
shr.u32 g, lane, 2; and.b32 q, lane, 3; mad.lo.u32 blk, warp, 4, q;
or.b32 t0, warp, lane; setp.eq.u32 p, t0, 0;
{"".join(f"@p mbarrier.init.shared.b64 [<shared> + {at}], {n};" for at, n in full + sums)}
@p fence.mbarrier_init.release.cluster; bar.sync 1, {32 * WARPS};
{self._count()}
rem.u32 t0, <block>, {self.grid}; mul.lo.u32 unit, t0, total; div.u32 unit, unit, {self.grid};
add.u32 t0, t0, 1; mul.lo.u32 last, t0, total; div.u32 last, last, {self.grid};
setp.ge.u32 p, unit, last; @p bra DONE; mov.u32 first, unit;
setp.ne.u32 p, warp, 0; @p bra READY;
mov.u32 ahead, unit; mov.u32 slot, 0;
FILL:
{self._fetch()}
add.u32 ahead, ahead, 1; add.u32 slot, slot, 1;
setp.lt.u32 p, slot, {self._stages}; @p bra FILL;
READY:
{order}
mov.u32 slot, 0; mov.u32 phase, 0; mov.u32 turn, 0; mov.u32 round, 0; mov.u32 finisher, 0;
div.u32 visit, unit, {self._tiles}; mul.lo.u32 t0, visit, {self._tiles}; sub.u32 tile, unit, t0;
VISIT:
{self._load_x()}
UNIT:
mad.lo.u32 bar, slot, 8, <shared>;
{_wait("TILE_IS_HERE", self._barriers, "phase")}
{self._products()}
mad.lo.u32 bar, turn, 8, <shared>; xor.b32 t1, round, 1;
{_wait("PLACE_IS_FREE", sums[2][0], "t1")}
{self._hand_over()}
bar.warp.sync -1; @leads mbarrier.arrive.shared.b64 _, [bar + {sums[0][0]}];
setp.ne.u32 p, warp, finisher; @p bra NEXT;
{_wait("SUMS_ARE_HERE", sums[0][0], "round")}
{self._load_bias()}
{self._take_over()}
bar.warp.sync -1; @leads mbarrier.arrive.shared.b64 _, [bar + {sums[2][0]}];
add.u32 ahead, unit, {self._stages};
{self._fetch()}
{self._prefetch() if self.then else ""}
{self._finish(0)}
{self._finish(1)}
NEXT:
add.u32 unit, unit, 1; setp.ge.u32 p, unit, last; @p bra DONE;
add.u32 slot, slot, 1; setp.eq.u32 p, slot, {self._stages}; @p xor.b32 phase, phase, 1;
@p mov.u32 slot, 0;
xor.b32 turn, turn, 1; setp.eq.u32 p, turn, 0; @p xor.b32 round, round, 1;
add.u32 finisher, finisher, 1; setp.eq.u32 p, finisher, {WARPS}; @p mov.u32 finisher, 0;
add.u32 tile, tile, 1; setp.lt.u32 p, tile, {self._tiles}; @p bra UNIT;
mov.u32 tile, 0; add.u32 visit, visit, 1; bra VISIT;
DONE:"""
        for i, name in enumerate(operands):
            text = text.replace(f"<{name}>", f"${i}")
        return "{\n" + text + "\n}"

    def _registers(self) -> str:
        return f"""
.reg .pred p, in, leads;
.reg .b16 h;
.reg .b32 t<2>, warp, lane, g, q, n, blk, first, unit, last, ahead, total, slot, phase, turn, round;
.reg .b32 finisher, bar, visit, tile, pair, row, aw, as, w0_<4>, w1_<4>, s<2>, k<2>, v0_<4>, v1_<4>;
.reg .b32 x<{16 * self._steps}>, y<4>;
.reg .f32 c<8>, d<4>, b<2>, bias<2>, f<2>;
.reg .b64 at, more;"""

    def _count(self) -> str:
        """How many tiles there are. Visits that are empty come last."""
        if self.columns == 1:
            return f"mov.u32 total, {self.visits * self._tiles};"
        text = "mov.u32 total, 0;\n"
        for first in range(0, self.visits, 32):
            text += f"mov.u32 t0, -1; setp.lt.u32 p, lane, {self.visits - first};"
            text += f"mul.wide.u32 at, lane, {4 * self.columns}; add.u64 at, at, <members>;"
            text += f"@p ld.global.nc.u32 t0, [at + {4 * self.columns * first}];"
            text += "setp.ne.u32 p, t0, -1; vote.sync.ballot.b32 t0, p, -1;"
            text += "popc.b32 t0, t0; add.u32 total, total, t0;\n"
        return text + f"mul.lo.u32 total, total, {self._tiles};"

    def _member(self, column: str) -> str:
        """`pair` of a column, and in `p` whether there is one; elsewhere some pair."""
        if self.columns == 1:
            return f"setp.eq.u32 p, {column}, 0; mov.u32 pair, visit;"
        return f"""mad.lo.u32 t0, visit, {self.columns}, {column};
mul.wide.u32 at, t0, 4; add.u64 at, at, <members>; ld.global.nc.u32 pair, [at];
setp.ne.u32 p, pair, -1; selp.u32 pair, pair, 0, p;"""

    def _fetch(self) -> str:
        """A lane starts to copy tile `ahead` to `slot`, if there is one."""
        bulk = "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes"
        text = f"setp.lt.and.u32 p, ahead, last, leads; div.u32 t0, ahead, {self._tiles};"
        text += f"mul.lo.u32 t1, t0, {self._tiles}; sub.u32 t1, ahead, t1;"
        text += self._expert_of_visit() + f"mad.lo.u32 n, t0, {self._tiles}, t1;"
        text += f"mad.lo.u32 t1, slot, {self._stage_bytes}, <shared>;"
        text += "mad.lo.u32 t0, slot, 8, <shared>;"
        bar = f"[t0 + {self._barriers}]"
        text += f"@p mbarrier.arrive.expect_tx.shared.b64 _, {bar}, {self._stage_bytes};\n"
        place = 0
        for name, size in (("blocks", 16), ("scales", 1)):
            size *= TILE * self.blocks
            text += f"mul.wide.u32 at, n, {size}; add.u64 at, at, <{name}>;"
            text += f"@p {bulk} [t1 + {place}], [at], {size}, {bar};\n"
            place += size
        size = TILE * self.bias_bytes
        text += f"mul.wide.u32 at, n, {size}; add.u64 at, at, <bias>;"
        return text + f"@p {bulk} [t1 + {place}], [at], {size}, {bar};"

    def _prefetch(self) -> str:
        """In the place of a copy that is no more, one of the tiles with which `then` begins."""
        then, bulk = self.then, "cp.async.bulk.prefetch.L2.global"
        text = f"setp.lt.u32 p, ahead, last; @p bra ENOUGH; rem.u32 t0, <block>, {self.grid};"
        text += f"div.u32 n, total, {self._tiles}; mul.lo.u32 n, n, {then._tiles};"
        text += f"mul.lo.u32 t1, t0, n; div.u32 t1, t1, {then.grid};"
        text += f"add.u32 t0, t0, 1; mul.lo.u32 n, t0, n; div.u32 n, n, {then.grid};"
        text += "sub.u32 row, unit, first; sub.u32 ahead, ahead, last;"
        text += "min.u32 ahead, ahead, row; add.u32 t1, t1, ahead;"
        text += "setp.lt.and.u32 p, t1, n, leads;\n"
        text += f"setp.le.and.u32 p, t0, {then.grid}, p; div.u32 t0, t1, {then._tiles};"
        text += f"mul.lo.u32 n, t0, {then._tiles}; sub.u32 t1, t1, n;"
        text += self._expert_of_visit() + f"mad.lo.u32 n, t0, {then._tiles}, t1;\n"
        for name, size in (("then_blocks", 16), ("then_scales", 1)):
            size *= TILE * then.blocks
            text += f"mul.wide.u32 at, n, {size}; add.u64 at, at, <{name}>;"
            text += f"@p {bulk} [at], {size};\n"
        return text + "ENOUGH:"

    def _expert_of_visit(self) -> str:
        """Of visit `t0` to `t0`, if `p`."""
        text = ""
        if self.columns > 1:
            text += f"mul.wide.u32 at, t0, {4 * self.columns}; add.u64 at, at, <members>;"
            text += "mov.u32 t0, 0; @p ld.global.nc.u32 t0, [at];"
        text += "mul.wide.u32 at, t0, 4; add.u64 at, at, <experts>;"
        return text + "@p ld.global.nc.u32 t0, [at];\n"

    def _guard(self, step: int) -> str:
        """Empty where every thread has a block of the input axis."""
        return "" if 4 * WARPS * (step + 1) <= self.blocks else "@in"

    def _is_in(self, step: int) -> str:
        return f"setp.lt.u32 in, blk, {self.blocks - 4 * WARPS * step};"

    def _load_x(self) -> str:
        """A thread's part of the rows of a visit; zeros past the input axis."""
        choice = "" if self.limit is None else f"div.u32 pair, pair, {self.choices};"
        text = f"{self._member('g')}{choice}\n"
        text += f"mul.wide.u32 at, pair, {64 * self.blocks}; add.u64 at, at, <x>;"
        text += "mul.wide.u32 more, blk, 64; add.u64 at, at, more;\n"
        for step in range(self._steps):
            guard = self._guard(step)
            text += self._is_in(step) if guard else ""
            for i in range(4):
                words = [f"y{r}" for r in range(4)]
                text += "".join(f"mov.u32 {word}, 0;" for word in words) if guard else ""
                place = 256 * WARPS * step + 16 * i
                text += f"{guard} ld.global.v4.u32 {{{', '.join(words)}}}, [at + {place}];\n"
                # As `decode` has them: 0 and 4, 1 and 5, 2 and 6, 3 and 7.
                for r in range(4):
                    into, halves = 16 * step + 4 * i + r, (0x5410, 0x7632)[r % 2]
                    text += f"prmt.b32 x{into}, y{r // 2}, y{r // 2 + 2}, {halves};"
        return text

    def _products(self) -> str:
        text = f"mad.lo.u32 aw, slot, {self._stage_bytes}, <shared>;"
        text += f"mad.lo.u32 as, g, {2 * self.blocks}, blk; add.u32 as, as, aw;"
        text += f"mad.lo.u32 aw, g, {32 * self.blocks}, aw; mad.lo.u32 aw, blk, 16, aw;\n"
        text += "".join(f"mov.f32 c{i}, 0f00000000;" for i in range(8)) + "\n"
        for step in range(self._steps):
            if guard := self._guard(step):
                text += f"setp.ge.u32 p, warp, {-(-self.blocks // 4) - WARPS * step};"
                text += f"@p bra REST_{step};{self._is_in(step)}\n"
            for row in range(2):
                words = [f"w{row}_{i}" for i in range(4)]
                if guard:
                    text += "".join(f"mov.u32 {word}, 0;" for word in (*words, f"s{row}"))
                place = 64 * WARPS * step
                codes, scales = place + 16 * self.blocks * row, 16 * TILE * self.blocks
                scales += place // 16 + self.blocks * row
                text += f"{guard} ld.shared.v4.u32 {{{', '.join(words)}}}, [aw + {codes}];"
                text += f"{guard} ld.shared.u8 s{row}, [as + {scales}];\n"
            for row in range(2):
                text += scale(f"s{row}", f"k{row}") + "\n"
            for i in range(4):
                for row in range(2):
                    text += decode(f"w{row}_{i}", f"k{row}", f"v{row}_") + "\n"
                # Two sums that do not wait for each other.
                for half in range(2):
                    a = ", ".join(f"v{r}_{2 * half + k}" for k in range(2) for r in range(2))
                    acc = ", ".join(f"c{4 * half + r}" for r in range(4))
                    x = 16 * step + 4 * i + 2 * half
                    text += (
                        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {"
                        f"{acc}}}, {{{a}}}, {{x{x}, x{x + 1}}}, {{{acc}}};\n"
                    )
            if guard:
                text += f"REST_{step}:\n"
        return text + "".join(f"add.f32 c{r}, c{r}, c{r + 4};" for r in range(4))

    def _hand_over(self) -> str:
        """A warp's sums to their place."""
        text = f"mad.lo.u32 t0, turn, {_SUM_BYTES}, <shared>; mad.lo.u32 t0, lane, 16, t0;"
        text += "mad.lo.u32 t0, warp, 512, t0;"
        return text + f"st.shared.v4.f32 [t0 + {self._sums}], {{c0, c1, c2, c3}};"

    def _load_bias(self) -> str:
        """Of a thread's two outputs; float32."""
        text = f"mad.lo.u32 t0, slot, {self._stage_bytes}, <shared>;"
        text += f"mad.lo.u32 t0, g, {2 * self.bias_bytes}, t0;"
        place = f"[t0 + {17 * TILE * self.blocks}]"
        if self.bias_bytes == 4:
            return text + f"ld.shared.v2.f32 {{bias0, bias1}}, {place};"
        text += f"ld.shared.u32 t0, {place}; shl.b32 t1, t0, 16; mov.b32 bias0, t1;"
        return text + "and.b32 t1, t0, 0xFFFF0000; mov.b32 bias1, t1;"

    def _take_over(self) -> str:
        """The sums of all warps."""
        text = f"mad.lo.u32 t0, turn, {_SUM_BYTES}, <shared>; mad.lo.u32 t0, lane, 16, t0;\n"
        text += f"ld.shared.v4.f32 {{c0, c1, c2, c3}}, [t0 + {self._sums}];\n"
        for warp in range(1, WARPS):
            text += f"ld.shared.v4.f32 {{d0, d1, d2, d3}}, [t0 + {self._sums + 512 * warp}];"
            text += "".join(f"add.f32 c{r}, c{r}, d{r};" for r in range(4)) + "\n"
        return text

    def _finish(self, column: int) -> str:
        """Bias, then SwiGLU or routing weight, for one of a thread's two columns."""
        text = f"shl.b32 n, q, 1; add.u32 n, n, {column}; {self._member('n')}"
        for r in range(2):
            text += f"fma.rn.f32 f{r}, c{2 * r + column}, {literal(LAST_FACTOR)}, bias{r};"
        text += "\n"
        if self.limit is None:
            text += "shl.b32 row, tile, 3; add.u32 row, row, g; shl.b32 row, row, 1;"
            text += f"mad.lo.u32 t0, pair, {self.rows}, row;"
            text += "mul.wide.u32 at, t0, 4; add.u64 at, at, <out>;"
            text += "mul.wide.u32 more, pair, 4; add.u64 more, more, <weights>;"
            text += "@p ld.global.nc.f32 b0, [more]; mul.f32 f0, f0, b0; mul.f32 f1, f1, b0;"
            return text + "@p st.global.v2.f32 [at], {f0, f1};\n"
        text += swiglu("f0", "f1", self.limit)
        text += "cvt.rn.bf16.f32 h, f0; mad.lo.u32 t0, tile, 8, g;"
        text += f"mad.lo.u32 t0, pair, {self.rows // 2}, t0;"
        text += "mul.wide.u32 at, t0, 2; add.u64 at, at, <out>;"
        return text + "@p st.global.b16 [at], h;\n"


_SUM_BYTES = 512 * WARPS


def _wait(label: str, barrier: int, parity: str) -> str:
    """Until a phase of the barrier that is so far from `bar` has ended."""
    return (
        f"{label}:\nmbarrier.try_wait.parity.shared.b64 p, [bar + {barrier}], {parity};"
        f"@!p bra {label};"
    )
