"""Sorting pairs, gathering and summing rows, as PTX for compute capability 9.0. Knows no JAX.

To sort, a thread has a pair. To gather and to sum, a warp has a row, of bf16, and reads and writes
16 bytes a lane at a time; to add float32 parts, a thread has four numbers.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gpt_oss_jax.kernels.expert_matmul.sort_ptx import BlockSort
from gpt_oss_jax.kernels.ptx import NEXT, WAIT, apart

MAX_SORTED = 1024
_WARPS = 4
_AT_ONCE = 3  # Pieces of each row that are on their way together.
_START = (
    f"{NEXT} {WAIT}\n"
    + """mov.u32 lane, %tid.x; shr.u32 row, lane, 5; and.b32 lane, lane, 31;
rem.u32 t0, <block>, {grid}; mad.lo.u32 row, t0, {warps}, row;
setp.ge.u32 p, row, {rows}; @p bra DONE;
"""
)


@dataclasses.dataclass(frozen=True)
class Sort:
    """Pairs sorted by expert into `tiles.Tiles`, a pair a thread.

    Attributes:
      pairs: Pairs. A thread block has `MAX_SORTED`; several know from `Count` what there is.
      experts: Experts there are, up to `MAX_SORTED`; pairs of others come to no tile.
      tile: Places of a tile.
      halves_last: As in `BlockSort`.
    """

    pairs: int
    experts: int
    tile: int
    halves_last: bool = False

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return -(-self.pairs // MAX_SORTED)

    @property
    def warps(self) -> int:
        """A multiple of four."""
        return min(MAX_SORTED // 32, 4 * -(-max(self.pairs, self.experts) // 128))

    @property
    def in_blocks(self) -> BlockSort:
        """What each thread block does."""
        sizes = self.pairs, self.experts, self.tile, self.warps, self.grid
        return BlockSort(*sizes, halves_last=self.halves_last)

    @property
    def shared_bytes(self) -> int:
        """What sorting takes, and the end of each expert's pairs."""
        return self.in_blocks.shared_bytes + 4 * self.experts

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to the experts of all pairs, where there are
        several blocks to what `Count` gives, to the expert of each tile, the pair of each place (-1
        for none), the place of each pair (likewise), how many tiles are in use, and shared memory.
        What is in no tile that is in use stays as it was.
        """
        sort, tile = self.in_blocks, self.tile
        names = ("<chosen>", *(("<counts>",) if self.grid > 1 else ()))
        names += ("<of_tile>", "<pairs>", "<places>", "<count>", "<shared>")
        text = f"""{{
.reg .pred p, in; .reg .b32 t0, block, end, place; .reg .b64 at;
{sort.registers()}
{NEXT} {WAIT}
rem.u32 block, <block>, {self.grid};
{sort.ptx("<chosen>", "<shared>", "<counts>")}
setp.eq.u32 p, i, 0; setp.eq.and.u32 p, block, 0, p; @p st.global.u32 [<count>], tiles;
setp.lt.u32 p, first_pair, {self.pairs}; mul.wide.u32 at, first_pair, 4; add.u64 at, at, <places>;
@p st.global.u32 [at], place0;
setp.lt.u32 p, e0, {self.experts}; mul.wide.u32 at, place0, 4; add.u64 at, at, <pairs>;
@p st.global.u32 [at], first_pair;
div.u32 first, place0, {tile}; mul.lo.u32 t0, first, {tile}; setp.eq.and.u32 p, t0, place0, p;
mul.wide.u32 at, first, 4; add.u64 at, at, <of_tile>; @p st.global.u32 [at], e0;
{self._fill()}
DONE:
}}"""
        for i, name in enumerate(("<block>", *names)):
            text = text.replace(name, f"${i}")
        return text

    def _fill(self) -> str:
        """The last block marks what the last tile of each expert has no pair for."""
        sort, ends = self.in_blocks, self.in_blocks.shared_bytes
        text = f"setp.ne.u32 p, block, {self.grid - 1}; @p bra DONE;\n"
        text += sort.ends("<shared>", ends) + f"bar.sync 1, {sort.threads}; mov.u32 t0, -1;\n"
        for expert in range(0, self.experts, self.warps):
            text += f"add.u32 own_expert, of_warp, {expert};"
            text += f"setp.lt.u32 in, own_expert, {self.experts};"
            text += "mad.lo.u32 own, own_expert, 4, <shared>; mov.u32 end, 0;"
            text += f"@in ld.shared.u32 end, [own + {ends}]; add.u32 place, end, in_warp;"
            text += f"add.u32 end, end, {self.tile - 1}; div.u32 end, end, {self.tile};"
            text += f"mul.lo.u32 end, end, {self.tile};\n"
            for _ in range(0, self.tile, 32):
                text += "setp.lt.u32 p, place, end; mul.wide.u32 at, place, 4;"
                text += "add.u64 at, at, <pairs>; @p st.global.u32 [at], t0;"
                text += "add.u32 place, place, 32;\n"
        return text


@dataclasses.dataclass(frozen=True)
class Count:
    """How many pairs of each expert every thread block of a `Sort` has.

    Attributes:
      sort: What places the pairs.
    """

    sort: Sort

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return self.sort.grid

    @property
    def warps(self) -> int:
        """A multiple of four."""
        return self.sort.warps

    @property
    def shared_bytes(self) -> int:
        """What counting takes, which is less."""
        return self.sort.in_blocks.shared_bytes

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to the experts of all pairs, the counts, int32
        [grid, experts], and shared memory.
        """
        sort, experts = self.sort.in_blocks, self.sort.experts
        return f"""{{
.reg .pred p, in; .reg .b32 t0, block; .reg .b64 at;
{sort.registers()}
{NEXT} {WAIT}
rem.u32 block, $0, {self.grid};
{sort.count("$1", "$3")}
setp.lt.u32 p, own_expert, {experts}; mad.lo.u32 t0, block, {experts}, own_expert;
mul.wide.u32 at, t0, 4; add.u64 at, at, $2; @p st.global.u32 [at], own_count0;
}}"""


