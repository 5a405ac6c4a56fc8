"""The thread program of `mosaic_gpu`, as PTX for compute capability 9.0. Knows no JAX.

A block of eight warps multiplies 16 rows (8 of those that are to be routed, which are more than the
weights are) with eight rows of the matrix (a tile), then with the next tile that falls to it; other
blocks have the next rows. The copy engine brings tiles to shared memory, some ahead. The warps
share out the input axis: each has its part of the rows in registers, where they are normalised,
while the first tiles are on their way. `mma.sync` multiplies, the rows its matrix of 16, weights
its 8 columns. The warps take turns at adding the sums of all and ending as the product's `ending`
says, while the others go on.
"""

from __future__ import annotations

import dataclasses

from gpt_oss_jax.kernels.ptx import COPY_WEIGHTS, EMPTY, NEXT, ONCE, WAIT, apart, literal
from gpt_oss_jax.kernels.routing.ptx import choose

MAX_INPUTS = 4096  # Rows are held in registers.
TILE = 8
WARPS = 8
_SHARED_BYTES, _MAX_STAGES = 150 * 1024, 4  # Of tiles; more keeps the next kernel from starting.
_MAX_CLUSTER = 16
_OPERANDS = {
    "rotate": ("scale", "cos", "sin", "q", "k", "v", "room"),
    "add": ("residual", "out"),
    "part": ("out",),
    "route": ("scale", "normed", "experts", "weights", "room"),
}


