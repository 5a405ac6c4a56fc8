"""The thread program of `few_rows` for several rows, as PTX for compute capability 9.0.

A thread block takes a run of tiles of one of the projections, one after the other, for up to 8
rows; copies are some tiles ahead. Each of its warps keeps its part of x in registers for as long as
the expert stays the same. The warps take turns at ending a tile, while the others go on. Which rows
an expert has each block finds out by itself, sooner than a launch before this one could tell it.

Blocks of the down projection come after those of the up projection, as multiprocessors become free,
and begin with their weights. For hidden values they wait: they read them again until none is
`EMPTY`, which all were before the launch and none can become. Blocks start in the order of their
numbers, so nobody keeps one from starting that he waits for.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gpt_oss_jax.kernels.expert_matmul.few_rows_tiles_ptx import (
    COLUMNS,
    Layer,
    Projection,
    wait,
    with_operands,
)
from gpt_oss_jax.kernels.expert_matmul.sort_ptx import BlockSort
from gpt_oss_jax.kernels.ptx import NEXT, WAIT

_MAX_STAGES = 8
# Thread blocks that a multiprocessor holds, bytes of shared memory for each; fewer than these where
# a block takes more, as with rows wider than those of the released models.
_BLOCKS, _SHARED_BYTES = 3, 75_000
_OPERANDS = """block x experts weights up_blocks up_scales up_bias down_blocks down_scales
down_bias hidden out shared""".split()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeveralRows(Layer):
    """The launch for several rows.

    Attributes:
      visits: Experts to visit, at most; one of more than eight rows is visited again.
    """

    visits: int
    warps: ClassVar[int] = 4
    block_warps: ClassVar[int] = 4

    @property
    def grid(self) -> int:
        """Thread blocks, of the up projection and then of the down projection."""
        return self._blocks(self.up) + self._blocks(self.down)

    def _blocks(self, p: Projection) -> int:
        return min(self.visits * p.tiles, self.multiprocessors * _BLOCKS)

    @property
    def _stages(self) -> int:
        """Tiles in shared memory or on their way."""
        beside = 2 * self._sum_bytes + 64 * self.warps + self._visit_bytes + self._sort.shared_bytes
        most = min(_MAX_STAGES, (_SHARED_BYTES - beside) // (self._stage_bytes + 8))
        return max(2, most)

    @property
    def _kept(self) -> int:
        return self._sums + 2 * self._sum_bytes

    @property
    def _barriers(self) -> int:
        return self._kept + 64 * self.warps

    @property
    def _members(self) -> int:
        return self._barriers + 8 * (self._stages + 4)

    @property
    def _experts(self) -> int:
        return self._members + 4 * COLUMNS * self.visits

    @property
    def _sort(self) -> BlockSort:
        return BlockSort(self.rows * self.choices, self.experts, COLUMNS, self.warps)

    @property
    def _visit_bytes(self) -> int:
        """Of the members and experts of all visits."""
        return 4 * (COLUMNS + 1) * self.visits

    @property
    def _sorting(self) -> int:
        return self._members + self._visit_bytes

    @property
    def shared_bytes(self) -> int:
        """Tiles, two places for sums, what warps keep, barriers, visits, and what sorting takes.

        Barriers: one a tile, then full and free of each place.
        """
        return self._sorting + self._sort.shared_bytes

    def ptx(self) -> str:
        """The thread program.

        Its operands: the thread block; pointers to x, experts and routing weights; of either
        projection packed blocks, scales and bias; hidden values, `EMPTY` before; the result and
        shared memory.
        """
        inits = [(self._barriers + 8 * i, 1) for i in range(self._stages)]
        inits += [(at, self.warps) for at in self._full] + [(at, 1) for at in self._free]
        text = f"""{self._registers()}
{self._sort.registers()}
.reg .b32 sorting;
{NEXT}
mov.u32 warp, %tid.x; and.b32 lane, warp, 31; shr.u32 warp, warp, 5; setp.eq.u32 leads, lane, 0;
setp.lt.u32 leads_quad, lane, 4;
shr.u32 g, lane, 2; and.b32 q, lane, 3; mad.lo.u32 blk, warp, 4, q;
or.b32 t0, warp, lane; setp.eq.u32 p, t0, 0;
{"".join(f"@p mbarrier.init.shared.b64 [<shared> + {at}], {n};" for at, n in inits)}
@p fence.mbarrier_init.release.cluster; bar.sync 1, {32 * self.warps};
{WAIT}
{self._sort_pairs()}
setp.ge.u32 p, <block>, {self._blocks(self.up)}; @p bra DOWN;
{self._run(self.up)}
bra DONE;
DOWN:
{self._run(self.down)}
DONE:"""
        return with_operands(text, _OPERANDS)

    def _run(self, p: Projection) -> str:
        """What the blocks of a projection do."""
        first = 0 if p.name == "up" else self._blocks(self.up)
        label = lambda name: f"{p.name.upper()}_{name}"
        return f"""sub.u32 t0, <block>, {first}; mul.lo.u32 total, total, {p.tiles};