@dataclasses.dataclass(frozen=True)
class Gather:
    """Rows of x for all places of tiles, in `many_rows.in_order`, and their weights.

    Attributes:
      rows: Places, of all tiles.
      width: Of a row, a multiple of 64.
      choices: Pairs of a row of x.
      tile: Places of a tile.
    """

    rows: int
    width: int
    choices: int
    tile: int
    warps: ClassVar[int] = _WARPS
    shared_bytes: ClassVar[int] = 16

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return -(-self.rows // _WARPS)

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to x, the weights of all pairs, the pairs of all
        places, how many tiles are in use, both results and shared memory, which is not used. Places
        of no pair stay as they are.
        """
        pieces = self.width // 8
        steps = range(-(-pieces // 32))
        names = ", ".join(f"w{s}_<4>" for s in range(_AT_ONCE))
        text = f"""{{
.reg .pred p, turns<2>; .reg .b32 t<2>, lane, row, {names}, v<4>; .reg .b64 at, from, more;
{_START.format(grid=self.grid, warps=_WARPS, rows=self.rows)}
mul.wide.u32 more, row, 4; add.u64 at, more, $3; ld.global.u32 t0, [$4]; ld.global.u32 t1, [at];
mul.lo.u32 t0, t0, {self.tile}; setp.ge.u32 p, row, t0; @p bra DONE;
setp.eq.u32 p, t1, -1; @p bra DONE;
mul.wide.u32 at, t1, 4; add.u64 at, at, $2; div.u32 t1, t1, {self.choices};
setp.eq.u32 p, lane, 0; @p ld.global.u32 t0, [at];
add.u64 more, more, $6; @p st.global.u32 [more], t0;
mul.wide.u32 from, t1, {2 * self.width}; add.u64 from, from, $1;
mul.wide.u32 more, lane, 16; add.u64 from, from, more;
mul.wide.u32 at, row, {2 * self.width}; add.u64 at, at, $5;
and.b32 t0, lane, 24; and.b32 t1, lane, 1; mad.lo.u32 t0, t1, 4, t0;
shr.u32 t1, lane, 1; and.b32 t1, t1, 3; add.u32 t0, t0, t1;
mul.wide.u32 more, t0, 16; add.u64 at, at, more;
and.b32 t0, lane, 2; setp.ne.u32 turns0, t0, 0; and.b32 t0, lane, 4; setp.ne.u32 turns1, t0, 0;
"""
        for first in range(0, len(steps), _AT_ONCE):
            group = [s for s in steps if first <= s < first + _AT_ONCE]
            for s in group:
                words = ", ".join(f"w{s - first}_{i}" for i in range(4))
                text += f"setp.lt.u32 p, lane, {pieces - 32 * s};"
                text += f"@p ld.global.v4.u32 {{{words}}}, [from + {512 * s}];\n"
            for s in group:
                text += self._in_order([f"w{s - first}_{i}" for i in range(4)])
                text += f"setp.lt.u32 p, lane, {pieces - 32 * s};"
                text += f"@p st.global.v4.u32 [at + {512 * s}], {{v0, v1, v2, v3}};\n"
        return _named(text)

    def _in_order(self, words: list[str]) -> str:
        """Of 64 values that eight lanes have, eight each: `v0` to `v3` of where they belong.

        Lane 2 q + t has 16 q + 8 t on, and is to have what comes to place 32 t + 8 q: two values
        four apart of the lane 2 v + t for each v. So a word is put together, then words and lanes
        change places, first neighbours of q, then pairs of neighbours.
        """
        text = ""
        for v in range(4):
            halves = (0x5410, 0x7632)[v % 2]
            text += f"prmt.b32 v{v}, {words[v // 2]}, {words[v // 2 + 2]}, {halves};"
        for bit in range(2):
            text += "\n"
            for low in ((0, 2), (0, 1))[bit]:
                a, b = f"v{low}", f"v{low + 1 + bit}"
                text += f"selp.b32 t0, {a}, {b}, turns{bit};"
                text += f"shfl.sync.bfly.b32 t0, t0, {2 << bit}, 31, -1;"
                text += f"selp.b32 {a}, t0, {a}, turns{bit}; selp.b32 {b}, {b}, t0, turns{bit};"
        return text + "\n"


@dataclasses.dataclass(frozen=True)
class Add:
    """The residual stream plus the sum of each row's parts, rounded once.

    Attributes:
      rows: Rows.
      width: Of a row, a multiple of 4.
      parts: float32 rows to add up for each, which lie together.
    """

    rows: int
    width: int
    parts: int
    warps: ClassVar[int] = _WARPS
    shared_bytes: ClassVar[int] = 16

    @property
    def grid(self) -> int:
        """Thread blocks; a thread has four numbers."""
        return -(-self.rows * self.width // (4 * 32 * _WARPS))

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to the residual stream, the parts, the result and
        shared memory, which is not used.
        """
        fours, names = self.width // 4, [f"y{n}_{i}" for n in range(self.parts) for i in range(4)]
        text = f"""{{
.reg .pred in; .reg .b32 t0, i, row, w<2>; .reg .f32 f<2>, {", ".join(names)}; .reg .b64 at, from;
{NEXT} {WAIT}
mov.u32 i, %tid.x; rem.u32 t0, <block>, {self.grid}; mad.lo.u32 i, t0, {32 * _WARPS}, i;
setp.lt.u32 in, i, {self.rows * fours}; div.u32 row, i, {fours}; mul.lo.u32 t0, row, {fours};
sub.u32 t0, i, t0; mul.lo.u32 row, row, {self.parts * fours}; add.u32 t0, t0, row;
mul.wide.u32 from, t0, 16; add.u64 from, from, $2; mul.wide.u32 at, i, 8; add.u64 at, at, $1;
@in ld.global.v2.b32 {{w0, w1}}, [at];
"""
        for n in range(self.parts):
            four = ", ".join(names[4 * n : 4 * n + 4])
            text += f"@in ld.global.v4.f32 {{{four}}}, [from + {16 * fours * n}];\n"
        for n in range(1, self.parts):
            text += "".join(f"add.f32 y0_{i}, y0_{i}, y{n}_{i};" for i in range(4)) + "\n"
        for i in range(2):
            text += apart(f"w{i}", "t0", "row") + "mov.b32 f0, t0; mov.b32 f1, row;"
            text += f"add.f32 f0, f0, y0_{2 * i}; add.f32 f1, f1, y0_{2 * i + 1};"
            text += f"cvt.rn.bf16x2.f32 w{i}, f1, f0;\n"
        text += "mul.wide.u32 at, i, 8; add.u64 at, at, $3; @in st.global.v2.b32 [at], {w0, w1};\n"
        return _named(text)


@dataclasses.dataclass(frozen=True)
class Sum:
    """For each row the sum of some others, added in float32 one after the other.

    Attributes:
      rows: Of the result.
      width: Of a row, a multiple of 8.
      choices: Rows to add.
      experts: Experts there are: a row of an expert past them is not there. None: all are.
      adds: Whether it is added to the residual stream, and rounded then.
    """

    rows: int
    width: int
    choices: int
    experts: int | None = None
    adds: bool = False
    warps: ClassVar[int] = _WARPS
    shared_bytes: ClassVar[int] = 16

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return -(-self.rows // _WARPS)

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to the rows, which of them to add, the experts of
        those, the residual stream if it is added, the result and shared memory, which is not used.
        """
        X, pieces = self.choices, self.width // 8
        kept = [f"kept{s}_{i}" for s in range(_AT_ONCE) for i in range(4)] if self.adds else []
        names = [f"y{x}_{s}_{i}" for x in range(X) for s in range(_AT_ONCE) for i in range(4)]
        text = f"""{{
.reg .pred p, in, has<{X}>; .reg .b32 t0, lane, row, {", ".join(names + kept)};
.reg .f32 f<2>, sum<2>; .reg .b64 at, from<{X}>, more, residual;
{_START.format(grid=self.grid, warps=_WARPS, rows=self.rows)}
mul.wide.u32 more, lane, 16; mul.lo.u32 t0, row, {X}; mul.wide.u32 at, t0, 4;
"""
        text += "add.u64 from0, at, $3;"
        for x in range(X):
            if self.experts is None:
                text += f"setp.eq.u32 has{x}, 0, 0;"
            else:
                text += f"ld.global.u32 t0, [from0 + {4 * x}];"
                text += f"setp.lt.u32 has{x}, t0, {self.experts};"
        text += "\nadd.u64 at, at, $2;"
        for x in reversed(range(X)):
            text += f"ld.global.u32 t0, [at + {4 * x}]; mul.wide.u32 from{x}, t0, "
            text += f"{2 * self.width}; add.u64 from{x}, from{x}, $1;"
            text += f"add.u64 from{x}, from{x}, more;\n"
        text += f"mul.wide.u32 at, row, {2 * self.width}; add.u64 more, at, more;"
        text += "add.u64 residual, more, $4;" if self.adds else ""
        text += f"add.u64 at, more, ${5 if self.adds else 4};\n"
        steps = range(-(-pieces // 32))
        for first in range(0, len(steps), _AT_ONCE):
            group = [s for s in steps if first <= s < first + _AT_ONCE]
            for s in group:
                text += f"setp.lt.u32 p, lane, {pieces - 32 * s};"
                for x in range(X):
                    words = [f"y{x}_{s - first}_{i}" for i in range(4)]
                    text += "".join(f"mov.u32 {word}, 0;" for word in words)
                    text += f"and.pred in, p, has{x};"
                    text += f"@in ld.global.v4.u32 {{{', '.join(words)}}}, "
                    text += f"[from{x} + {512 * s}];\n"
                if self.adds:
                    words = ", ".join(f"kept{s - first}_{i}" for i in range(4))
                    text += f"@p ld.global.v4.u32 {{{words}}}, [residual + {512 * s}];\n"
            for s in group:
                words = [f"y0_{s - first}_{i}" for i in range(4)]
                for i, word in enumerate(words):
                    text += apart(word, "sum0", "sum1")
                    for x in range(1, X):
                        text += apart(f"y{x}_{s - first}_{i}", "f0", "f1")
                        text += "add.f32 sum0, sum0, f0; add.f32 sum1, sum1, f1;"
                    if self.adds:
                        text += apart(f"kept{s - first}_{i}", "f0", "f1")
                        text += "add.f32 sum0, sum0, f0; add.f32 sum1, sum1, f1;"
                    text += f"cvt.rn.bf16x2.f32 {word}, sum1, sum0;\n"
                text += f"setp.lt.u32 p, lane, {pieces - 32 * s};"
                text += f"@p st.global.v4.u32 [at + {512 * s}], {{{', '.join(words)}}};\n"
        return _named(text)


def _named(text: str) -> str:
    return text.replace("<block>", "$0") + "DONE:\n}"
