"""The kernel for a single row's experts on Hopper, in an interpreter of PTX."""

import functools
import re

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hopper_layer import launched, layer, wanted

from gpt_oss_jax.kernels.dense.ptx import Product
from gpt_oss_jax.kernels.expert_matmul.few_rows_ptx import SeveralRows
from gpt_oss_jax.kernels.expert_matmul.few_rows_tiles_ptx import MAX_BLOCKS, Projection
from gpt_oss_jax.kernels.expert_matmul.one_row_ptx import MAX_CHOICES, OneRow
from gpt_oss_jax.kernels.expert_matmul.rows import most_tiles
from gpt_oss_jax.kernels.expert_matmul.rows_ptx import MAX_SORTED
from gpt_oss_jax.kernels.ptx import COPY, COPY_WEIGHTS, EMPTY, ONCE
from gpt_oss_jax.quant import MXArray


def interpreted(x, chosen, weight, w, residual=None, blocks=2, by_chance=None):
    """Thread blocks that all run at once; the result as float32."""
    E, F, _, D = w.up.shape
    program = OneRow(
        inputs=D,
        hidden=F,
        experts=E,
        choices=chosen.size,
        bias_bytes=w.up_bias.dtype.itemsize,
        limit=7.0,
        multiprocessors=blocks,
        adds=residual is not None,
    )
    assert program.grid == blocks
    up, down = (w.up.blocks, w.up.scales, w.up_bias), (w.down.blocks, w.down.scales, w.down_bias)
    more = () if residual is None else (residual,)
    room, out = np.full(program.room, EMPTY, np.int32), np.full((1, D), np.nan, ml_dtypes.bfloat16)
    arrays = x, chosen, weight, *up, *down, *more, room, out
    return launched(program, *arrays, at_once=True, by_chance=by_chance).astype(np.float32)


def error(got, x, chosen, weight, w):
    want = wanted(x, chosen, weight, w)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.mark.parametrize(
    ("options", "blocks", "by_chance"),
    [
        ({}, 2, False),
        ({"bias": ml_dtypes.bfloat16}, 2, True),
        ({"X": 1}, 1, True),
        ({"X": 3, "D": 96, "F": 96}, 7, True),
        ({"E": 9, "X": 8, "D": 64, "F": 32}, 3, False),
        ({"X": 4, "D": 64, "F": 32}, 16, False),
        ({"X": 4, "D": 64, "F": 32}, 16, True),
        ({"D": 800, "F": 32, "X": 1}, 2, False),
        ({"D": 32, "F": 800, "X": 1}, 2, False),
    ],
    ids=[
        "two experts",
        "bfloat16 biases",
        "one expert",
        "seven blocks",
        "eight experts",
        "more blocks than tiles of an expert",
        "and in any order",
        "two steps and a rest of x",
        "and of hidden values",
    ],
)
def test_equals_the_oracle(options, blocks, by_chance):
    args = layer(1, **options)
    by_chance = np.random.default_rng(0) if by_chance else None
    assert error(interpreted(*args, blocks=blocks, by_chance=by_chance), *args) < 4e-3


@pytest.mark.parametrize("what", ["AGAIN", "PARTS"])
def test_what_is_not_there_yet_is_read_again(monkeypatch, what):
    """Hidden values, and outputs of the other experts: without that the result is another one."""
    args = layer(1, X=3, D=64, F=64)
    right = interpreted(*args, blocks=5)
    text = OneRow.ptx

    def once(self):
        return text(self).replace(f"bra {what};", "")

    monkeypatch.setattr(OneRow, "ptx", once)
    chances = map(np.random.default_rng, range(4))
    results = (interpreted(*args, blocks=5, by_chance=chance) for chance in chances)
    assert not all(np.array_equal(result, right) for result in results)


def test_the_residual_stream_is_added():
    """Before it is rounded: without itself, what was rounded off is left of it."""
    args = layer(1)
    alone = interpreted(*args)
    residual = np.random.default_rng(0).normal(size=args[0].shape).astype(ml_dtypes.bfloat16)
    got, want = interpreted(*args, residual), residual.astype(np.float32) + alone
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-8 * np.abs(alone).max())
    rest = interpreted(*args, -alone.astype(ml_dtypes.bfloat16))
    assert rest.any() and (np.abs(rest) <= 2**-8 * np.abs(alone)).all()


class OnlyDown(OneRow):
    """Hidden values are there from the beginning."""

    up = Projection("up", 0, 1)


