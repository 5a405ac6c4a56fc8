"""The Hopper kernel for many rows, without the GPU.

The pieces that a thread does by itself run in the interpreter; NumPy stands in for the copies and
for the matrix unit, whose layout of operands and results (PTX manual, "wgmma") is in `left` and
`sums` here and nowhere in what is tested.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest
from hopper_layer import (
    interpreted,
    kernels_for_cuda,
    layer,
    multiply_as_the_interpreter_can,
    wanted,
)
from jax.experimental import pallas as pl

from gpt_oss_jax.kernels import target
from gpt_oss_jax.kernels.expert_matmul import many_rows, many_rows_ptx, rows, tiles, xla
from gpt_oss_jax.quant import MXArray, hopper_words, mxfp4

W, G, Q = np.arange(128) // 32, np.arange(128) % 32 // 4, np.arange(128) % 4


def bits(x):
    return np.asarray(x, np.float32).view(np.uint32)


def left(program, weights, scales, step):
    """What a warpgroup makes of a step's weights and all its scales: [64, 32 program.step]."""
    B = program.step
    shared = np.concatenate([np.asarray(a).reshape(-1) for a in (weights, scales)])
    run = functools.partial(ptx.piece, memory=ptx.Memory(), shared=shared)
    decoded = np.full((64, 32 * B), np.nan, np.float32)
    loaded = run(program.load(), 3 * B, [0, weights.size, step, *run(program.places(), 2, [])])
    for h, i in itertools.product(range(2), range(B // 2)):
        own = [loaded[n] for n in program.of_pair(h, i)]
        values = run(many_rows_ptx.decode_half(), 8, own)
        for v, e in itertools.product(range(8), range(2)):
            value = (values[v] >> np.uint64(16 * e)).astype(np.uint16)
            columns = 64 * i + 8 * v + 2 * Q + e
            decoded[16 * W + G + 8 * h, columns] = value.view(ml_dtypes.bfloat16)
    return decoded


def grouped(p, w, bias, tiles, x_RK, weights_R=None):
    """`many_rows.grouped`, warpgroup by warpgroup, and nothing past the part that has all pairs."""
    E, P, steps = bias.shape[0], tiles.pairs.shape[1], p.blocks // p.step
    blocks = np.asarray(w.blocks).reshape(E, -1, 64, steps, 16 * p.step)
    scales = np.asarray(w.scales).reshape(E, -1, 64, p.blocks)
    x = np.asarray(x_RK, np.float32).reshape(-1, P, steps, 32 * p.step)
    memory = ptx.Memory()
    biases = memory.put(np.asarray(bias).reshape(E, p.outputs))
    routing = [] if weights_R is None else [memory.put(np.asarray(weights_R))]
    out = memory.put(np.full((len(x_RK), p.width), np.nan, ml_dtypes.bfloat16))
    lefts = functools.cache(lambda e, n, k: left(p, blocks[e, n, :, k], scales[e, n], k))
    run = functools.partial(ptx.piece, memory=memory, shared=None)
    for t in range(int(tiles.count)):
        e, pairs = int(tiles.expert_of_tile[t]), int((tiles.pairs[t] >= 0).sum())
        part = min(size for size in many_rows.multiplied_rows(P) if size >= pairs)
        for n in range(p.outputs // 64):
            sums = sum(lefts(e, n, k) @ x[t, :part, k].T for k in range(steps))
            own_bias = biases + (e * p.outputs + 64 * n) * p.bias_bytes
            sharing = p.outputs // p.width
            own_out = out + 2 * (t * P * p.width + n // sharing * 64)
            own_routing = [place + 4 * t * P for place in routing]
            extras = run(p.read_extras(part), p.extra_words(part), [own_bias, *own_routing])
            (at,) = run(p.start(), 1, [own_out, n % sharing])
            for group in range(part // 8):
                columns = [8 * group + 2 * Q + i for i in range(2)]
                own = [bits(sums[16 * W + G + 8 * h, c]) for h in range(2) for c in columns]
                run(p.finish(group), 0, [*own, at, *extras])
    return jnp.asarray(memory.get(out, (len(x_RK), p.width), ml_dtypes.bfloat16))


def launch(name, run, outs, inputs):
    """`rows._launch`, interpreted; a second grid, whose last block comes first, gives the same."""

    def interpret(*inputs):
        first, second = (interpret_one(*inputs, second=i) for i in (False, True))
        for ours, its in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
            np.testing.assert_array_equal(ours.view(np.uint8), its.view(np.uint8))
        return first

    def interpret_one(*inputs, second):
        memory, wanted = ptx.Memory(), jax.tree.leaves(outs)
        places = [memory.put(np.asarray(a)) for a in inputs]
        # NaN, but no -1, which means something.
        byte = lambda o: 0x5A if o.dtype == jnp.int32 else 255
        poison = [np.full(np.prod(o.shape) * o.dtype.itemsize, byte(o), np.uint8) for o in wanted]
        results = [memory.put(a) for a in poison]
        size = {"grid": run.grid, "warps": run.warps, "shared_bytes": run.shared_bytes}
        ptx.launch(run.ptx(), [*places, *results], memory, **size, second=second)
        got = [memory.get(at, o.shape, o.dtype) for at, o in zip(results, wanted, strict=True)]
        return jax.tree.unflatten(jax.tree.structure(outs), got)

    return jax.pure_callback(interpret, outs, *inputs)


@pytest.fixture
def emulated(monkeypatch):
    monkeypatch.setattr(many_rows, "grouped", grouped)
    monkeypatch.setattr(rows, "_launch", launch)


@pytest.mark.parametrize(
    ("M", "tile", "options"),
    [
        (3, 8, {"bias": ml_dtypes.bfloat16}),
        (20, 16, {"same": True}),
        (50, 64, {}),
        (100, 128, {"E": 2}),
        (2, 8, {"E": 2, "D": 384}),
        (2, 8, {"E": 2, "D": 960}),
    ],
    ids=[
        *("bfloat16 biases", "the same experts, two tiles each", "a half tile last"),
        *("a large tile", "two steps", "wide steps"),
    ],
)
def test_many_rows_equal_the_oracle(emulated, M, tile, options):
    args = layer(M, **{"E": 3, "D": 192, "F": 192} | options)
    got = many_rows.many_rows(*args, limit=7.0, tile=tile)
    assert got.dtype == jnp.bfloat16
    want = wanted(*args)
    assert np.linalg.norm(got.astype(jnp.float32) - want) < 6e-3 * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("pairs", "size", "E"),
    [(1, 8, 5), (40, 4, 5), (200, 16, 5), (9, 8, 130), (1025, 64, 3), (3000, 16, 40)],
)
def test_pairs_are_sorted_alike_in_every_way(emulated, monkeypatch, pairs, size, E):
    """Pairs of the last expert are elsewhere; one expert has none."""
    chosen = jnp.asarray(np.random.default_rng(pairs).integers(0, E + 1, pairs), jnp.int32)
    chosen = jnp.where(chosen == 2, 3, chosen)
    monkeypatch.setattr(tiles, "_FEW", pairs)
    compared = tiles.sort_into_tiles(chosen, E, size)
    monkeypatch.setattr(tiles, "_FEW", 0)
    by_sorting = tiles.sort_into_tiles(chosen, E, size)
    here = np.asarray(chosen < E)
    places = compared.place_of_pair[here]
    np.testing.assert_array_equal(places, by_sorting.place_of_pair[here])
    used = slice(int(compared.count))
    assert compared.count == by_sorting.count
    np.testing.assert_array_equal(compared.expert_of_tile[used], by_sorting.expert_of_tile[used])
    past = jnp.resize(jnp.asarray([E, E + 1, 2**31 - 1]), pairs)
    by_kernel = rows.sort(jnp.where(here, chosen, past), E, size)
    np.testing.assert_array_equal(
        by_kernel.place_of_pair, jnp.where(here, compared.place_of_pair, -1)
    )
    np.testing.assert_array_equal(by_kernel.expert_of_tile[used], compared.expert_of_tile[used])
    assert compared.count == by_kernel.count
    for sorted_ in (compared, by_sorting, by_kernel):
        np.testing.assert_array_equal(sorted_.pairs.reshape(-1)[places], np.flatnonzero(here))
        others = np.delete(sorted_.pairs[used].reshape(-1), places)
        np.testing.assert_array_equal(others, -1)
    assert compared.pairs.shape == (pairs // size + E, size)


@pytest.mark.parametrize(
    ("pairs", "size", "E"),
    [(1, 64, 5), (300, 64, 5), (700, 64, 3), (200, 8, 130), (1025, 64, 9), (5000, 128, 40)],
)
def test_tiles_that_are_half_empty_come_last(emulated, monkeypatch, pairs, size, E):
    """If there are as many, one expert has none, others a half, a pair more, a whole tile."""
    random = np.random.default_rng(pairs)
    chosen = random.integers(0, E + 1, pairs)
    for expert, number in enumerate((0, size // 2, size // 2 + 1, size)):
        chosen[chosen == expert] = E - 1
        chosen[random.permutation(np.flatnonzero(chosen == E - 1))[:number]] = expert
    alike = rows.sort(jnp.asarray(chosen, jnp.int32), E, size)
    got = rows.sort(jnp.asarray(chosen, jnp.int32), E, size, halves_last=True)
    used = int(got.count)
    assert used == alike.count
    fill, pairs_of = (np.asarray(x.pairs[:used]) for x in (got, alike))
    halved = (fill >= 0).sum(axis=1) <= size // 2
    assert (np.diff(halved.astype(int)) >= 0).all()
    # Whole ones, and then the others, in the order in which they were.
    order = np.argsort((pairs_of >= 0).sum(axis=1) <= size // 2, kind="stable")
    np.testing.assert_array_equal(fill, pairs_of[order])
    np.testing.assert_array_equal(got.expert_of_tile[:used], alike.expert_of_tile[order])
    here, places = chosen < E, np.asarray(got.place_of_pair)
    np.testing.assert_array_equal(fill.reshape(-1)[places[here]], np.flatnonzero(here))
    assert (places[~here] == -1).all()
    monkeypatch.setattr(rows, "MAX_TILES", rows.most_tiles(pairs, E, size))
    got = rows.sort(jnp.asarray(chosen, jnp.int32), E, size, halves_last=True)
    np.testing.assert_array_equal(got.place_of_pair, alike.place_of_pair)


@pytest.mark.parametrize(("M", "X", "D"), [(1, 2, 192), (9, 4, 1152), (30, 3, 2880)])
def test_rows_are_gathered_and_added_up(emulated, M, X, D):
    """As XLA does, bit for bit. Rows of no pair, and of experts that are elsewhere, are NaN."""
    random, E = np.random.default_rng(M), 7
    x = jnp.asarray(random.normal(size=(M, D)), jnp.bfloat16)
    chosen = jnp.asarray([random.permutation(E)[:X] for _ in range(M)], jnp.int32)
    sorted_ = tiles.sort_into_tiles(chosen.reshape(-1), E, 8)
    weight = jnp.asarray(random.random((M, X)), jnp.float32)
    used = np.asarray(sorted_.pairs.reshape(-1)) >= 0
    want = gather_in_jax(x, weight, sorted_)
    for ours, right in zip(rows.gather(x, weight, sorted_), want, strict=True):
        np.testing.assert_array_equal(ours[used], right[used])
        assert np.isnan(np.asarray(ours)[~used].astype(np.float32)).all()

    y = np.full((sorted_.pairs.size, D), np.nan, ml_dtypes.bfloat16)
    y[sorted_.place_of_pair] = random.normal(size=(M * X, D))
    for here in (None, 4):
        if here is not None:
            y[sorted_.place_of_pair[np.asarray(chosen.reshape(-1)) >= here]] = np.nan
        args = jnp.asarray(y), sorted_.place_of_pair, chosen, here
        for more in ((), (x,)):
            np.testing.assert_array_equal(rows.add_up(*args, *more), add_up_in_jax(*args, *more))


@pytest.mark.parametrize(("tile", "last"), [(8, False), (16, True)])
def test_halves_come_last_where_they_are_multiplied_as_such(emulated, monkeypatch, tile, last):
    said, sort = [], rows.sort
    spy = lambda *args, **how: said.append(how) or sort(*args, **how)
    monkeypatch.setattr(many_rows, "sort", spy)
    run = functools.partial(many_rows.many_rows, limit=7.0, tile=tile)
    run(*layer(2, E=2, D=192, F=192))
    assert said == [{"halves_last": last}]


def test_the_residual_stream_comes_on_top(emulated):
    *arrays, w = layer(5, E=3, D=192, F=192)
    residual = jnp.asarray(np.random.default_rng(1).normal(size=arrays[0].shape), jnp.bfloat16)
    run = functools.partial(many_rows.many_rows, *arrays, w, limit=7.0, tile=8)
    got, alone = (x.astype(jnp.float32) for x in (run(residual_MD=residual), run()))
    want = residual.astype(jnp.float32) + alone
    np.testing.assert_allclose(got, want, rtol=2**-7, atol=2**-8 * jnp.abs(alone).max())


@pytest.mark.parametrize("own", [2, 1])
def test_ids_past_the_experts_add_nothing(emulated, own):
    """As on a device of a mesh."""
    x, chosen, weight, w = layer(5, E=3, D=192, F=192)
    some = jax.tree.map(lambda a: a[:own], w)
    ours = jnp.minimum(chosen, own)
    got = many_rows.many_rows(x, ours, weight, some, limit=7.0, some_elsewhere=True, tile=8)
    want = wanted(x, chosen, jnp.where(chosen < own, weight, 0), w)
    scale = np.linalg.norm(wanted(x, chosen, weight, w))
    assert np.linalg.norm(got.astype(jnp.float32) - want) < 6e-3 * scale


@pytest.mark.parametrize("step", [6, 10])
@pytest.mark.parametrize("limit", [None, 7.0], ids=["down", "up"])
def test_every_code_and_scale_is_exact(limit, step):
    """Every value of a step, and where it is: rows as `_row` says, columns `in_order`."""
    random, B = np.random.default_rng(0), 2 * step
    p = many_rows_ptx.Projection(outputs=64, blocks=B, step=step, bias_bytes=4, limit=limit)
    blocks = random.permutation(np.arange(64 * B * 16) % 256).astype(np.uint8).reshape(64, B, 16)
    scales = random.permutation(np.arange(64 * B) % 80 + 68).astype(np.uint8).reshape(64, B)
    w = MXArray(jnp.asarray(blocks), jnp.asarray(scales))
    want = np.asarray(many_rows.in_order(w.dequantize(jnp.float32)))[:, 32 * step :]
    blocks = np.asarray(w.shuffle().blocks)
    got = left(p, blocks[:, step:].reshape(64, 16 * step), scales, 1) * np.float32(2.0**64)
    rows = sorted(range(64), key=lambda slot: output(slot, limit is not None))
    np.testing.assert_array_equal(got[rows], want)


def output(slot, up):
    """Which output a row of the left operand is; a hidden value's two parts are neighbours."""
    w, h, g = slot // 16, slot // 8 % 2, slot % 8
    if not up:
        return slot
    return 32 * (g // 4) + 16 * (w // 2) + 8 * h + 4 * (w % 2) + g % 4


@pytest.mark.parametrize(
    ("tile", "rows"),
    [(8, [8]), (16, [8, 16]), (32, [16, 32]), (64, [32, 64]), (128, [32, 64, 128])],
)
def test_parts_of_tiles(tile, rows):
    assert many_rows.multiplied_rows(tile) == rows


@pytest.mark.parametrize(
    ("tile", "slots"), [(8, (5, 2)), (16, (4, 2)), (32, (3, 2)), (64, (4, 2)), (128, (3, 1))]
)
@pytest.mark.parametrize("width", [192, 2880])
def test_tiles_fit_into_shared_memory(tile, slots, width):
    *_, w = jax.eval_shape(lambda: layer(1, E=1, D=width, F=width))
    for p in many_rows.projections(w, 7.0, tile):
        stages, scales = many_rows.slots(p, tile)
        assert stages * p.step * (192 * 16 + tile * 64) + scales * 192 * p.blocks < 226 << 10
        assert (stages, scales) == slots if width == 2880 else stages >= 3


@pytest.mark.parametrize("width", [96, 192 * 129])
def test_other_widths_are_refused(width):
    *_, w = jax.eval_shape(lambda: layer(1, E=1, D=width, F=192))
    assert "widths of 192 n up to 24,576" in many_rows.why_not_many(w)
    with pytest.raises(NotImplementedError, match="widths"):
        many_rows.many_rows(*jax.eval_shape(lambda: layer(2, D=width))[:3], w, limit=7.0, tile=8)


if jax.__version_info__ >= target.JAX_FOR_HOPPER:

    @pytest.fixture
    def in_jax(monkeypatch):
        """The kernel for JAX's interpreter, which finds races.

        It runs no PTX, so JAX stands in for the pieces of the threads; and it multiplies no
        registers, so the left operand goes through shared memory.
        """
        multiply_as_the_interpreter_can(monkeypatch, 3, 64, 64)
        monkeypatch.setattr(many_rows, "_places_of_thread", lambda p: lambda: ())
        monkeypatch.setattr(many_rows, "_load", lambda p: lambda *loaded: loaded)
        monkeypatch.setattr(many_rows, "_decode", decode_in_jax)
        monkeypatch.setattr(many_rows, "_read_extras", read_extras_in_jax)
        monkeypatch.setattr(many_rows, "_finish", finish_in_jax)
        monkeypatch.setattr(many_rows, "sort", lambda *args, **_: tiles.sort_into_tiles(*args))
        monkeypatch.setattr(many_rows, "gather", gather_in_jax)
        monkeypatch.setattr(many_rows, "add_up", add_up_in_jax)

    @pytest.mark.parametrize(
        ("M", "tile", "D"), [(1, 16, 384), (300, 16, 384), (300, 128, 384), (90, 32, 960)]
    )
    def test_many_rows_lower_for_cuda(M, tile, D):
        run = functools.partial(many_rows.many_rows, limit=7.0, tile=tile)
        assert kernels_for_cuda(run, *layer(M, D=D, F=192)) == 5

    def test_a_batch_of_layers_lowers_for_cuda():
        x, chosen, weights, w = layer(6, D=384, F=192)
        by_twos = (a.reshape(2, 3, -1) for a in (x, chosen, weights))
        run = functools.partial(many_rows.many_rows, limit=7.0, tile=8)
        assert kernels_for_cuda(jax.vmap(run, (0, 0, 0, None)), *by_twos, w) == 5

    @pytest.mark.parametrize(
        ("blocks", "M", "tile", "how"),
        [
            *((1, 3, 8, {}), (2, 3, 8, {}), (2, 20, 16, {}), (2, 97, 64, {}), (1, 33, 128, {})),
            *((1, 160, 128, {}), (1, 40, 16, {"slots": (3, 1)}), (132, 16, 8, {})),
            *((1, 5, 16, {"D": 960}), (2, 40, 32, {"D": 960})),
        ],
    )
    def test_blocks_copy_and_multiply_what_is_theirs(in_jax, monkeypatch, blocks, M, tile, how):
        """Some without a product, with fewer steps than slots, with more, and with wide ones."""
        monkeypatch.setattr(many_rows, "multiprocessors", lambda: blocks)
        if "slots" in how:
            monkeypatch.setattr(many_rows, "slots", lambda *_: how["slots"])
        args = layer(M, E=2, D=how.get("D", 384), F=192)
        got = interpreted(many_rows.many_rows, *args, limit=7.0, tile=tile)
        want = wanted(*args)
        assert np.linalg.norm(got.astype(jnp.float32) - want) < 6e-3 * np.linalg.norm(want)

    @pytest.mark.parametrize("own", [0, 1])
    def test_experts_that_are_elsewhere_are_no_work(in_jax, monkeypatch, own):
        """As on a device of a mesh, of which no row may want an expert."""
        monkeypatch.setattr(many_rows, "multiprocessors", lambda: 2)
        x, chosen, weight, w = layer(5, E=3, D=192, F=192)
        ours = jnp.where(chosen < own, chosen, 2)
        some = jax.tree.map(lambda a: a[:2], w)
        run = functools.partial(many_rows.many_rows, limit=7.0, some_elsewhere=True, tile=8)
        got = interpreted(run, x, ours, weight, some)
        want = wanted(x, chosen, jnp.where(chosen < own, weight, 0), w)
        scale = np.linalg.norm(wanted(x, chosen, weight, w))
        assert np.linalg.norm(got.astype(jnp.float32) - want) < 6e-3 * scale

    def test_a_slot_is_free_when_nothing_reads_it(in_jax, monkeypatch):
        """The interpreter waits for every product at once, and so cannot tell."""
        from jax.experimental.pallas import mosaic_gpu as plgpu

        waits, at_arrival, arrive = [], [], plgpu.barrier_arrive
        monkeypatch.setattr(plgpu, "wgmma_wait", waits.append)
        spy = lambda *args: at_arrival.append(waits[-1]) or arrive(*args)
        monkeypatch.setattr(plgpu, "barrier_arrive", spy)
        x_MD, chosen, weights_MX, w = layer(9, E=2, D=960, F=192)
        run = functools.partial(many_rows.many_rows, w=w, limit=7.0, tile=16)
        jax.eval_shape(run, x_MD, chosen, weights_MX)
        assert at_arrival == [0] * 4  # Of both projections, each with whole and half tiles.

    def test_the_interpreter_says_when_there_is_a_race():
        from jax.experimental.pallas import mosaic_gpu as plgpu

        def block(out, shared):
            warpgroup = jax.lax.axis_index("warpgroup")

            @pl.when(warpgroup == 0)
            def _():
                shared[...] = jnp.ones_like(shared)

            @pl.when(warpgroup == 1)
            def _():
                out[...] = shared[...]

        values = jax.ShapeDtypeStruct((128,), jnp.float32)
        how = {"scratch_types": [plgpu.SMEM(values.shape, values.dtype)], "num_threads": 2}
        run = plgpu.kernel(block, out_type=values, thread_name="warpgroup", **how)
        with pytest.raises((AssertionError, RuntimeError), match="RACE DETECTED"):
            interpreted(run)

    @pytest.mark.parametrize(
        ("M", "tile", "part"),
        [(4, 16, 8), (8, 16, 8), (16, 64, 32), (33, 128, 64), (20, 128, 32), (32, 128, 32)],
    )
    def test_no_more_is_multiplied_than_has_all_pairs(in_jax, monkeypatch, M, tile, part):
        monkeypatch.setattr(many_rows, "multiprocessors", lambda: 1)
        x_MD, chosen, weights_MX, w = layer(M, E=2, D=384, F=192)
        sorted_ = tiles.sort_into_tiles(chosen.reshape(-1), 2, tile)
        x_RD = jnp.nan_to_num(gather_in_jax(x_MD, weights_MX, sorted_)[0])
        up, _ = many_rows.projections(w, 7.0, tile)
        h_RF = interpreted(many_rows.grouped, up, w.up, w.up_bias, sorted_, x_RD)
        written = ~np.isnan(h_RF.astype(jnp.float32)).reshape(-1, tile, 192)[: sorted_.count]
        assert written[:, :part].all() and not written[:, part:].any()


def gather_in_jax(x_MD, weights_MX, sorted_):
    pairs = sorted_.pairs.reshape(-1)
    x_RD = many_rows.in_order(x_MD)[pairs // weights_MX.shape[1]]
    # Of no pair nothing is written.
    x_RD = jnp.where(pairs[:, None] < 0, jnp.nan, x_RD)
    return x_RD, jnp.where(pairs < 0, jnp.nan, weights_MX.reshape(-1)[pairs])


def add_up_in_jax(y_RD, place_of_pair, experts_MX, num_experts, residual_MD=None):
    y_MXD = y_RD[place_of_pair].reshape(*experts_MX.shape, -1).astype(jnp.float32)
    if num_experts is not None:
        y_MXD = jnp.where(experts_MX[..., None] < num_experts, y_MXD, 0)
    y_MD = y_MXD.sum(axis=1)
    y_MD = y_MD if residual_MD is None else y_MD + residual_MD.astype(jnp.float32)
    return y_MD.astype(jnp.bfloat16)


def decode_in_jax(p, i):
    def decode(loaded):
        w, scales, step = loaded
        nibbles = hopper_words.in_order(w[...].reshape(64, p.step, 16)[:, 2 * i : 2 * i + 2])
        codes = jnp.stack([nibbles & jnp.uint8(15), nibbles >> jnp.uint8(4)], axis=-1)
        own = scales[...].reshape(64, p.blocks)
        own = jax.lax.dynamic_slice(own, (0, p.step * step + 2 * i), (64, 2))
        scale = jnp.exp2(own.astype(jnp.float32) - 127)
        values = mxfp4.decode_codes(codes.reshape(64, 2, 32)) * scale[..., None]
        return many_rows.in_order(values.reshape(64, -1)).astype(jnp.bfloat16)

    return decode


def read_extras_in_jax(p, rows):
    return lambda *refs: [ref[...].astype(jnp.float32) for ref in refs]


def finish_in_jax(p, rows):
    def finish(sums, half, extras, out):
        bias, *routing = extras
        y = sums + bias[:, None]
        if p.limit is None:
            out[...] = (y * routing[0]).T.astype(jnp.bfloat16)
            return
        y = xla.swiglu(y[0::2], y[1::2], p.limit).T.astype(jnp.bfloat16)
        # Places of a half's own, in fours.
        y = many_rows.in_order(jnp.concatenate([y, y], axis=1))
        for k in range(8):
            out[:, pl.ds(8 * k + 4 * half, 4)] = y[:, 8 * k : 8 * k + 4]

    return finish
