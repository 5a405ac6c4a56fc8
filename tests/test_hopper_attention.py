"""Attention on Hopper for few queries, without the GPU: interpreted, and lowered for it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest
from hopper_layer import attention_in_float32, kernels_for_cuda

from gpt_oss_jax.kernels import dispatch, target
from gpt_oss_jax.kernels.attention import api, few_queries, mosaic_gpu, xla
from gpt_oss_jax.kernels.dense import mosaic_gpu as dense
from gpt_oss_jax.kernels.ptx import EMPTY
from gpt_oss_jax.model.cache import write
from gpt_oss_jax.sharding import make_mesh

OLD = jax.__version_info__ < target.JAX_FOR_HOPPER


def on_hopper(*floats, window, **where):
    """As on the GPU, but on any machine."""
    return mosaic_gpu.differentiable("attention", floats, tuple(where.values()), window)


def inputs(B, T, K, G, S, H=64, sinks=np.float32):
    random = np.random.default_rng(S)
    arrays = [
        random.normal(size=shape) for shape in ((B, T, K, G, H), (B, S, K, H), (B, S, K, H), (K, G))
    ]
    arrays[0] *= 3  # Weights that differ.
    return [jnp.asarray(a, t) for a, t in zip(arrays, (*3 * [jnp.bfloat16], sinks), strict=True)]


def full(B, S, T=1, used=None):
    """A full cache in which row b has a slot less used than the row before."""
    last = (S if used is None else used) - 1 - np.arange(B)[:, None]
    q_pos = last - np.arange(T)[::-1]
    k_pos = np.where(np.arange(S) <= last, np.arange(S), -1)
    return {"q_pos_BT": q_pos.astype(np.int32), "k_pos_BS": k_pos.astype(np.int32)}


def ring(B, S, at):
    """A ring in which slot s has the last position up to `at` + b that is s modulo its size."""
    last = at + np.arange(B)[:, None]
    k_pos = last - (last - np.arange(S)) % S
    return {"q_pos_BT": last.astype(np.int32), "k_pos_BS": k_pos.astype(np.int32)}


def interpreted(args, where, window, changed=lambda text: text, new=(), how=None, **plan):
    """`few_queries` with the PTX interpreter in the place of the GPU.

    With `new` keys, new values and slots it is `few_queries_stored`, and gives the cache as well.
    `how` the interpreter is to run it.
    """
    q, k, v, sinks = args
    run = few_queries.program(q.shape, k.shape[1], window, sinks.dtype.itemsize)
    run = dataclasses.replace(run, stores=bool(new), **plan)
    memory = ptx.Memory()
    k_pos = few_queries.whole_tiles(jnp.asarray(where["k_pos_BS"]))
    places = [memory.put(np.asarray(a)) for a in (q, k, v, sinks, where["q_pos_BT"], k_pos, *new)]
    room = [memory.put(np.full(run.room, EMPTY, np.int32))] if run.room else []
    out = memory.put(np.full(q.shape, np.nan, ml_dtypes.bfloat16))
    ptx.launch(
        changed(run.ptx()),
        [*places, *room, out],
        memory,
        grid=run.grid,
        shared_bytes=run.shared_bytes,
        warps=run.warps,
        cluster=run.blocks,
        **how or {},
    )
    if room:
        # Whatever comes of the arithmetic, it is not taken for nothing.
        assert (memory.get(room[0], run.room, np.int32) != EMPTY).all()
    got = lambda place, like: memory.get(place, like.shape, ml_dtypes.bfloat16).astype(np.float32)
    heads = got(out, q)
    return (heads, got(places[1], k), got(places[2], v)) if new else heads


def error(got, args, where, window):
    """Largest difference from XLA in float32."""
    return np.abs(got - np.asarray(attention_in_float32(*args, **where, window=window))).max()


CASES = {
    "one tile": ((1, 1, 2, 2, 16), full(1, 16), None, {}),
    "ragged rows": ((3, 1, 2, 8, 64), full(3, 64, used=37), None, {}),
    "slots past the last tile": ((2, 1, 3, 5, 75), full(2, 75), None, {}),
    "a window": ((2, 1, 1, 8, 64), full(2, 64), 7, {}),
    "a window of one": ((1, 1, 1, 8, 32), full(1, 32), 1, {}),
    "a ring": ((2, 1, 1, 8, 32), ring(2, 32, 100), 20, {}),
    "a ring not full": ((2, 1, 1, 8, 32), ring(2, 32, 9), 32, {}),
    "several steps of a warp": ((1, 1, 1, 8, 400), full(1, 400), None, {"blocks": 1}),
    "many positions": ((1, 1, 1, 1, 1100), full(1, 1100, used=30), None, {"blocks": 1}),
    "very many positions": ((1, 1, 1, 1, 5200), full(1, 5200), 40, {"blocks": 1}),
    "a cluster of 2": ((2, 1, 1, 8, 100), full(2, 100), None, {"blocks": 2}),
    "a cluster of 4": ((1, 1, 2, 4, 128), full(1, 128, used=50), None, {"blocks": 4}),
    "a cluster of 6": ((1, 1, 2, 4, 200), full(1, 200), None, {"blocks": 6}),
    "a cluster of 16": ((1, 1, 1, 8, 512), full(1, 512, used=300), None, {"blocks": 16}),
    "blocks of 16 warps": ((1, 1, 1, 8, 512), full(1, 512), None, {"blocks": 2, "warps": 16}),
    "16 warps alone": ((1, 1, 1, 8, 64), full(1, 64), None, {"blocks": 1, "warps": 16}),
    "two splits": ((2, 1, 2, 8, 200), full(2, 200, used=150), None, {"splits": 2}),
    "five splits": ((1, 1, 1, 5, 330), full(1, 330), None, {"blocks": 1, "splits": 5}),
    "more splits than tiles": ((1, 1, 2, 8, 64), full(1, 64), None, {"splits": 5}),
    "splits that see nothing": ((2, 1, 1, 8, 300), full(2, 300), 20, {"blocks": 1, "splits": 5}),
    "splits of 2 blocks": ((2, 1, 1, 8, 200), full(2, 200), 90, {"blocks": 2, "splits": 2}),
    "splits of 16 warps": (
        (1, 1, 1, 8, 512),
        full(1, 512),
        None,
        {"blocks": 1, "splits": 2, "warps": 16},
    ),
    "16 splits": ((1, 1, 1, 8, 300), full(1, 300), None, {"blocks": 1, "splits": 16}),
    "several positions and splits": ((2, 4, 2, 2, 40), full(2, 40, T=4), 9, {"splits": 2}),
    "several positions": ((2, 4, 2, 2, 40), full(2, 40, T=4), 9, {}),
    "a tile that some of them see": ((2, 4, 2, 2, 40), full(2, 40, T=4), 7, {}),
    "as many as fit": ((1, 8, 1, 1, 40), full(1, 40, T=8), None, {"blocks": 2}),
}


def test_the_interpreter_rounds_once():
    """What `_LOWEST` is chosen for would be nothing otherwise."""
    third, three = np.float32([1 / 3]), np.float32([3])
    assert ptx._FLOATS["fma"](third, three, np.float32([-1])) != 0


@pytest.mark.parametrize("case", CASES)
def test_equals_xla(case):
    sizes, where, window, plan = CASES[case]
    args = inputs(*sizes)
    assert error(interpreted(args, where, window, **plan), args, where, window) < 2e-2


def test_sinks_in_bfloat16():
    args, where = inputs(1, 1, 3, 5, 16, sinks=jnp.bfloat16), full(1, 16)
    assert error(interpreted(args, where, None), args, where, None) < 2e-2


def test_a_large_sink_takes_all():
    q, k, v, sinks = inputs(1, 1, 1, 8, 16)
    assert not interpreted((q, k, v, sinks + 1000), full(1, 16), None).any()


@pytest.mark.parametrize("splits", [1, 2, 5])
def test_large_scores(splits):
    q, k, v, sinks = inputs(1, 1, 1, 8, 300)
    args, where = (q * 100, k, v, sinks), full(1, 300)
    got = interpreted(args, where, None, blocks=1, splits=splits)
    assert error(got, args, where, None) < 3e-2


@pytest.mark.parametrize(("blocks", "splits"), [(1, 1), (2, 1), (3, 1), (1, 5), (2, 2)])
def test_a_query_that_sees_nothing_gives_zeros(blocks, splits):
    args, where = inputs(3, 1, 1, 8, 48), full(3, 48, used=20)
    where["q_pos_BT"][1] = -1  # Padding.
    where["k_pos_BS"][2] = -1  # Empty.
    got = interpreted(args, where, None, blocks=blocks, splits=splits)
    assert not got[1:].any()
    assert error(got, args, where, None) < 2e-2


SPLIT = {
    "single blocks": {"blocks": 1, "splits": 5},
    "clusters": {"blocks": 2, "splits": 2},
}


def by_chance():
    """Ways to run all clusters at once, in which the last of a head is often the first."""
    return [{"at_once": True, "by_chance": np.random.default_rng(i)} for i in range(4)]


@pytest.mark.parametrize("case", SPLIT)
def test_the_last_cluster_waits_for_earlier_ones_alone(case):
    """Or a device that has no place for all of them at once would wait for ever."""
    args, where, plan = inputs(2, 1, 1, 8, 330), full(2, 330), SPLIT[case]
    in_turn = interpreted(args, where, None, **plan)
    assert error(in_turn, args, where, None) < 2e-2
    for how in by_chance()[:2]:
        np.testing.assert_array_equal(interpreted(args, where, None, how=how, **plan), in_turn)


def test_it_waits_for_every_word():
    """Each of which a device may write, and show, for itself."""
    args, where, plan = inputs(1, 1, 1, 8, 64), full(1, 64), {"splits": 3}
    right = interpreted(args, where, None, **plan)
    for last in range(4):

        def in_pieces(text, last=last):
            old = "st.relaxed.gpu.global.v4.f32 [at], {largest, total, o0, o1};"
            assert old in text
            words = ["largest", "total", "o0", "o1"]
            order = [i for i in range(4) if i != last] + [last]
            pieces = (f"st.relaxed.gpu.global.f32 [at + {4 * i}], {words[i]};" for i in order)
            return text.replace(old, "nanosleep.u32 20;".join(pieces))

        for how in by_chance()[:2]:
            got = interpreted(args, where, None, in_pieces, how=how, **plan)
            np.testing.assert_array_equal(got, right)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bra AGAIN;", ""),
        ("vote.sync.all", "vote.sync.any"),
        ("mov.f32 x2, o0;", "mov.f32 x2, o1;"),
    ],
    ids=["waiting", "all lanes", "its own"],
)
def test_a_fault_of_waiting_is_noticed(old, new):
    args, where, plan = inputs(1, 1, 1, 8, 64), full(1, 64), {"splits": 3}
    right = interpreted(args, where, None, **plan)

    def some_lanes_first(text):
        (store,) = re.findall(r"st.relaxed[^;]*;", text)
        return text.replace(
            store, f"setp.lt.u32 p, lane, 9; @p {store} nanosleep.u32 20; @!p {store}"
        )

    def changed(text):
        assert old in text
        return some_lanes_first(text).replace(old, new)

    def same(change):
        results = (interpreted(args, where, None, change, how=h, **plan) for h in by_chance())
        return all(np.array_equal(got, right) for got in results)

    assert same(some_lanes_first)
    assert not same(changed)


def test_tiles_that_are_not_seen_are_not_read():
    (q, k, v, sinks), where = inputs(2, 1, 1, 8, 256), full(2, 256, used=150)
    seen = jnp.arange(256)[None, :, None, None]
    seen = (seen >= 112) & (seen < 160)  # Whole tiles, of the window of either row.
    args = q, jnp.where(seen, k, jnp.nan), jnp.where(seen, v, jnp.nan), sinks
    got = interpreted(args, where, 30)
    assert error(got, (q, k, v, sinks), where, 30) < 2e-2


STORED = {
    "a full cache": ((2, 1, 2, 8, 64), full(2, 64, used=40), None, [[39], [38]], {}),
    "slots past the last tile": ((2, 1, 1, 5, 75), full(2, 75), None, [[74], [73]], {}),
    "the tile before those": ((1, 1, 1, 8, 75), full(1, 75, used=62), None, [[61]], {}),
    "a ring": ((2, 1, 1, 8, 32), ring(2, 32, 100), 20, [[4], [5]], {}),
    "a cluster": ((1, 1, 2, 8, 300), full(1, 300, used=250), None, [[249]], {"blocks": 4}),
    "splits": ((2, 1, 1, 8, 120), full(2, 120, used=100), None, [[99], [98]], {"splits": 3}),
    "clusters": ((1, 1, 1, 8, 300), full(1, 300), None, [[299]], {"blocks": 2, "splits": 2}),
    "nowhere": ((2, 1, 1, 8, 32), full(2, 32, used=20), None, [[19], [32]], {}),
}


@pytest.mark.parametrize("case", STORED)
def test_new_keys_and_values_are_stored_and_seen(case):
    sizes, where, window, slots, plan = STORED[case]
    q, k, v, sinks = inputs(*sizes)
    slots = np.array(slots, np.int32)
    if case == "nowhere":
        where["q_pos_BT"][1] = -1
    B, K, H = sizes[0], sizes[2], 64
    random = np.random.default_rng(1)
    new = [jnp.asarray(random.normal(size=(B, 1, K, H)), jnp.bfloat16) for _ in range(2)]
    new = [a.at[:, 0].multiply(2) for a in new]
    k_after, v_after = (write(old, slots, a) for old, a in zip((k, v), new, strict=True))
    # What lies in the slots before is used for nothing.
    k, v = (write(old, slots, jnp.full_like(new[0], jnp.nan)) for old in (k, v))
    got, *cache = interpreted((q, k, v, sinks), where, window, new=(*new, slots), **plan)
    assert error(got, (q, k_after, v_after, sinks), where, window) < 2e-2
    for mine, theirs in zip(cache, (k_after, v_after), strict=True):
        np.testing.assert_array_equal(mine, theirs.astype(jnp.float32))


@pytest.mark.parametrize(
    ("window", "old", "new"),
    [
        (20, "setp.lt.and.u32 p, t0, 20", "setp.lt.and.u32 p, t0, 19"),
        (None, "setp.lt.u32 p, k_pos3, 2147483648", "setp.ge.u32 p, k_pos3, 0"),
        (300, "ex2.approx.f32 before, before", "mov.f32 before, 0f3f800000"),
        (300, "prmt.b32 a1, v0_2, v1_2, 30258", "prmt.b32 a1, v0_2, v1_2, 21520"),
        (300, "sub.f32 l1, sink, m0", "sub.f32 l1, m0, m0"),
        (300, "barrier.cluster.wait", "bar.warp.sync -1"),
    ],
    ids=["window", "empty", "rescaling", "transposition", "sink", "waiting"],
)
def test_a_fault_is_noticed(window, old, new):
    args, where, plan = inputs(1, 1, 1, 8, 400), full(1, 400, used=395), {"blocks": 2}
    where["k_pos_BS"][:, 3::8] = -1

    def changed(text):
        assert old in text
        return text.replace(old, new)

    assert error(interpreted(args, where, window, **plan), args, where, window) < 2e-2
    got = interpreted(args, where, window, changed, **plan)
    assert not error(got, args, where, window) < 3e-2


def test_clusters_fit_the_device_and_no_warp_is_without_work():
    for B, S, window, blocks, warps, splits in (
        (1, 128, None, 1, 8, 1),
        (1, 1024, None, 8, 8, 1),
        (1, 16384, None, 8, 16, 1),
        (1, 32768 - 16, None, 8, 16, 1),
        (1, 32768, None, 1, 16, 16),
        (1, 32768, 128, 8, 16, 1),
        (1, 131072, None, 1, 16, 16),
        (2, 8192, None, 8, 8, 1),
        (2, 131072, None, 1, 16, 8),
        (4, 131072, None, 6, 8, 1),
        (8, 1024, None, 3, 8, 1),
        (16, 1024, None, 1, 16, 1),
        (32, 1024, None, 1, 8, 1),
        (128, 1024, None, 1, 8, 1),
    ):
        run = few_queries.program((B, 1, 8, 8, 64), S, window)
        assert (run.blocks, run.warps, run.splits) == (blocks, warps, splits), (B, S)


@pytest.mark.parametrize("there", [7, 14, 16, 60])
@pytest.mark.parametrize("B", [1, 2])
def test_parts_of_a_device_have_a_plan_too(monkeypatch, B, there):
    monkeypatch.setattr(few_queries, "multiprocessors", lambda: there)
    run = few_queries.program((B, 1, 8, 8, 64), 32768, None)
    # Two blocks of eight warps, or one of 16, to a multiprocessor, if there are that many.
    assert run.grid * run.warps <= 16 * max(8 * B, there) and run.room >= 0 and run.ptx()


def test_what_takes_room():
    words = lambda *shape: few_queries.room_of(shape, 32768, None)
    assert words(1, 1, 8, 8, 64) == 8 * 15 * 1024
    assert words(1, 1, 4, 8, 64) == 4 * 15 * 1024
    assert words(2, 1, 8, 8, 64) == 16 * 7 * 1024
    assert words(3, 1, 8, 8, 64) == 0  # More heads are not split.
    assert words(1, 2, 8, 4, 64) == 0  # Not stored.
    assert words(1, 1, 8, 8, 32) == 0 == words(1, 1, 8, 9, 64)  # Not covered.
    assert few_queries.room_of((1, 1, 8, 8, 64), 32768, 128) == 0


if not OLD:

    def lowered(args, where, **more):
        call = lambda *args: on_hopper(*args, **where, window=None, **more)
        return kernels_for_cuda(call, *args)

    @pytest.mark.parametrize("S", [128, 1024, 1000, 32768])
    def test_lowers_for_cuda(S):
        assert lowered(inputs(1, 1, 8, 8, S), full(1, S)) == 1

    @pytest.mark.parametrize("S", [1024, 32768])
    def test_lowers_for_cuda_under_vmap(S):
        args, where = inputs(2, 1, 2, 2, S), full(1, S)
        q, k, v = (a[:, None] for a in args[:3])
        run = lambda q, k, v: on_hopper(q, k, v, args[3], **where, window=None)
        assert kernels_for_cuda(jax.vmap(run), q, k, v) == 1

    @pytest.mark.parametrize(("B", "S"), [(2, 1024), (1, 32768)])
    def test_storing_lowers_for_cuda_in_place(B, S):
        q, k, v, sinks = inputs(B, 1, 8, 8, S)
        new = q[:, :, :, 0]

        def step(k, v, room):
            where = full(B, S) | {"slots_BT": jnp.full((B, 1), S - 1, jnp.int32)}
            k, v = k.reshape(B, S, 512), v.reshape(B, S, 512)
            more = where | {"window": None, "room": room}
            return few_queries.few_queries_stored(q, new, new, k, v, sinks, **more)

        words = few_queries.room_of(q.shape, S, None)
        room = jnp.full(words, EMPTY, jnp.int32) if words else None
        lowered = jax.jit(step).trace(k, v, room).lower(lowering_platforms=("cuda",)).as_text()
        (call,) = [line for line in lowered.splitlines() if "mosaic_gpu_v2" in line]
        assert "output_tuple_indices = [1], operand_index = 1" in call
        assert "output_tuple_indices = [2], operand_index = 2" in call
        assert ("output_tuple_indices = [3], operand_index = 9" in call) == bool(words)

    def test_queries_and_keys_bring_the_room():
        """Nothing else writes what the last cluster waits for."""
        S, K, G, H, D = 32768, 2, 8, 64, 64

        def run(words, x, scale, weight, bias, turn, k, v, sinks):
            options = {"epsilon": 1e-5, "group": G, "room": words}
            *new, room = dense.queries_keys_values(x, scale, weight, bias, turn, turn, **options)
            where = tuple(jnp.zeros(shape, jnp.int32) for shape in ((1, 1), (1, 1), (1, S)))
            floats = *(a[None] for a in new), k, v, sinks
            return mosaic_gpu.differentiable("store_and_attend", floats, where, None, room)

        O = K * (G + 2) * H
        shapes = (1, D), D, (O, D), O, (1, H // 2), (1, S, K * H), (1, S, K * H), (K, G)
        inputs = [jnp.zeros(shape, jnp.bfloat16) for shape in shapes]
        room = few_queries.room_of((1, 1, K, G, H), S, None)
        for words in room, 0:
            few = functools.partial(run, words)
            assert kernels_for_cuda(few, *inputs) == 2
            filled = f":i32[{room}] = broadcast_in_dim" in str(jax.make_jaxpr(few)(*inputs))
            assert filled == (words == 0)


def test_storing_takes_one_position():
    q, k, v, sinks = inputs(1, 2, 1, 1, 16)
    pos = full(1, 16, T=2)
    with pytest.raises(NotImplementedError, match="one position a row, got 2"):
        few_queries.few_queries_stored(
            q, q[..., 0, :], q[..., 0, :], k[:, :, 0], v[:, :, 0], sinks, **pos,
            slots_BT=pos["q_pos_BT"], window=None,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("sizes", "change", "reason"),
    [
        ((1, 1, 1, 8, 16), lambda q, *rest: (q.astype(jnp.float32), *rest), "bfloat16"),
        ((1, 1, 1, 8, 15), lambda *args: args, "16 slots"),
        ((1, 1, 1, 8, 16, 32), lambda *args: args, "heads of 64"),
    ],
)
def test_what_it_does_not_cover_is_refused(sizes, change, reason):
    args = change(*inputs(*sizes))
    with pytest.raises(NotImplementedError, match=reason):
        on_hopper(*args, **full(1, sizes[4], T=sizes[1]), window=None)


@pytest.fixture
def as_on_hopper(monkeypatch):
    """As on the GPU, but that nothing is computed; a list of what would be launched."""
    launched = []

    def launch(run, q, *inputs):
        launched.append("attention")
        return q

    def launch_storing(run, q, k, v, *inputs):
        launched.append("store_and_attend")
        return q, k, v

    dispatch.say_once.cache_clear()
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: "")
    monkeypatch.setattr(few_queries, "launch", launch)
    monkeypatch.setattr(few_queries, "launch_storing", launch_storing)
    return launched


def store(T=1, G=8, S=16, H=64, new=jnp.bfloat16, q=jnp.bfloat16):
    """Stores, and attends, random numbers."""
    queries, k, v, sinks = inputs(1, T, 1, G, S, H)
    added = [queries[:, :, :, 0].astype(new)] * 2
    where = full(1, S, T) | {"slots_BT": np.arange(S - T, S)[None], "window": None}
    cache = [a.reshape(1, S, H) for a in (k, v)]
    api.store_and_attend(queries.astype(q), *added, *cache, sinks, **where)


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"q": jnp.float32}, "not bfloat16"),
        ({"G": 9}, "1, 2, 4 or 8 queries of a key head, got 64 and 9"),
        ({"S": 15}, "takes 16 slots or more"),
        ({"H": 32}, "takes heads of 64"),
    ],
)
def test_what_keeps_one_position_from_being_stored_is_said_by_attention(
    as_on_hopper, caplog, sizes, reason
):
    store(**sizes)
    (message,) = caplog.messages
    assert message.startswith("attention runs on xla (mosaic_gpu: ") and reason in message
    assert not as_on_hopper


@pytest.mark.parametrize(
    ("sizes", "launch"),
    [
        ({}, "store_and_attend"),
        # They become what the cache has, as where XLA writes them.
        ({"new": jnp.float32}, "store_and_attend"),
        ({"T": 2, "G": 4}, "attention"),
    ],
)
def test_otherwise_nothing_is_said(as_on_hopper, caplog, sizes, launch):
    store(**sizes)
    assert as_on_hopper == [launch] and not caplog.messages


def test_elsewhere_it_says_why_when_named():
    reason = "needs JAX" if OLD else "needs a Hopper GPU, this is cpu"
    args, where = inputs(1, 1, 1, 8, 16), full(1, 16)
    with pytest.raises(NotImplementedError, match=reason):
        api.attention(*args, **where, window=None, implementation="mosaic_gpu")


def test_gradients_are_those_of_xla(monkeypatch):
    """The kernels' places are taken by what would be wrong if it were asked for gradients."""
    q, k, v, sinks = inputs(1, 1, 2, 2, 16)
    where = full(1, 16, used=9) | {"slots_BT": np.array([[8]])}
    cache, new = [a.reshape(1, 16, 128) for a in (k, v)], [q[:, :, :, 0], q[:, :, :, 1]]
    for operation, kernel, floats, names in (
        ("attention", "few_queries", (q, k, v, sinks), ("q_pos_BT", "k_pos_BS")),
        ("store_and_attend", "few_queries_stored", (q, *new, *cache, sinks), tuple(where)),
    ):
        plain = getattr(xla, operation)
        detached = lambda *args, plain=plain, room=None, **more: jax.lax.stop_gradient(
            plain(*args, **more)
        )
        monkeypatch.setattr(mosaic_gpu, kernel, detached)
        places = tuple(where[n] for n in ("slots_BT", "q_pos_BT", "k_pos_BS") if n in names)
        named = {n: where[n] for n in names}

        def loss(function, *floats):
            return sum(
                (a.astype(jnp.float32) ** 2).sum() for a in jax.tree.leaves(function(floats))
            )

        # What is not there has no gradient, and a room, which these do not look at, none either.
        room = None if operation == "attention" else jnp.zeros(4, jnp.int32)
        ours = lambda floats, operation=operation, places=places, room=room: (
            mosaic_gpu.differentiable(operation, floats, places, 7, room)
        )
        theirs = lambda floats, plain=plain, named=named: plain(*floats, **named, window=7)
        every = tuple(range(1, len(floats) + 1))
        got, want = (jax.grad(loss, argnums=every)(f, *floats) for f in (ours, theirs))
        for g, w in zip(got, want, strict=True):
            assert w.any()
            np.testing.assert_array_equal(g, w)