mul.lo.u32 t0, t0, total; div.u32 unit, t0, {self._blocks(p)};
add.u32 t0, t0, total; div.u32 last, t0, {self._blocks(p)};
setp.ge.u32 p, unit, last; @p bra DONE;
setp.ne.u32 p, warp, 0; @p bra {label("READY")}; mov.u32 slot, 0;
{label("FILL")}:
add.u32 n, unit, slot;
{self._fetch(p)}
add.u32 slot, slot, 1; setp.lt.u32 p, slot, {self._stages}; @p bra {label("FILL")};
{label("READY")}:
mov.u32 slot, 0; mov.u32 phase, 0; mov.u32 done, 0;
div.u32 visit, unit, {p.tiles}; mul.lo.u32 t0, visit, {p.tiles}; sub.u32 tile, unit, t0;
{label("VISIT")}:
{self._load_rows(p)}
{self._keep_members()}
{label("UNIT")}:
mad.lo.u32 bar, slot, 8, <shared>;
{wait(label("TILE_IS_HERE"), self._barriers, "phase")}
{self._products(p)}
and.b32 turn, done, 1; shr.u32 round, done, 1; and.b32 round, round, 1;
mad.lo.u32 bar, turn, 8, <shared>; xor.b32 t1, round, 1;
{wait(label("PLACE_IS_FREE"), self._free[0], "t1")}
{self._hand_over()}
bar.warp.sync -1; @leads mbarrier.arrive.shared.b64 _, [bar + {self._full[0]}];
and.b32 t0, done, {self.warps - 1}; setp.ne.u32 p, warp, t0; @p bra {label("NEXT")};
{wait(label("SUMS_ARE_HERE"), self._full[0], "round")}
{self._load_bias(p)}
bar.warp.sync -1; add.u32 n, unit, {self._stages};
{self._fetch(p)}
{self._take_over()}
bar.warp.sync -1; mad.lo.u32 bar, turn, 8, <shared>;
@leads mbarrier.arrive.shared.b64 _, [bar + {self._free[0]}];
mad.lo.u32 t0, warp, 64, <shared>; mad.lo.u32 t0, q, 16, t0;
ld.shared.v4.u32 {{y0, y1, y2, y3}}, [t0 + {self._kept}];
{self._finish(p, 0)}
{self._finish(p, 1)}
{label("NEXT")}:
add.u32 done, done, 1;
add.u32 slot, slot, 1; setp.eq.u32 p, slot, {self._stages}; @p xor.b32 phase, phase, 1;
@p mov.u32 slot, 0;
add.u32 unit, unit, 1; setp.ge.u32 p, unit, last; @p bra DONE;
add.u32 tile, tile, 1; setp.lt.u32 p, tile, {p.tiles}; @p bra {label("UNIT")};
mov.u32 tile, 0; add.u32 visit, visit, 1; bra {label("VISIT")};"""

    def _sort_pairs(self) -> str:
        """Members and expert of each visit, and `total`, how many visits there are."""
        sort = self._sort
        text = "mov.u32 i, %tid.x; mov.u32 t0, -1; mad.lo.u32 own, i, 4, <shared>;\n"
        for first in range(0, COLUMNS * self.visits, sort.threads):
            text += f"setp.lt.u32 p, i, {COLUMNS * self.visits - first};"
            text += f"@p st.shared.u32 [own + {self._members + 4 * first}], t0;\n"
        text += f"add.u32 sorting, <shared>, {self._sorting};\n{sort.ptx('<experts>', 'sorting')}"
        for k in range(sort.pairs_each):
            text += f"""setp.lt.u32 p, e{k}, {self.experts}; mad.lo.u32 t0, place{k}, 4, <shared>;