def test_every_code_and_scale_is_exact():
    """One block on the input axis, one nonzero: what comes out is one weight after the other."""
    codes = np.arange(32, dtype=np.uint8)
    blocks = np.tile(codes[::2] % 16 | (codes[1::2] % 16) << 4, (1, 32, 1, 1)).astype(np.uint8)
    scales = np.arange(112, 144, dtype=np.uint8).reshape(1, 32, 1)
    sizes = {"inputs": 32, "hidden": 32, "experts": 1, "choices": 1}
    program = OnlyDown(**sizes, bias_bytes=4, limit=7.0)
    w = MXArray(jnp.asarray(blocks), jnp.asarray(scales))
    want = np.asarray(w.dequantize(jnp.float32))[0]
    nothing = np.zeros(32, np.int32)
    for k in range(0, 32, 3):  # All places of a word, and all words.
        hidden = jnp.eye(32, dtype=jnp.bfloat16)[k : k + 1]
        up = 3 * [nothing]
        down = [w.shuffle().blocks, scales, nothing]
        arrays = [nothing, nothing, np.ones(1, np.float32), *up, *down]
        out = np.full(32, np.nan, ml_dtypes.bfloat16)
        np.testing.assert_array_equal(launched(program, *arrays, hidden, out), want[:, k])


@pytest.mark.parametrize("width", [32, 2880, 32 * MAX_BLOCKS])
@pytest.mark.parametrize("choices", [1, MAX_CHOICES])
def test_a_multiprocessor_has_room_for_its_block(width, choices):
    """Blocks wait for each other, so all have to be on the device at once."""
    sizes = {"inputs": width, "hidden": width, "experts": 128, "choices": choices}
    program = OneRow(**sizes, bias_bytes=4, limit=7.0)
    assert program.grid <= program.multiprocessors
    assert program.shared_bytes <= 227 * 1024


@pytest.mark.parametrize("experts", [32, 128])
def test_a_multiprocessor_has_room_for_three_blocks_of_several_rows(experts):
    """A block has a kilobyte more than it asks for."""
    sizes = {"inputs": 2880, "hidden": 2880, "experts": experts, "choices": 4, "rows": 256}
    visits = most_tiles(1024, experts, 8)
    program = SeveralRows(**sizes, visits=visits, bias_bytes=4, limit=7.0)
    assert 3 * (program.shared_bytes + 1024) <= 228 * 1024


def test_the_largest_block_of_several_rows_fits():
    width, most = 32 * MAX_BLOCKS, MAX_SORTED
    sizes = {"inputs": width, "hidden": width, "experts": most, "choices": 4, "rows": most // 4}
    visits = most_tiles(most, most, 8)
    program = SeveralRows(**sizes, visits=visits, bias_bytes=4, limit=7.0)
    assert program._stages == 2 and program.shared_bytes <= 227 * 1024


@pytest.mark.parametrize("rows", [1, 8])
def test_weights_do_not_drive_out_what_is_read_again(rows):
    """Their copies say so; those of hidden values, which other blocks read, do not."""
    sizes = {"inputs": 64, "hidden": 64, "experts": 4, "choices": 2, "bias_bytes": 2, "limit": 7.0}
    experts = OneRow(**sizes) if rows == 1 else SeveralRows(**sizes, rows=rows, visits=4)
    programs = experts, Product(rows, 64, 64, "add", multiprocessors=132)
    for program in programs:
        assert program.ptx().count(ONCE) == 1 and "evict_first" in ONCE
        copies = [line for line in program.ptx().split(";") if COPY in line]
        of_weights = [line for line in copies if COPY_WEIGHTS in line and line.endswith(", once")]
        assert of_weights and all("hint" not in line for line in set(copies) - set(of_weights))
        assert len(copies) - len(of_weights) == isinstance(program, OneRow)


@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("bias_bytes", [2, 4])
def test_copies_begin_where_they_are_fast(several, bias_bytes):
    """At multiples of 128 bytes of shared memory, with the released models' sizes.

    But for biases, which are 64 bytes at most.
    """
    sizes = {"inputs": 2880, "hidden": 2880, "experts": 32, "choices": 4, "bias_bytes": bias_bytes}
    make = functools.partial(SeveralRows, rows=8, visits=32) if several else OneRow
    program = make(**sizes, limit=7.0)
    copies = re.findall(r"\[row \+ (\d+)\], \[at\], (\d+)", program.ptx())
    begins = {int(begin) for begin, size in copies if int(size) > 64}
    assert len(copies) > len(begins) == 2 and not any(begin % 128 for begin in begins)
    assert program._stage_bytes % 128 == 0
