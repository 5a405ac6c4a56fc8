"""What the thread programs of `few_rows` share, as PTX for compute capability 9.0. Knows no JAX.

A tile is 16 outputs of one expert. The weights of a tile lie together in the checkpoint, too: the
copy engine brings them to shared memory in one piece. Warps share out the input axis, and each has
its part of the rows in registers. A thread takes MXFP4 blocks of 16 bytes, decodes them in
registers and multiplies with `mma.sync`: weights are the matrix of 16 rows, up to 8 rows of x that
of 8 columns. A warp that ends a tile adds up what all of them have.

The matrix instruction does not care which element of a block is called which, as long as both sides
agree: x is put into the order in which the decoding leaves the weights.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from gpt_oss_jax.kernels.expert_matmul.mxfp4_ptx import (
    LAST_FACTOR,
    decode,
    literal,
    scale,
    swiglu,
)
from gpt_oss_jax.kernels.ptx import COPY_WEIGHTS, EMPTY, ONCE

COLUMNS = 8
MAX_BLOCKS = 128  # On an input axis.
TILE = 16


@dataclasses.dataclass(frozen=True)
class Projection:
    """One of the two.

    Attributes:
      name: "up" or "down".
      rows: Outputs of an expert.
      blocks: MXFP4 blocks of its input axis.
    """

    name: str
    rows: int
    blocks: int

    @property
    def tiles(self) -> int:
        """Of an expert."""
        return self.rows // TILE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layer:
    """A launch of both projections; how its blocks share out the tiles is its own.

    Attributes:
      inputs: Width of a row.
      hidden: Width of an expert.
      experts: Experts there are.
      choices: Experts of a row.
      rows: Rows.
      bias_bytes: 2 for bfloat16, 4 for float32.
      limit: Clamp of the SwiGLU.
      multiprocessors: Of the device.
      warps: Of a thread block that share out the input axis.
      block_warps: All of a thread block.
    """

    inputs: int
    hidden: int
    experts: int
    choices: int
    rows: int
    bias_bytes: int
    limit: float
    multiprocessors: int = 132
    warps: ClassVar[int]
    block_warps: ClassVar[int]

    @property
    def room(self) -> int:
        """Words that are `EMPTY` before the launch: hidden values of all pairs."""
        return self.rows * self.choices * self.hidden // 2

    @property
    def up(self) -> Projection:
        """From rows to pairs of gate and linear part."""
        return Projection("up", 2 * self.hidden, self.inputs // 32)

    @property
    def down(self) -> Projection:
        """From hidden values to what is summed up."""
        return Projection("down", self.inputs, self.hidden // 32)

    def _steps(self, p: Projection) -> int:
        """Of the input axis, in which every thread takes a block of two outputs."""
        return -(-p.blocks // (4 * self.warps))

    def _tile_bytes(self, p: Projection) -> int:
        """Packed blocks, scales and biases."""
        return TILE * (17 * p.blocks + self.bias_bytes)

    @property
    def _stage_bytes(self) -> int:
        """A multiple of 128, so that blocks begin at one: copies to other places are slower."""
        return -(-max(self._tile_bytes(self.up), self._tile_bytes(self.down)) // 128) * 128

    @property
    def _sum_bytes(self) -> int:
        return 512 * self.warps

    @property
    def _sums(self) -> int:
        return self._stages * self._stage_bytes

    @property
    def _full(self) -> list[int]:
        return [self._barriers + 8 * (self._stages + i) for i in range(2)]

    @property
    def _free(self) -> list[int]:
        return [self._barriers + 8 * (self._stages + 2 + i) for i in range(2)]

    def _registers(self) -> str:
        steps = max(map(self._steps, (self.up, self.down)))
        return f"""
