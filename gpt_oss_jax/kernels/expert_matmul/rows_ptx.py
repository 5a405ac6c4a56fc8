"""Sorting pairs, gathering and summing rows, as PTX for compute capability 9.0. Knows no JAX.

To sort, a thread has a pair. Otherwise a warp has a row, of bf16, and reads and writes 16 bytes a
lane at a time.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gpt_oss_jax.kernels.expert_matmul.sort_ptx import BlockSort
from gpt_oss_jax.kernels.ptx import NEXT, WAIT

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
    """Pairs sorted by expert into `tiles.Tiles`, by one thread block.

    Attributes:
      pairs: Pairs, up to `MAX_SORTED`.
      experts: Experts there are, likewise; pairs of others come to no tile.
      tile: Places of a tile.
      tiles: How many there can be.
    """

    pairs: int
    experts: int
    tile: int
    tiles: int
    grid: ClassVar[int] = 1

    @property
    def warps(self) -> int:
        """A multiple of four."""
        return 4 * -(-max(self.pairs, self.experts) // 128)

    @property
    def _sort(self) -> BlockSort:
        return BlockSort(self.pairs, self.experts, self.tile, self.warps)

    @property
    def shared_bytes(self) -> int:
        """What sorting takes."""
        return self._sort.shared_bytes

    def ptx(self) -> str:
        """The thread program.

        Its operands: the thread block; pointers to the experts of all pairs, the expert of each
        tile, the pair of each place (-1 for none), the place of each pair (likewise), how many
        tiles are in use, and shared memory.
        """
        text = f"""{{
.reg .pred p, in; .reg .b32 t0; .reg .b64 at;
{self._sort.registers()}
{NEXT} {WAIT}
mov.u32 i, %tid.x; mul.wide.u32 at, i, 4; add.u64 at, at, $3; mov.u32 t0, -1;
"""
        for first in range(0, self.tiles * self.tile, self._sort.threads):
            text += f"setp.lt.u32 p, i, {self.tiles * self.tile - first};"
            text += f"@p st.global.u32 [at + {4 * first}], t0;\n"
        return f"""{text}{self._sort.ptx("$1", "$6")}
setp.eq.u32 p, i, 0; @p st.global.u32 [$5], tiles;
setp.lt.u32 p, i, {self.pairs}; mul.wide.u32 at, i, 4; add.u64 at, at, $4;
@p st.global.u32 [at], place0;
setp.lt.u32 p, e0, {self.experts}; mul.wide.u32 at, place0, 4; add.u64 at, at, $3;
@p st.global.u32 [at], i;
div.u32 first, place0, {self.tile}; mul.lo.u32 t0, first, {self.tile};
setp.eq.and.u32 p, t0, place0, p; mul.wide.u32 at, first, 4; add.u64 at, at, $2;
@p st.global.u32 [at], e0;
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
        text = f"""{{
.reg .pred p; .reg .b32 t0, t1, lane, row, w<4>, v<16>; .reg .b64 at, from, more;
{_START.format(grid=self.grid, warps=_WARPS, rows=self.rows)}
ld.global.u32 t0, [$4]; mul.lo.u32 t0, t0, {self.tile};
setp.ge.u32 p, row, t0; @p bra DONE;
mul.wide.u32 more, row, 4; add.u64 at, more, $3; ld.global.u32 t0, [at];
setp.eq.u32 p, t0, -1; @p bra DONE;
mul.wide.u32 at, t0, 4; add.u64 at, at, $2; setp.eq.u32 p, lane, 0; @p ld.global.u32 t1, [at];
add.u64 more, more, $6; @p st.global.u32 [more], t1;
div.u32 t0, t0, {self.choices}; mul.wide.u32 from, t0, {2 * self.width}; add.u64 from, from, $1;
mul.wide.u32 at, row, {2 * self.width}; add.u64 at, at, $5;
mul.wide.u32 more, lane, 64; add.u64 at, at, more;
and.b32 t0, lane, 1; mul.lo.u32 t0, t0, 16; shr.u32 row, lane, 1; mad.lo.u32 t0, row, 128, t0;
cvt.u64.u32 more, t0; add.u64 from, from, more;
"""
        blocks = self.width // 32
        for first in range(0, blocks, 32):
            text += f"setp.lt.u32 p, lane, {blocks - first};\n"
            for q in range(4):
                words = ", ".join(f"w{i}" for i in range(4))
                text += f"@p ld.global.v4.u32 {{{words}}}, [from + {64 * first + 32 * q}];"
                # Values four apart come together: 0 and 4, 1 and 5, 2 and 6, 3 and 7.
                for v in range(4):
                    halves = (0x5410, 0x7632)[v % 2]
                    text += f"prmt.b32 v{4 * v + q}, w{v // 2}, w{v // 2 + 2}, {halves};"
                text += "\n"
            for v in range(4):
                words = ", ".join(f"v{4 * v + q}" for q in range(4))
                text += f"@p st.global.v4.u32 [at + {64 * first + 16 * v}], {{{words}}};\n"
        return _named(text)


@dataclasses.dataclass(frozen=True)
class Add:
    """The residual stream plus the sum of each row's parts, both rounded first.

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
            text += f"cvt.rn.bf16x2.f32 t0, y0_{2 * i + 1}, y0_{2 * i};"
            for half, spread in enumerate(
                ("shl.b32 row, t0, 16;", f"and.b32 row, t0, {0xFFFF0000};")
            ):
                text += spread + f"mov.b32 f{half}, row;"
            text += _apart(f"w{i}", "t0", "row") + "mov.b32 y0_0, t0; mov.b32 y0_1, row;"
            text += f"add.f32 f0, f0, y0_0; add.f32 f1, f1, y0_1; cvt.rn.bf16x2.f32 w{i}, f1, f0;\n"
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
    """

    rows: int
    width: int
    choices: int
    experts: int | None = None
    warps: ClassVar[int] = _WARPS
    shared_bytes: ClassVar[int] = 16

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return -(-self.rows // _WARPS)

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to the rows, which of them to add, the experts of
        those, the result and shared memory, which is not used.
        """
        X, pieces = self.choices, self.width // 8
        names = [f"y{x}_{s}_{i}" for x in range(X) for s in range(_AT_ONCE) for i in range(4)]
        text = f"""{{
.reg .pred p, in, has<{X}>; .reg .b32 t0, lane, row, {", ".join(names)};
.reg .f32 f<2>, sum<2>; .reg .b64 at, from<{X}>, more;
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
        text += f"mul.wide.u32 at, row, {2 * self.width}; add.u64 at, at, $4;"
        text += "add.u64 at, at, more;\n"
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
            for s in group:
                words = [f"y0_{s - first}_{i}" for i in range(4)]
                for i, word in enumerate(words):
                    text += _apart(word, "sum0", "sum1")
                    for x in range(1, X):
                        text += _apart(f"y{x}_{s - first}_{i}", "f0", "f1")
                        text += "add.f32 sum0, sum0, f0; add.f32 sum1, sum1, f1;"
                    text += f"cvt.rn.bf16x2.f32 {word}, sum1, sum0;\n"
                text += f"setp.lt.u32 p, lane, {pieces - 32 * s};"
                text += f"@p st.global.v4.u32 [at + {512 * s}], {{{', '.join(words)}}};\n"
        return _named(text)


def _named(text: str) -> str:
    return text.replace("<block>", "$0") + "DONE:\n}"


def _apart(pair: str, low: str, high: str) -> str:
    """Two bf16 of a register as float32."""
    return f"shl.b32 {low}, {pair}, 16; and.b32 {high}, {pair}, {0xFFFF0000};"
