"""The thread program of `few_rows` for a single row, as PTX for compute capability 9.0.

Tiles are multiplied as for several rows, but each multiprocessor has a single block, to which they
fall in turn: those of the up projection, expert by expert, then those of the down projection. So
memory is read without a pause, and what an expert's hidden values wait for is long done when its
down tiles come. Twelve warps share out the input axis; two others end tiles by turns, since a warp
that did both would come late to the next tile, on which all the others wait.

Nothing but weights is read on the way: a multiprocessor answers small loads behind what its copies
have queued, which takes microseconds. Ids and routing weights are in registers from the beginning,
and hidden values of an expert are copied to shared memory some tiles ahead; those that were not
there yet are read again. Whoever ends a tile of the last expert adds the others' outputs to it.

All blocks must be on the device at once, or hidden values would be waited for for ever. There are
no more than multiprocessors, each of which has room for one; but another launch of this kind must
not run beside it, as it would have the places that this one waits for. In a model's decode step
every launch waits for the one before.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gpt_oss_jax.kernels.expert_matmul.few_rows_tiles_ptx import (
    Layer,
    Projection,
    largest,
    wait,
    with_operands,
)
from gpt_oss_jax.kernels.expert_matmul.mxfp4_ptx import LAST_FACTOR
from gpt_oss_jax.kernels.ptx import COPY, EMPTY, NEXT, WAIT, apart, literal

MAX_CHOICES = 8  # Hidden values of so many experts, 4,096 wide, fit beside the tiles.
_OPERANDS = """block x experts weights up_blocks up_scales up_bias down_blocks down_scales down_bias
residual hidden out shared""".split()
_STAGES = 3  # Tiles on their way, at least two; with more, all else that is read waits longer.
# Tiles from where hidden values are asked for, at every other one, to where they are wanted.
_AHEAD = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class OneRow(Layer):
    """The launch for one row.

    Attributes:
      adds: Whether the result is added to the residual stream, and rounded then.
    """

    rows: int = 1
    adds: bool = False
    warps: ClassVar[int] = 12
    # Two end tiles; Pallas launches four at a time.
    block_warps: ClassVar[int] = 16

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return min(self.multiprocessors, self._all)

    @property
    def room(self) -> int:
        """And float32 outputs of all experts but the last."""
        return super().room + (self.choices - 1) * self.inputs

    @property
    def _ups(self) -> int:
        return self.choices * self.up.tiles

    @property
    def _all(self) -> int:
        return self._ups + self.choices * self.down.tiles

    @property
    def _stages(self) -> int:
        return _STAGES

    @property
    def _hidden(self) -> int:
        return self._sums + 2 * self._sum_bytes

    @property
    def _barriers(self) -> int:
        return self._hidden + self.choices * 2 * self.hidden

    @property
    def _here(self) -> int:
        """Barriers of hidden values."""
        return self._barriers + 8 * (self._stages + 4)

    @property
    def shared_bytes(self) -> int:
        """Tiles, two places for sums, hidden values, barriers: of tiles, sums, hidden values."""
        return self._here + 8 * self.choices

    def ptx(self) -> str:
        """The thread program.

        Its operands: the thread block; pointers to x, experts and routing weights; of either
        projection packed blocks, scales and bias; the residual stream, if there is one; what is
        `EMPTY` before, hidden values and float32 outputs of all experts but the last; the result
        and shared memory.
        """
        inits = [(self._barriers + 8 * i, 1) for i in range(self._stages)]
        inits += [(at, self.warps) for at in self._full] + [(at, 1) for at in self._free]
        inits += [(self._here + 8 * i, 1) for i in range(self.choices)]
        text = f"""{self._registers()}