@dataclasses.dataclass(frozen=True)
class Product:
    """Rows, normalised before some endings, times a matrix, plus a bias; and what follows.

    Attributes:
      rows: Rows.
      inputs: Width of a row, a multiple of 32.
      outputs: Rows of the matrix, a multiple of 8.
      ending: "rotate": rotates queries and keys and puts queries, keys and values apart; "add":
        adds the residual stream; "part": leaves the sums as they are, without a bias; "route":
        picks experts, in a cluster of blocks for 8 rows.
      epsilon: Of the normalisation.
      head: Width of a head, a multiple of 8.
      group: Query heads to a key head.
      choices: Experts of a row.
      room: Words to fill with `EMPTY`, a multiple of 4; of those that rotate or route.
      early: Whether the matrix may be read before earlier kernels have ended.
      multiprocessors: Of the device; it runs with any number.
    """

    rows: int
    inputs: int
    outputs: int
    ending: str
    epsilon: float = 0.0
    head: int = 8
    group: int = 0
    choices: int = 0
    room: int = 0
    early: bool = False
    multiprocessors: int = 132

    @property
    def grid(self) -> int:
        """Thread blocks."""
        return self._groups * self._blocks

    @property
    def _groups(self) -> int:
        """Of rows."""
        return -(-self.rows // self._own_rows)

    @property
    def _own_rows(self) -> int:
        """Of a group. The matrix instruction takes 16."""
        return 8 if self.rows <= 8 or self.ending == "route" else 16

    @property
    def _blocks(self) -> int:
        """Thread blocks of a group, among which the tiles are shared out."""
        if self.ending == "route":
            return self.cluster
        return min(self._tiles, max(1, self.multiprocessors // self._groups))

    @property
    def cluster(self) -> int:
        """Thread blocks of a cluster; what has been routed comes together in its first."""
        if self.ending != "route":
            return 1
        return max(n for n in (1, 2, 4, 8, _MAX_CLUSTER) if self._tiles % n == 0)

    @property
    def shared_bytes(self) -> int:
        """Tiles, sums of a tile more, squares, logits, and a barrier for each tile."""
        return self._bars + 8 * self._stages

    @property
    def _tiles(self) -> int:
        return self.outputs // TILE

    @property
    def _stride(self) -> int:
        """Bytes between rows of a tile: so that eight threads read from all banks."""
        return (2 * self.inputs + 63) // 128 * 128 + 64

    @property
    def _stages(self) -> int:
        most = min(_MAX_STAGES, -(-self._tiles // self._blocks))
        return max(1, min(most, _SHARED_BYTES // (TILE * self._stride)))

    @property
    def _sums(self) -> int:
        return self._stages * TILE * self._stride

    @property
    def _places(self) -> int:
        """For sums. With one more than tiles, whoever ends a tile has read them in time."""
        return self._stages + 1

    @property
    def _squares(self) -> int:
        return self._sums + self._places * _SUM_BYTES

    @property
    def _logits(self) -> int:
        return self._squares + 4 * 16 * WARPS

    @property
    def _bars(self) -> int:
        return self._logits + (4 * 16 * self.outputs if self.ending == "route" else 0)

    @property
    def _chunks(self) -> int:
        """Of 32 inputs; warps take them in turn."""
        return self.inputs // 32

    @property
    def _steps(self) -> int:
        return -(-self._chunks // WARPS)

    @property
    def _halves(self) -> range:
        """Of the 16 rows of the matrix instruction: those in use."""
        return range(self._own_rows // 8)

    def ptx(self) -> str:
        """The thread program. Under vmap there are several grids, one after the other.

        Its operands: the thread block; pointers to x, matrix and bias, those of the ending, and
        shared memory.
        """
        before, end = {
            "rotate": (self._before_rotating, self._rotate),
            "add": (self._before_adding, self._add),
            "part": (str, self._put),
            "route": (self._load_bias, self._keep),
        }[self.ending]
        routes = self.ending == "route"
        text = f"""{self._registers()}
{NEXT} {"" if self.early else WAIT}
mov.u32 warp, %tid.x; and.b32 lane, warp, 31; shr.u32 warp, warp, 5;
shr.u32 g, lane, 2; and.b32 quad, lane, 3; add.u32 bars, <shared>, {self._bars};
shl.b32 part, warp, 6; mad.lo.u32 part, quad, 16, part;
or.b32 t0, warp, lane; setp.eq.u32 p, t0, 0;
{"".join(f"@p mbarrier.init.shared.b64 [bars + {8 * i}], 1;" for i in range(self._stages))}
@p fence.mbarrier_init.release.cluster; bar.sync 1, {32 * WARPS};
rem.u32 t0, <block>, {self.grid}; div.u32 first, t0, {self._blocks};
mul.lo.u32 t1, first, {self._blocks}; sub.u32 unit, t0, t1;
mul.lo.u32 first, first, {self._own_rows};
add.u32 row, first, g; mov.u32 ahead, unit; mov.u32 slot, 0;
{"barrier.cluster.arrive;" if routes else ""}
setp.ne.u32 p, warp, 0; @p bra READY;
FILL:
{self._fetch("FILLED")}
add.u32 slot, slot, 1; setp.lt.u32 p, slot, {self._stages}; @p bra FILL;
READY:
{WAIT if self.early else ""}
{self._empty_room() if self.room else ""}
{self._rows()}
{"barrier.cluster.wait;" if routes else ""}
mov.u32 slot, 0; mov.u32 phase, 0; mov.u32 turn, 0; mov.u32 finisher, 0;
UNIT:
setp.ne.u32 p, warp, finisher; @p bra WAIT_FOR_TILE;
{before()}
WAIT_FOR_TILE:
mad.lo.u32 t1, slot, 8, bars;
WAIT:
mbarrier.try_wait.parity.shared.b64 p, [t1], phase; @!p bra WAIT;
{self._products()}
mad.lo.u32 t0, turn, {_SUM_BYTES}, <shared>; mad.lo.u32 t0, lane, 16, t0;
mad.lo.u32 t0, warp, 512, t0; st.shared.v4.f32 [t0 + {self._sums}], {{c0, c1, c2, c3}};
add.u32 t0, finisher, {_BARRIER}; setp.eq.u32 p, warp, finisher; @p bra FINISH;
bar.arrive t0, {32 * WARPS}; bra REST;
FINISH:
bar.sync t0, {32 * WARPS}; add.u32 ahead, unit, {self._stages * self._blocks};
{self._fetch("FETCHED")}
{self._take_over()}
{end()}
REST:
add.u32 turn, turn, 1; setp.eq.u32 p, turn, {self._places}; @p mov.u32 turn, 0;
add.u32 finisher, finisher, 1; and.b32 finisher, finisher, {WARPS - 1};
add.u32 slot, slot, 1; setp.eq.u32 p, slot, {self._stages}; @p xor.b32 phase, phase, 1;
@p mov.u32 slot, 0;
add.u32 unit, unit, {self._blocks}; setp.lt.u32 p, unit, {self._tiles}; @p bra UNIT;
{self._route() if routes else ""}"""
        bias = () if self.ending == "part" else ("bias",)
        operands = ("block", "x", "matrix", *bias, *_OPERANDS[self.ending], "shared")
        for i, name in enumerate(operands):
            text = text.replace(f"<{name}>", f"${i}")
        return "{\n" + text + "\n}"

    def _registers(self) -> str:
        names = [
            f"x{n}_{s}_{i}" for n in self._halves for s in range(self._steps) for i in range(4)
        ]
        names += [f"n{s}_{i}" for s in range(self._steps) for i in range(4)]
        return f"{_REGISTERS}\n{ONCE}\n.reg .b32 {', '.join(names)}, key<{-(-self.outputs // 32)}>;"

    def _empty_room(self) -> str:
        """16 bytes a thread at a time."""
        threads, pieces = 32 * WARPS * self.grid, self.room // 4
        text = f"rem.u32 t0, <block>, {self.grid}; mad.lo.u32 t0, t0, {WARPS}, warp;"
        text += "mad.lo.u32 t0, t0, 32, lane; mul.wide.u32 at, t0, 16; add.u64 at, at, <room>;"
        text += f"mov.b32 t1, {EMPTY};\n"
        for first in range(0, pieces, threads):
            text += f"setp.lt.u32 p, t0, {pieces - first};"
            text += f"@p st.global.v4.b32 [at + {16 * first}], {{t1, t1, t1, t1}};\n"
        return text

    def _guard(self, step: int) -> str:
        """Says in `in` whether the warp has a chunk in this step; "" where all have."""
        left = self._chunks - WARPS * step
        return "" if left >= WARPS else f"setp.lt.u32 in, warp, {left};"

    def _fetch(self, label: str) -> str:
        """Starts to copy tile `ahead` to `slot`, if there is one, a row by each of eight lanes."""
        size = 2 * self.inputs
        row = f"mad.lo.u32 t0, ahead, {TILE}, lane;"
        if self.ending == "rotate":
            # The two numbers that a rotation mixes lie in columns side by side.
            row = f"{self._head('ahead')} mul.lo.u32 t0, head, {self.head};"
            row += "mad.lo.u32 t0, place, 4, t0; shr.u32 t1, lane, 1; add.u32 t0, t0, t1;"
            row += f"and.b32 t1, lane, 1; mad.lo.u32 t0, t1, {self.head // 2}, t0;"
        return f"""setp.ge.u32 p, ahead, {self._tiles}; @p bra {label};
mad.lo.u32 bar, slot, 8, bars; setp.eq.u32 p, lane, 0;
@p mbarrier.arrive.expect_tx.shared.b64 _, [bar], {TILE * size};
{row}
mul.wide.u32 at, t0, {size}; add.u64 at, at, <matrix>;
mad.lo.u32 t1, slot, {TILE * self._stride}, <shared>; mad.lo.u32 t1, lane, {self._stride}, t1;
setp.lt.u32 p, lane, {TILE}; @p {COPY_WEIGHTS} [t1], [at], {size}, [bar], once;
add.u32 ahead, ahead, {self._blocks};
{label}:"""

    def _rows(self) -> str:
        """The thread's part of the rows, to registers, normalised if they are to be."""
        text = "cvt.u64.u32 more, part;"
        for n in self._halves:
            text += f"add.u32 t0, row, {8 * n}; setp.lt.u32 has{n}, t0, {self.rows};"
            text += f"mul.wide.u32 at, t0, {2 * self.inputs}; add.u64 at, at, more;\n"
            if self.ending == "route":
                text += f"add.u64 atn{n}, at, <normed>;"
            text += f"add.u64 at, at, <x>;{self._loads('at', f'x{n}_', f'has{n}')}"
        if self.ending in ("add", "part"):
            return text
        # With two halves there are not enough registers to load it ahead.
        scale, late = f"add.u64 at, more, <scale>;{self._loads('at', 'n')}", len(self._halves) > 1
        lines = [] if late else [scale]
        for n in self._halves:
            lines.append("".join(f"mov.f32 c{i}, 0f00000000;" for i in range(4)))
            for s in range(self._steps):
                for i in range(4):
                    lines.append(apart(f"x{n}_{s}_{i}", "f0", "f1"))
                    lines += [
                        f"fma.rn.f32 c{2 * (i % 2) + k}, f{k}, f{k}, c{2 * (i % 2) + k};"
                        for k in (0, 1)
                    ]
            lines.append("add.f32 c0, c0, c1; add.f32 c2, c2, c3; add.f32 c0, c0, c2;")
            lines += [
                f"shfl.sync.bfly.b32 f0, c0, {d}, 31, -1; add.f32 c0, c0, f0;" for d in (1, 2)
            ]
            lines.append("shl.b32 t0, warp, 6; mad.lo.u32 t0, g, 4, t0; add.u32 t0, t0, <shared>;")
            lines.append("setp.eq.u32 p, quad, 0;")
            lines.append(f"@p st.shared.f32 [t0 + {self._squares + 32 * n}], c0;")
        lines.append(f"bar.sync 1, {32 * WARPS}; mad.lo.u32 t0, g, 4, <shared>;")
        lines += [scale] if late else []
        for n in self._halves:
            lines.append("mov.f32 f0, 0f00000000;")
            for warp in range(WARPS):
                lines.append(f"ld.shared.f32 f1, [t0 + {self._squares + 64 * warp + 32 * n}];")
                lines.append("add.f32 f0, f0, f1;")
            lines.append(f"fma.rn.f32 f0, f0, {literal(1 / self.inputs)}, {literal(self.epsilon)};")
            lines.append("rsqrt.approx.f32 f0, f0;")
            for s in range(self._steps):
                for i in range(4):
                    x = f"x{n}_{s}_{i}"
                    lines.append(apart(x, "f1", "f2") + apart(f"n{s}_{i}", "f3", "f4"))
                    lines.append("mul.f32 f1, f1, f0; mul.f32 f2, f2, f0;")
                    lines.append("mul.f32 f1, f1, f3; mul.f32 f2, f2, f4;")
                    lines.append(f"cvt.rn.bf16x2.f32 {x}, f2, f1;")
                if self.ending == "route":
                    has = f"has{n}"
                    if guard := self._guard(s):
                        lines.append(f"{guard} and.pred in, in, {has};")
                        has = "in"
                    four = ", ".join(f"x{n}_{s}_{i}" for i in range(4))
                    lines.append(f"@{has} st.global.v4.b32 [atn{n} + {512 * s}], {{{four}}};")
        return text + "\n".join(lines)

    def _loads(self, at: str, name: str, has: str = "") -> str:
        text = ""
        for s in range(self._steps):
            four, guard, when = [f"{name}{s}_{i}" for i in range(4)], self._guard(s), has
            if guard:
                text += guard + (f"and.pred in, in, {has};" if has else "")
                when = "in"
            if when:
                text += "".join(f"mov.b32 {x}, 0;" for x in four) + f"@{when} "
            text += f"ld.global.v4.b32 {{{', '.join(four)}}}, [{at} + {512 * s}];\n"
        return text

    def _products(self) -> str:
        """Of the thread's part of the rows with a tile, to c0 to c3; in four sums, to wait less."""
        text = "".join(f"mov.f32 c{i}, 0f00000000;" for i in range(16))
        text += f"mad.lo.u32 aw, slot, {TILE * self._stride}, <shared>;"
        text += f"mad.lo.u32 aw, g, {self._stride}, aw; add.u32 aw, aw, part; mov.b32 zero, 0;\n"
        for s in range(self._steps):
            if guard := self._guard(s):
                text += f"{guard} @!in bra PART;\n"
            text += f"ld.shared.v4.b32 {{w0, w1, w2, w3}}, [aw + {512 * s}];\n"
            for half in range(2):
                pair = [2 * half, 2 * half + 1]
                lower = [f"x1_{s}_{i}" if len(self._halves) > 1 else "zero" for i in pair]
                a = f"x0_{s}_{pair[0]}, {lower[0]}, x0_{s}_{pair[1]}, {lower[1]}"
                acc = ", ".join(f"c{4 * ((2 * s + half) % 4) + r}" for r in range(4))
                text += "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                text += f"{{{acc}}}, {{{a}}}, {{w{pair[0]}, w{pair[1]}}}, {{{acc}}};\n"
        text += "PART:\n"
        for r in range(4):
            text += f"add.f32 c{r}, c{r}, c{r + 4}; add.f32 c{r + 8}, c{r + 8}, c{r + 12};"
            text += f"add.f32 c{r}, c{r}, c{r + 8};"
        return text

    def _take_over(self) -> str:
        text = f"mad.lo.u32 t0, turn, {_SUM_BYTES}, <shared>; mad.lo.u32 t0, lane, 16, t0;"
        text += f"ld.shared.v4.f32 {{c0, c1, c2, c3}}, [t0 + {self._sums}];\n"
        for warp in range(1, WARPS):
            text += f"ld.shared.v4.f32 {{f0, f1, f2, f3}}, [t0 + {self._sums + 512 * warp}];"
            text += "".join(f"add.f32 c{r}, c{r}, f{r};" for r in range(4)) + "\n"
        return text

    def _head(self, tile: str) -> str:
        """`head` of a tile, and its `place` in it."""
        tiles = self.head // TILE
        text = f"div.u32 head, {tile}, {tiles}; mul.lo.u32 place, head, {tiles};"
        return text + f"sub.u32 place, {tile}, place;"

    def _own_head(self) -> str:
        """What a thread has of its tile: numbers `place` and half a head further of a `head`.

        That is number `head` of key head `kv`; `is_q`: a query, `turns`: a query or key.
        """
        G = self.group
        return f"""{self._head("unit")} mad.lo.u32 place, place, 4, quad;
div.u32 kv, head, {G + 2}; mul.lo.u32 t0, kv, {G + 2}; sub.u32 head, head, t0;
setp.lt.u32 is_q, head, {G}; setp.lt.u32 turns, head, {G + 1};"""

    def _before_rotating(self) -> str:
        """Biases and rotations, while the tile is on its way."""
        H = self.head
        text = f"""{self._own_head()}
mad.lo.u32 t0, kv, {self.group + 2}, head; mad.lo.u32 t0, t0, {H}, place; mul.wide.u32 at, t0, 2;
add.u64 at, at, <bias>; ld.global.u16 b0, [at]; ld.global.u16 b1, [at + {H}];"""
        for n in self._halves:
            text += f"""
add.u32 t0, row, {8 * n}; mad.lo.u32 t1, t0, {H // 2}, place; mul.wide.u32 at, t1, 2;
and.pred p, turns, has{n}; mov.b32 cosine{n}, {0x3F80}; mov.b32 sine{n}, 0;
add.u64 more, at, <cos>; @p ld.global.u16 cosine{n}, [more];
add.u64 more, at, <sin>; @p ld.global.u16 sine{n}, [more];"""
        return text

    def _rotate(self) -> str:
        """For one row or two of a thread; rounded once."""
        H, G = self.head, self.group
        K = self.outputs // (H * (G + 2))
        text = f"""{self._own_head()} shl.b32 b0, b0, 16; shl.b32 b1, b1, 16;
mov.u64 base, <v>; @turns mov.u64 base, <k>; @is_q mov.u64 base, <q>;"""
        for n in self._halves:
            text += f"""
shl.b32 cosine{n}, cosine{n}, 16; shl.b32 sine{n}, sine{n}, 16; add.u32 t0, row, {8 * n};
add.f32 f0, c{2 * n}, b0; add.f32 f1, c{2 * n + 1}, b1;
mul.f32 f2, f1, sine{n}; mul.f32 f3, f0, sine{n}; neg.f32 f2, f2;
fma.rn.f32 f2, f0, cosine{n}, f2; fma.rn.f32 f3, f1, cosine{n}, f3;
mad.lo.u32 t0, t0, {K}, kv; mad.lo.u32 t1, t0, {G}, head; selp.b32 t0, t1, t0, is_q;
mad.lo.u32 t0, t0, {H}, place; mul.wide.u32 at, t0, 2; add.u64 at, at, base;
cvt.rn.bf16.f32 h, f2; @has{n} st.global.b16 [at], h;
cvt.rn.bf16.f32 h, f3; @has{n} st.global.b16 [at + {H}], h;"""
        return text

    def _load_bias(self) -> str:
        return f"""shl.b32 place, quad, 1; mad.lo.u32 place, unit, {TILE}, place;
mul.wide.u32 at, place, 2; add.u64 at, at, <bias>; ld.global.b32 kv, [at];
"""

    def _with_bias(self) -> str:
        return f"""{apart("kv", "b0", "b1")}
add.f32 c0, c0, b0; add.f32 c1, c1, b1; add.f32 c2, c2, b0; add.f32 c3, c3, b1;
"""

    def _before_adding(self) -> str:
        text = self._load_bias()
        for n in self._halves:
            text += f"""add.u32 t0, row, {8 * n}; mad.lo.u32 t0, t0, {self.outputs}, place;
mul.wide.u32 at, t0, 2; add.u64 at, at, <residual>; @has{n} ld.global.b32 residual{n}, [at];
"""
        return text

    def _add(self) -> str:
        """To the residual stream, rounded once."""
        text = self._with_bias()
        for n in self._halves:
            text += f"""{apart(f"residual{n}", "f0", "f1")}
add.f32 f0, f0, c{2 * n}; add.f32 f1, f1, c{2 * n + 1}; cvt.rn.bf16x2.f32 t0, f1, f0;
add.u32 t1, row, {8 * n}; mad.lo.u32 t1, t1, {self.outputs}, place; mul.wide.u32 at, t1, 2;
add.u64 at, at, <out>; @has{n} st.global.b32 [at], t0;
"""
        return text

    def _put(self) -> str:
        """Sums in float32."""
        text = f"shl.b32 place, quad, 1; mad.lo.u32 place, unit, {TILE}, place;\n"
        for n in self._halves:
            text += f"""add.u32 t1, row, {8 * n}; mad.lo.u32 t1, t1, {self.outputs}, place;
mul.wide.u32 at, t1, 4; add.u64 at, at, <out>;
@has{n} st.global.v2.f32 [at], {{c{2 * n}, c{2 * n + 1}}};
"""
        return text

    def _keep(self) -> str:
        """Logits to the first block of the cluster, for the end."""
        text = self._with_bias()
        for n in self._halves:
            text += f"add.u32 t0, g, {8 * n}; mad.lo.u32 t0, t0, {self.outputs}, place;"
            text += f"mad.lo.u32 t0, t0, 4, <shared>; add.u32 t0, t0, {self._logits};"
            text += "mov.u32 t1, 0; mapa.shared::cluster.u32 t0, t0, t1;"
            text += f"@has{n} st.shared::cluster.v2.f32 [t0], {{c{2 * n}, c{2 * n + 1}}};\n"
        return text

    def _route(self) -> str:
        """A warp to a row."""
        text = f"""barrier.cluster.arrive; barrier.cluster.wait;
rem.u32 unit, <block>, {self._blocks}; setp.ne.u32 p, unit, 0; @p bra DONE; mov.u32 unit, warp;
ROW:
add.u32 row, first, unit; setp.lt.u32 p, unit, {self._own_rows};
setp.lt.and.u32 p, row, {self.rows}, p; @!p bra DONE;
mad.lo.u32 aw, unit, {4 * self.outputs}, <shared>; add.u32 aw, aw, {self._logits};
"""
        for j in range(-(-self.outputs // 32)):
            text += f"add.u32 t0, lane, {32 * j}; setp.lt.u32 in, t0, {self.outputs};"
            text += f"mad.lo.u32 t0, t0, 4, aw; mov.b32 key{j}, 0; @in ld.shared.b32 key{j}, [t0];"
        return f"""{text}
{choose(self.outputs, self.choices)}
mad.lo.u32 t0, row, {self.choices}, lane; mul.wide.u32 at, t0, 4;
setp.lt.u32 p, lane, {self.choices};
add.u64 more, at, <experts>; @p st.global.b32 [more], place;
add.u64 more, at, <weights>; @p st.global.f32 [more], f1;
add.u32 unit, unit, {WARPS}; bra ROW;
DONE:"""


_SUM_BYTES = 512 * WARPS
_BARRIER = 2  # Of the warp that ends first; the others' follow.

_REGISTERS = """
.reg .pred p, in, has<2>, is_q, turns;
.reg .b16 h;
.reg .b32 t<2>, warp, lane, g, quad, part, first, row, unit, ahead, slot, phase, turn, bars, bar;
.reg .b32 aw, zero, finisher, head, place, kv, cosine<2>, sine<2>, residual<2>, w<4>, b<2>, f<5>;
.reg .f32 c<16>;
.reg .b64 at, atn<2>, more, base;"""