add.u32 t1, i, {sort.threads * k}; @p st.shared.u32 [t0 + {self._members}], t1;
shr.u32 t0, place{k}, {COLUMNS.bit_length() - 1}; mad.lo.u32 t0, t0, 4, <shared>;
and.b32 t1, place{k}, {COLUMNS - 1}; setp.eq.and.u32 p, t1, 0, p;
@p st.shared.u32 [t0 + {self._experts}], e{k};
"""
        return f"{text}mov.u32 total, tiles; bar.sync 1, {sort.threads};"

    def _keep_members(self) -> str:
        """Pairs (-1: none) and weights of two columns, for the end of a warp's tiles."""
        text = ""
        for column in range(2):
            text += f"shl.b32 n, q, 1; add.u32 n, n, {column}; {self._member('n')}"
            text += "mul.wide.u32 at, pair, 4; add.u64 at, at, <weights>; mov.u32 row, 0;"
            text += f"@p ld.global.u32 row, [at]; selp.b32 y{column}, pair, -1, p;"
            text += f"mov.u32 y{2 + column}, row;\n"
        return f"""{text}mad.lo.u32 t0, warp, 64, <shared>; mad.lo.u32 t0, q, 16, t0;
bar.warp.sync -1; @leads_quad st.shared.v4.u32 [t0 + {self._kept}], {{y0, y1, y2, y3}};
bar.warp.sync -1;"""

    def _member(self, column: str) -> str:
        """`pair` of a column, the first one's if it has none; in `p` whether it has."""
        return f"""mad.lo.u32 t0, visit, {4 * COLUMNS}, <shared>; mad.lo.u32 t1, {column}, 4, t0;
ld.shared.u32 pair, [t1 + {self._members}]; ld.shared.u32 t0, [t0 + {self._members}];
setp.ne.u32 p, pair, -1; selp.u32 pair, pair, t0, p;"""

    def _fetch(self, p: Projection) -> str:
        """A lane starts to copy tile `n` of all to `slot`, if it is the block's."""
        text = f"mad.lo.u32 row, slot, {self._stage_bytes}, <shared>;"
        text += f"mad.lo.u32 bar, slot, 8, <shared>; add.u32 bar, bar, {self._barriers};\n"
        text += f"setp.lt.and.u32 p, n, last, leads; div.u32 t0, n, {p.tiles};"
        text += f"mul.lo.u32 t1, t0, {p.tiles}; sub.u32 t1, n, t1;"
        text += f"mad.lo.u32 t0, t0, 4, <shared>; @p ld.shared.u32 t0, [t0 + {self._experts}];"
        text += f"mad.lo.u32 n, t0, {p.tiles}, t1;\n"
        return text + self._copy(p, "@p")

    def _load_rows(self, p: Projection) -> str:
        """A thread's part of the rows of a visit; zeros past the input axis."""
        up = p.name == "up"
        choice = f"div.u32 pair, pair, {self.choices};" if up else ""
        text = f"{self._member('g')}{choice}\n"
        text += f"mul.wide.u32 at, pair, {64 * p.blocks}; add.u64 at, at, "
        text += f"<{'x' if up else 'hidden'}>; mul.wide.u32 more, blk, 64; add.u64 at, at, more;\n"
        if up:
            text += self._load(p, "ld.global")
        else:
            text += self._load(p, "ld.relaxed.gpu.global") + self._load_until_ready(p)
        return text + self._in_order(p)