.reg .b64 from;
.reg .b32 ahead, expert, weight, kept, asked, residual;
.reg .b32 {", ".join(self._others)};
{NEXT}
mov.u32 warp, %tid.x; and.b32 lane, warp, 31; shr.u32 warp, warp, 5; setp.eq.u32 leads, lane, 0;
shr.u32 g, lane, 2; and.b32 q, lane, 3; mad.lo.u32 blk, warp, 4, q;
or.b32 t0, warp, lane; setp.eq.u32 p, t0, 0;
{"".join(f"@p mbarrier.init.shared.b64 [<shared> + {at}], {n};" for at, n in inits)}
@p fence.mbarrier_init.release.cluster; bar.sync 1, {32 * self.block_warps};
{WAIT}
mov.u32 unit, <block>; mov.u32 slot, 0; mov.u32 phase, 0; mov.u32 round, 0;
setp.ge.u32 p, warp, {self.warps}; @p bra ENDING;
{self._multiply()}
ENDING:
sub.u32 turn, warp, {self.warps}; setp.ge.u32 p, turn, 2; @p bra DONE;
{self._end()}
DONE:"""
        return with_operands(text, [n for n in _OPERANDS if self.adds or n != "residual"])

    def _multiply(self) -> str:
        """What a warp does that has a part of the input axis."""
        return f"""mul.wide.u32 at, blk, 64; add.u64 at, at, <x>;
{self._load(self.up, "ld.global")}{self._in_order(self.up)}
mov.u32 kept, -1; mov.u32 turn, 0;
UNIT:
setp.ge.u32 p, unit, {self._all}; @p bra DONE;
mad.lo.u32 bar, slot, 8, <shared>;
setp.ge.u32 p, unit, {self._ups}; @p bra DOWN;
{wait("UP_IS_HERE", self._barriers, "phase")}
{self._products(self.up)}
bra MULTIPLIED;
DOWN:
sub.u32 n, unit, {self._ups}; div.u32 visit, n, {self.down.tiles};
setp.eq.u32 p, visit, kept; @p bra HAS_ROW;
{self._load_hidden()}
mov.u32 kept, visit;
HAS_ROW:
mad.lo.u32 bar, slot, 8, <shared>;
{wait("DOWN_IS_HERE", self._barriers, "phase")}
{self._products(self.down)}
MULTIPLIED:
mad.lo.u32 bar, turn, 8, <shared>; xor.b32 t1, round, 1;
{wait("PLACE_IS_FREE", self._free[0], "t1")}
{self._hand_over()}
bar.warp.sync -1; @leads mbarrier.arrive.shared.b64 _, [bar + {self._full[0]}];
xor.b32 turn, turn, 1; setp.eq.u32 p, turn, 0; @p xor.b32 round, round, 1;
add.u32 slot, slot, 1; setp.eq.u32 p, slot, {self._stages}; @p xor.b32 phase, phase, 1;
@p mov.u32 slot, 0;
add.u32 unit, unit, {self.grid}; bra UNIT;"""

    def _end(self) -> str:
        """What a warp does that ends every other tile, and copies what comes into its place.

        No copy is left under way: shared memory may be the next kernel's then.
        """
        return f"""mul.wide.u32 at, lane, 4; add.u64 more, at, <experts>; add.u64 at, at, <weights>;
mov.b32 expert, 0; mov.b32 weight, 0; setp.lt.u32 p, lane, {self.choices};
@p ld.global.b32 expert, [more]; @p ld.global.b32 weight, [at];
mov.u32 ahead, unit; setp.ne.u32 p, turn, 0; @p bra FILLED;
FILL:
{self._fetch_next("FETCHED_FIRST", self.up)}
add.u32 ahead, ahead, {self.grid};
add.u32 slot, slot, 1; setp.lt.u32 p, slot, {self._stages}; @p bra FILL;
FILLED:
mov.u32 slot, turn; mov.u32 asked, 0;
mad.lo.u32 unit, turn, {self.grid}, unit;
mad.lo.u32 done, turn, 8, <shared>;
TILE:
setp.ge.u32 p, unit, {self._all}; @p bra TAKE_ALL;
{self._ask()}
add.u32 ahead, unit, {self._stages * self.grid};
setp.ge.u32 p, unit, {self._ups}; @p bra END_DOWN;
{self._end_of(self.up)}
bra ENDED;
END_DOWN:
{self._end_of(self.down)}
ENDED:
xor.b32 round, round, 1; add.u32 unit, unit, {2 * self.grid};
add.u32 slot, slot, 2; setp.ge.u32 p, slot, {self._stages}; @p sub.u32 slot, slot, {self._stages};
bra TILE;
TAKE_ALL:
setp.eq.u32 p, asked, 0; @p bra DONE;
sub.u32 asked, asked, 1; mad.lo.u32 bar, asked, 8, <shared>; mov.u32 t1, 0;
{wait("TAKEN", self._here, "t1")}
bra TAKE_ALL;"""

    def _end_of(self, p: Projection) -> str:
        """Of a tile of the projection."""
        label = lambda name: f"{p.name.upper()}_{name}"
        return f"""sub.u32 n, unit, {0 if p.name == "up" else self._ups};
