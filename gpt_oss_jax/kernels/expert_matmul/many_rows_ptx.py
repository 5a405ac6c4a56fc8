"""What a thread of `many_rows.grouped` does besides the matrix products, as PTX for Hopper.

A warpgroup multiplies 64 outputs of an expert with a tile of rows; the weights are the left
operand, in registers. A step of its input axis is some MXFP4 blocks of 16 bytes wide, as the
checkpoint has them. Of two blocks a thread takes the half that is its column quad's, sixteen codes
with one scale, so the matrix unit meets the values of both in an order of its own (`in_order`), in
which rows and hidden rows are kept. Knows no JAX.

A thread is named by its warp w, the row g of eight and the column quad q of its lane 4 g + q. Of a
left operand [64, 16] it holds two rows, h = 0 and 1, and of a result [64, columns] two neighbouring
columns in eight of the same two rows.
"""

from __future__ import annotations

import dataclasses
import itertools

from gpt_oss_jax.kernels.expert_matmul.mxfp4_ptx import (
    LAST_FACTOR,
    decode,
    literal,
    scale,
    swiglu,
)

OUTPUTS = 64  # Of a warpgroup.

_THREAD = """.reg .pred odd; .reg .b16 h; .reg .b32 t<2>, w, g, q, place; .reg .b64 at;
.reg .f32 f<2>, b0, bias<2>, sent, got, weight<2>;
mov.u32 t0, %tid.x; and.b32 q, t0, 3; shr.u32 g, t0, 2; and.b32 g, g, 7;
shr.u32 w, t0, 5; and.b32 w, w, 3;
"""