def test_storing_elsewhere_is_one_after_the_other():
    q, k, v, sinks = inputs(1, 1, 2, 2, 16)
    where, slots = full(1, 16, used=9), np.array([[8]])
    cache, new = [a.reshape(1, 16, 128) for a in (k, v)], [q[:, :, :, 0], q[:, :, :, 1]]
    run = lambda: api.store_and_attend(
        q, *new, *cache, sinks, **where, slots_BT=slots, window=7, implementation="xla"
    )
    heads, k_after, v_after = run()
    assert (k_after[0, 8] == new[0].reshape(-1)).all() and (
        v_after[0, 8] == new[1].reshape(-1)
    ).all()
    k, v = (a.reshape(1, 16, 2, 64) for a in (k_after, v_after))
    np.testing.assert_array_equal(heads, xla.attention(q, k, v, sinks, **where, window=7))


@pytest.mark.parametrize(
    ("less", "dtype", "mesh"),
    [(1, jnp.int32, None), (0, jnp.float32, None), (0, jnp.int32, {"expert": 2})],
)
def test_room_of_another_size_or_type_and_for_a_mesh_is_refused(less, dtype, mesh):
    q, k, v, sinks = inputs(1, 1, 2, 8, 32768)
    where = full(1, 32768) | {"slots_BT": np.array([[0]]), "window": None}
    new, cache = [q[:, :, :, 0]] * 2, [a.reshape(1, 32768, 128) for a in (k, v)]
    room = jnp.full(few_queries.room_of(q.shape, 32768, None) - less, EMPTY, dtype)
    mesh = mesh and make_mesh(**mesh)
    with pytest.raises(ValueError, match="room must be int32"):
        api.store_and_attend(q, *new, *cache, sinks, **where, room=room, mesh=mesh)