.reg .pred p, in, leads, leads_quad;
.reg .b16 h;
.reg .b32 t<2>, warp, lane, g, q, n, blk, unit, last, total, slot, phase, turn, round, done;
.reg .b32 bar, visit, tile, pair, row, aw, as, w0_<4>, w1_<4>, s<2>, k<2>, v0_<4>, v1_<4>;
.reg .b32 x<{16 * steps}>, y<4>;
.reg .f32 c<8>, d<4>, b<2>, bias<2>, f<2>;
.reg .b64 at, more;
{ONCE}"""

    def _copy(self, p: Projection, guard: str) -> str:
        """Of tile `n` of all experts' to `row`; `bar` tells when it is there."""
        text = f"{guard} mbarrier.arrive.expect_tx.shared.b64 _, [bar], {self._tile_bytes(p)};\n"
        place = 0
        for name, size in (
            ("blocks", 16 * p.blocks),
            ("scales", p.blocks),
            ("bias", self.bias_bytes),
        ):
            size *= TILE
            text += f"mul.wide.u32 at, n, {size}; add.u64 at, at, <{p.name}_{name}>;"
            text += f"{guard} {COPY_WEIGHTS} [row + {place}], [at], {size}, [bar], once;\n"
            place += size
        return text

    def _guard(self, p: Projection, step: int) -> str:
        """Empty where every thread has a block of the input axis."""
        return "" if 4 * self.warps * (step + 1) <= p.blocks else "@in"

    def _is_in(self, p: Projection, step: int) -> str:
        return f"setp.lt.u32 in, blk, {p.blocks - 4 * self.warps * step};"

    def _load(self, p: Projection, load: str, at: str = "at", first: int = 0) -> str:
        """A thread's part of the rows of a visit; zeros past the input axis."""
        text = ""
        for step, fours in self._fours(p):
            guard = self._guard(p, step)
            if guard:
                text += self._is_in(p, step)
                text += "".join(f"mov.u32 {x}, 0;" for four, _ in fours for x in four)
            for four, place in fours:
                text += f"{guard} {load}.v4.u32 {{{', '.join(four)}}}, [{at} + {first + place}];\n"
        return text

    def _load_until_ready(self, p: Projection) -> str:
        """The same from `at`, as long as some of it is `EMPTY`."""
        again = ""
        for _, fours in self._fours(p):
            for four, place in fours:
                again += f"{largest(four)} setp.eq.u32 p, t0, {EMPTY}; @p ld.relaxed.gpu.global"
                again += f".v4.u32 {{{', '.join(four)}}}, [at + {place}];\n"
        every = [f"x{i}" for i in range(16 * self._steps(p))]
        return f"""
AGAIN:
{largest(every)} setp.eq.u32 p, t0, {EMPTY}; vote.sync.any.pred p, p, -1; @!p bra ALL_THERE;
{again}nanosleep.u32 20; bra AGAIN;
ALL_THERE:
"""

    def _in_order(self, p: Projection) -> str:
        """The rows as `decode` has the weights."""
        text = ""
        for first in range(0, 16 * self._steps(p), 4):
            # 0 and 4, 1 and 5, 2 and 6, 3 and 7.
            four = [f"x{first + i}" for i in range(4)]
            for r in range(4):
                text += f"prmt.b32 y{r}, {four[r // 2]}, {four[r // 2 + 2]}, "
                text += f"{(0x5410, 0x7632)[r % 2]};"
            text += "".join(f"mov.u32 {x}, y{r};" for r, x in enumerate(four)) + "\n"
        return text

    def _fours(self, p: Projection):
        """Steps, each with four times four registers and how far from `at` they come from."""
        for step in range(self._steps(p)):
            at, x = 256 * self.warps * step, 16 * step
            yield (
                step,
                [([f"x{x + 4 * i + k}" for k in range(4)], at + 16 * i) for i in range(4)],
            )

    def _products(self, p: Projection) -> str:
        """Of a thread's part of the rows with its part of the tile."""
        text = f"mad.lo.u32 aw, slot, {self._stage_bytes}, <shared>;"
        text += f"mad.lo.u32 as, g, {2 * p.blocks}, blk; add.u32 as, as, aw;"
        text += f"mad.lo.u32 aw, g, {32 * p.blocks}, aw; mad.lo.u32 aw, blk, 16, aw;\n"
        text += "".join(f"mov.f32 c{i}, 0f00000000;" for i in range(8)) + "\n"
        for step in range(self._steps(p)):
            if guard := self._guard(p, step):
                text += f"setp.ge.u32 p, warp, {-(-p.blocks // 4) - self.warps * step};"
                text += f"@p bra {p.name.upper()}_REST_{step};{self._is_in(p, step)}\n"
            for row in range(2):
                words = [f"w{row}_{i}" for i in range(4)]
                if guard:
                    text += "".join(f"mov.u32 {word}, 0;" for word in (*words, f"s{row}"))
                place = 64 * self.warps * step
                codes, scales = place + 16 * p.blocks * row, 16 * TILE * p.blocks
                scales += place // 16 + p.blocks * row
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
                text += f"{p.name.upper()}_REST_{step}:\n"
        return text + "".join(f"add.f32 c{r}, c{r}, c{r + 4};" for r in range(4))

    def _hand_over(self) -> str:
        """A warp's sums to their place."""
        text = f"mad.lo.u32 t0, turn, {self._sum_bytes}, <shared>; mad.lo.u32 t0, lane, 16, t0;"
        text += "mad.lo.u32 t0, warp, 512, t0;"
        return text + f"st.shared.v4.f32 [t0 + {self._sums}], {{c0, c1, c2, c3}};"

    def _load_bias(self, p: Projection) -> str:
        """Of a thread's two outputs; float32."""
        text = f"mad.lo.u32 t0, slot, {self._stage_bytes}, <shared>;"
        text += f"mad.lo.u32 t0, g, {2 * self.bias_bytes}, t0;"
        place = f"[t0 + {17 * TILE * p.blocks}]"
        if self.bias_bytes == 4:
            return text + f"ld.shared.v2.f32 {{bias0, bias1}}, {place};"
        text += f"ld.shared.u32 t0, {place}; shl.b32 t1, t0, 16; mov.b32 bias0, t1;"
        return text + "and.b32 t1, t0, 0xFFFF0000; mov.b32 bias1, t1;"

    def _take_over(self) -> str:
        """The sums of all warps."""
        text = f"mad.lo.u32 t0, turn, {self._sum_bytes}, <shared>; mad.lo.u32 t0, lane, 16, t0;\n"
        text += f"ld.shared.v4.f32 {{c0, c1, c2, c3}}, [t0 + {self._sums}];\n"
        for warp in range(1, self.warps):
            text += f"ld.shared.v4.f32 {{d0, d1, d2, d3}}, [t0 + {self._sums + 512 * warp}];"
            text += "".join(f"add.f32 c{r}, c{r}, d{r};" for r in range(4)) + "\n"
        return text

    def _finish(self, p: Projection, column: int) -> str:
        """Bias, then SwiGLU or routing weight, for one of a thread's two columns."""
        text = f"mov.u32 pair, y{column}; setp.ne.u32 p, pair, -1;"
        for r in range(2):
            text += f"fma.rn.f32 f{r}, c{2 * r + column}, {literal(LAST_FACTOR)}, bias{r};"
        text += "\n"
        if p.name == "down":
            text += "shl.b32 row, tile, 3; add.u32 row, row, g; shl.b32 row, row, 1;"
            text += f"mad.lo.u32 t0, pair, {p.rows}, row;"
            text += "mul.wide.u32 at, t0, 4; add.u64 at, at, <out>;"
            text += f"mov.b32 b0, y{2 + column}; mul.f32 f0, f0, b0; mul.f32 f1, f1, b0;"
            return text + "@p st.global.v2.f32 [at], {f0, f1};\n"
        text += swiglu("f0", "f1", self.limit)
        # Two neighbours in one word, which is there as a whole or not at all.
        text += "mov.f32 f1, 0f00000000; cvt.rn.bf16x2.f32 t0, f1, f0;"
        text += "shfl.sync.bfly.b32 t1, t0, 4, 31, -1; prmt.b32 row, t0, t1, 0x5410;"
        text += "and.b32 t0, g, 1; setp.eq.and.u32 p, t0, 0, p;"
        text += f"mad.lo.u32 t0, tile, 8, g; mad.lo.u32 t0, pair, {self.hidden}, t0;"
        text += "mul.wide.u32 at, t0, 2; add.u64 at, at, <hidden>;"
        return text + "@p st.relaxed.gpu.global.u32 [at], row;\n"


def largest(names: list[str]) -> str:
    """Of unsigned registers, to t0."""
    return f"mov.u32 t0, {names[0]};" + "".join(f"max.u32 t0, t0, {x};" for x in names[1:])


def wait(label: str, barrier: int, parity: str) -> str:
    """Until a phase of the barrier that is so far from `bar` has ended."""
    return (
        f"{label}:\nmbarrier.try_wait.parity.shared.b64 p, [bar + {barrier}], {parity};"
        f"@!p bra {label};"
    )


def with_operands(text: str, names: list[str]) -> str:
    """A program that takes operands in the order of their names."""
    for i, name in enumerate(names):
        text = text.replace(f"<{name}>", f"${i}")
    return "{\n" + text + "\n}"