div.u32 visit, n, {p.tiles}; mul.lo.u32 t0, visit, {p.tiles}; sub.u32 tile, n, t0;
{self._load_others() if p.name == "down" else ""}
mov.u32 bar, done;
{wait(label("SUMS_ARE_HERE"), self._full[0], "round")}
{self._load_bias(p)}
bar.warp.sync -1;
{self._fetch_next(label("FETCHED"), p)}
{self._take_over()}
bar.warp.sync -1; @leads mbarrier.arrive.shared.b64 _, [done + {self._free[0]}];
setp.eq.u32 p, q, 0; selp.b32 y0, visit, -1, p; shfl.sync.idx.b32 y2, weight, visit, 31, -1;
{self._finish(p, 0)}"""

    def _load_others(self) -> str:
        """For the last expert: outputs of the others, and the residual stream."""
        last = self.choices - 1
        text = f"""setp.ne.u32 p, visit, {last}; @p bra OTHERS_ASKED;
shl.b32 row, tile, 3; add.u32 row, row, g; setp.eq.u32 in, q, 0;
mul.wide.u32 at, row, 8; add.u64 at, at, <hidden>;
"""
        text += "".join(f"mov.b32 {x}, 0;" for x in self._others[: 2 * last]) + "\n"
        text += "".join(self._load_other(v, "@in") for v in range(last))
        if self.adds:
            text += "mul.wide.u32 more, row, 4; add.u64 from, more, <residual>;"
            text += "mov.b32 residual, 0; @in ld.global.b32 residual, [from];\n"
        return text + "OTHERS_ASKED:"

    def _load_other(self, visit: int, guard: str) -> str:
        pair = ", ".join(self._others[2 * visit : 2 * visit + 2])
        place = self._parts + 4 * self.inputs * visit
        return f"{guard} ld.relaxed.gpu.global.v2.b32 {{{pair}}}, [at + {place}];\n"

    @property
    def _others(self) -> list[str]:
        """Registers for two outputs of each other expert."""
        return [f"p{v}_{r}" for v in range(max(1, self.choices - 1)) for r in range(2)]

    def _fetch_next(self, label: str, after: Projection) -> str:
        """A lane starts to copy tile `ahead` to `slot`, if there is one; then comes `label`.

        It comes after one of a projection.
        """
        text = f"""setp.ge.u32 p, ahead, {self._all}; @p bra {label};
mad.lo.u32 row, slot, {self._stage_bytes}, <shared>;
mad.lo.u32 bar, slot, 8, <shared>; add.u32 bar, bar, {self._barriers};
"""
        ways = [(self.down, self._ups, f"{label}:")]
        if after.name == "up":
            text += f"setp.ge.u32 p, ahead, {self._ups}; @p bra {label}_DOWN;\n"
            ways.insert(0, (self.up, 0, f"bra {label};\n{label}_DOWN:"))
        for p, first, end in ways:
            text += f"sub.u32 n, ahead, {first}; div.u32 t0, n, {p.tiles};"
            text += f"mul.lo.u32 t1, t0, {p.tiles}; sub.u32 t1, n, t1;"
            text += "shfl.sync.idx.b32 t0, expert, t0, 31, -1;"
            text += f"min.u32 t0, t0, {self.experts - 1}; mad.lo.u32 n, t0, {p.tiles}, t1;\n"
            text += f"{self._copy(p, '@leads')}{end}\n"
        return text

    def _ask(self) -> str:
        """The first of the two starts to copy hidden values of the visits that come up."""
        size = 2 * self.hidden
        return f"""setp.ne.u32 p, turn, 0; @p bra ASKED;