@dataclasses.dataclass(frozen=True)
class Projection:
    """The up or the down projection. Its methods are the pieces, with their operands in order.

    Attributes:
      outputs: Of an expert.
      blocks: MXFP4 blocks of its input axis.
      step: Of those, how many a step has; even.
      bias_bytes: 2 for bfloat16, 4 for float32.
      limit: Clamp of the SwiGLU that pairs of outputs go through; None for the down projection,
        whose outputs are multiplied with the routing weight instead.
    """

    outputs: int
    blocks: int
    step: int
    bias_bytes: int
    limit: float | None = None

    @property
    def width(self) -> int:
        """Values of a row of the result."""
        return self.outputs if self.limit is None else self.outputs // 2

    @property
    def loaded(self) -> int:
        """Registers of a step's words and scales."""
        return 3 * self.step

    def places(self) -> str:
        """How far a thread's words and scales are from where those of a step begin.

        Operands: both, which it gives.
        """
        text = f"{self._row()} mul.lo.u32 place, t0, {16 * self.step}; mad.lo.u32 $0, q, 8, place;"
        return _scope(text + f"shr.u32 q, q, 1; mad.lo.u32 $1, t0, {self.blocks}, q;")

    def of_pair(self, h: int, i: int) -> tuple[int, int, int]:
        """Which that `load` gives are two words and the scale of row h's pair of blocks i."""
        first = self.step * h + 2 * i
        return first, first + 1, 2 * self.step + self.step // 2 * h + i

    def load(self) -> str:
        """A thread's words and scales of a step.

        Operands: a word for each block and half as many scales, which it gives, each for h = 0 and
        then 1, `loaded`; in shared memory the warpgroup's weights of the step [64, 16 step] and all
        its scales [64, blocks]; the number of the step; what `places` gave.
        """
        n = self.step
        weights, scales, step, word, scale = (f"${self.loaded + i}" for i in range(5))
        text = f".reg .b32 place; add.u32 place, {weights}, {word};\n"
        for h, i in itertools.product(range(2), range(n // 2)):
            first, second, _ = self.of_pair(h, i)
            place = 8 * 16 * n * h + 32 * i
            text += f"ld.shared.v2.u32 {{${first}, ${second}}}, [place + {place}];\n"
        text += f"add.u32 place, {scales}, {scale}; mad.lo.u32 place, {step}, {n}, place;\n"
        for h, i in itertools.product(range(2), range(n // 2)):
            place = 8 * self.blocks * h + 2 * i
            text += f"ld.shared.u8 ${self.of_pair(h, i)[2]}, [place + {place}];\n"
        return "{\n" + text + "}"

    def extra_words(self, rows: int) -> int:
        """How many `read_extras` gives: biases, and of the down projection weights of rows."""
        return 2 + (-(-rows // 32) if self.limit is None else 0)

    def read_extras(self, rows: int) -> str:
        """Biases and routing weights, which `finish` takes: long before, so that nothing waits.

        Operands: two biases as they are, and for the down projection the routing weights of every
        32nd row from that of the lane's number on (of fewer rows, modulo these), which it gives; in
        global memory the biases of the warpgroup's outputs, and the routing weights of the rows.
        """
        text, second, words = self._row(), 8, self.extra_words(rows)
        if self.limit is not None:
            # Those of the gate that a thread has after the exchange, and of the linear part.
            text += "and.b32 t1, g, 1; sub.u32 t0, t0, t1; mad.lo.u32 t0, t1, 8, t0;"
            second = 1
        text += f"mul.wide.u32 at, t0, {self.bias_bytes}; add.u64 at, at, ${words};\n"
        for i in range(2):
            place = second * self.bias_bytes * i
            if self.bias_bytes == 2:
                text += f"ld.global.nc.u16 ${i}, [at + {place}];\n"
            else:
                text += f"ld.global.nc.u32 ${i}, [at + {place}];\n"
        if self.limit is None:
            text += f"mov.u32 t0, %tid.x; and.b32 t0, t0, {min(rows, 32) - 1};"
            text += f"mul.wide.u32 at, t0, 4; add.u64 at, at, ${words + 1};\n"
        for i in range(words - 2):
            text += f"ld.global.nc.u32 ${2 + i}, [at + {128 * i}];\n"
        return _scope(text)

    def start(self) -> str:
        """Where a thread's results go.

        Operands: the address that it gives; in global memory the result at the tile's first row
        and the warpgroup's first output, of the up projection the first of 64 hidden values; which
        half of these is the warpgroup's.
        """
        text = self._row()
        if self.limit is not None:
            # Where `in_order` has hidden value `t0 / 2` of the half.
            text = (
                "shr.u32 t0, w, 1; shl.b32 t0, t0, 5; and.b32 t1, w, 1; mad.lo.u32 t0, t1, 16, t0;"
            )
            text += "and.b32 t1, g, 2; mad.lo.u32 t0, t1, 4, t0; shr.u32 t1, g, 2;"
            text += "mad.lo.u32 t0, t1, 2, t0; and.b32 t1, g, 1; add.u32 t0, t0, t1;"
            text += "mad.lo.u32 t0, $2, 4, t0;\n"
        text += f"mad.lo.u32 t0, q, {2 * self.width}, t0; mul.wide.u32 at, t0, 2;"
        return _scope(text + "add.u64 $0, at, $1;")

    def finish(self, group: int) -> str:
        """Bias, then SwiGLU or routing weight, for a thread's four sums of eight columns.

        Operands: sums of its two columns for h = 0 and for 1; what `start` and `read_extras` gave.
        """
        # Not where they are read, which would wait for them.
        shift = 16 if self.bias_bytes == 2 else 0
        text = "".join(f"shl.b32 t0, ${5 + i}, {shift}; mov.b32 bias{i}, t0;\n" for i in range(2))
        if self.limit is None:
            for column in range(2):
                text += f"mad.lo.u32 t0, q, 2, {8 * (group % 4) + column};"
                text += f"shfl.sync.idx.b32 weight{column}, ${7 + group // 4}, t0, 31, -1;\n"
        else:
            text += "and.b32 t0, g, 1; setp.ne.u32 odd, t0, 0;\n"
        for column in range(2):
            place = 2 * self.width * (8 * group + column)
            first, second = f"${column}", f"${2 + column}"
            if self.limit is None:
                for i, value in enumerate((first, second)):
                    text += f"fma.rn.f32 f0, {value}, {literal(LAST_FACTOR)}, bias{i};"
                    text += f"mul.f32 f0, f0, weight{column}; cvt.rn.bf16.f32 h, f0;"
                    text += f"st.global.b16 [$4 + {place + 16 * i}], h;\n"
                continue
            # A lane has gate or linear part of two hidden values, its neighbour the other parts.
            text += f"selp.b32 sent, {first}, {second}, odd;"
            text += "shfl.sync.bfly.b32 got, sent, 4, 31, -1;"
            text += f"selp.b32 f0, got, {first}, odd; selp.b32 f1, {second}, got, odd;\n"
            for i in range(2):
                text += f"fma.rn.f32 f{i}, f{i}, {literal(LAST_FACTOR)}, bias{i};"
            text += swiglu("f0", "f1", self.limit)
            text += f"cvt.rn.bf16.f32 h, f0; st.global.b16 [$4 + {place}], h;\n"
        return _scope(text)

    def _row(self) -> str:
        """t0: a thread's output with h = 0; that with h = 1 is 8 after it.

        Neighbouring lanes take neighbouring rows, 16 bytes a block apart in shared memory, so that
        they begin at all four banks where a row can. In the up projection the hidden values of a
        warp also lie together.
        """
        if self.limit is None:
            return "mad.lo.u32 t0, w, 16, g;\n"
        return (
            "shr.u32 t0, w, 1; shl.b32 t0, t0, 4; and.b32 t1, w, 1; mad.lo.u32 t0, t1, 4, t0;"
            "shr.u32 t1, g, 2; mad.lo.u32 t0, t1, 32, t0; and.b32 t1, g, 3; add.u32 t0, t0, t1;\n"
        )


def decode_half() -> str:
    """Both words of half a block to their part of the left operand.

    Operands: eight registers of two bf16 that it gives, in the order of the columns; the words;
    their scale.
    """
    text = ".reg .b32 t<2>, v<4>, s, k; mov.b32 s, $10;" + scale("s", "k")
    for i in range(2):
        text += decode(f"${8 + i}", "k", "v")
        text += "".join(f"mov.b32 ${4 * i + v}, v{v};" for v in range(4))
    return "{\n" + text + "\n}"


def _scope(text: str) -> str:
    return "{\n" + _THREAD + text + "\n}"