add.u32 t0, unit, {_AHEAD * self.grid}; setp.lt.u32 p, t0, {self._ups}; @p bra ASKED;
sub.u32 t0, t0, {self._ups}; div.u32 n, t0, {self.down.tiles}; min.u32 n, n, {self.choices - 1};
ASK:
setp.gt.u32 p, asked, n; @p bra ASKED;
mad.lo.u32 bar, asked, 8, <shared>; add.u32 bar, bar, {self._here};
mad.lo.u32 row, asked, {size}, <shared>; add.u32 row, row, {self._hidden};
mul.wide.u32 at, asked, {size}; add.u64 at, at, <hidden>;
@leads mbarrier.arrive.expect_tx.shared.b64 _, [bar], {size};
@leads {COPY} [row], [at], {size}, [bar];
add.u32 asked, asked, 1; bra ASK;
ASKED:"""

    def _load_hidden(self) -> str:
        """A thread's part of the hidden values of a visit."""
        p = self.down
        text = f"""mad.lo.u32 bar, visit, 8, <shared>; mov.u32 t1, 0;
{wait("HIDDEN_IS_HERE", self._here, "t1")}
mad.lo.u32 aw, visit, {2 * self.hidden}, <shared>; mad.lo.u32 aw, blk, 64, aw;
mul.wide.u32 at, visit, {2 * self.hidden}; mul.wide.u32 more, blk, 64;
add.u64 at, at, more; add.u64 at, at, <hidden>;
"""
        text += self._load(p, "ld.shared", "aw", self._hidden)
        return text + self._load_until_ready(p) + self._in_order(p)

    def _finish(self, p: Projection, column: int) -> str:
        """As for several rows; in the down projection all experts' outputs become the result."""
        if p.name == "up":
            return super()._finish(p, column)
        # Of a float32 row, and of all of them.
        width, last = 4 * self.inputs, self.choices - 1
        text = "mov.b32 b0, y2; setp.eq.u32 in, q, 0; shl.b32 row, tile, 3; add.u32 row, row, g;"
        for r in range(2):
            text += f"fma.rn.f32 f{r}, c{2 * r}, {literal(LAST_FACTOR)}, bias{r};"
            text += f"mul.f32 f{r}, f{r}, b0;"
        text += f"""
mul.wide.u32 at, row, 8; add.u64 at, at, <hidden>;
setp.eq.u32 p, visit, {last}; @p bra LAST;
mul.wide.u32 more, visit, {width}; add.u64 at, at, more;
@in st.relaxed.gpu.global.v2.f32 [at + {self._parts}], {{f0, f1}}; bra ENDED;
LAST:
mul.wide.u32 more, row, 4;
"""
        others = self._others[: 2 * last]
        text += "PARTS:\n"
        if others:
            text += f"{largest(others)} setp.eq.u32 p, t0, {EMPTY}; vote.sync.any.pred p, p, -1;"
            text += "@!p bra ALL_PARTS;\n"
        for v in range(last):
            text += f"{largest(others[2 * v : 2 * v + 2])} setp.eq.u32 p, t0, {EMPTY};"
            text += self._load_other(v, "@p")
        text += "nanosleep.u32 20; bra PARTS;\nALL_PARTS:\n" if others else ""
        for r in range(2):
            names = [*others[r::2], f"f{r}"]
            text += f"mov.b32 d{r}, {names[0]};"
            text += "".join(f"mov.b32 d2, {x}; add.f32 d{r}, d{r}, d2;" for x in names[1:])
        if self.adds:
            text += apart("residual", "t0", "t1")
            text += "mov.b32 d2, t0; mov.b32 d3, t1; add.f32 d0, d0, d2; add.f32 d1, d1, d3;\n"
        text += "cvt.rn.bf16x2.f32 t0, d1, d0;\n"
        return text + "add.u64 from, more, <out>; @in st.global.b32 [from], t0;"

    @property
    def _parts(self) -> int:
        """Bytes of hidden values, behind which the outputs are."""
        return 2 * self.choices * self.hidden
