"""The Hopper kernel for the attention of many queries, without the GPU.

It runs in JAX's interpreter, which finds races, with tiles so small that there are several.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hopper_layer import (
    attention_in_float32,
    interpreted,
    kernels_for_cuda,
    multiply_as_the_interpreter_can,
)

from gpt_oss_jax.kernels.attention import many_queries as module
from gpt_oss_jax.kernels.attention.many_queries import many_queries

KEYS, WARPGROUPS = 16, 2


def inputs(B, T, S, K=1, G=8, H=64, dtype=jnp.bfloat16):
    random = np.random.default_rng(T)
    shapes = (B, T, K, G, H), (B, S, K, H), (B, S, K, H), (K, G)
    q, k, v, sinks = (jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    return 2 * q, k, v, sinks


def positions(q_pos, k_pos):
    return {
        "q_pos_BT": jnp.asarray(np.stack(q_pos), jnp.int32),
        "k_pos_BS": jnp.asarray(np.stack(k_pos), jnp.int32),
    }


def whole(T=40):
    """A prompt, and one that is shorter."""
    short = np.where(np.arange(T) < T - 21, np.arange(T), -1)
    return positions([np.arange(T), short], [np.arange(T), short])


def chunk(T=19, S=53):
    """Queries after a cache whose slots are in no order, some of them empty, the last padding."""
    random = np.random.default_rng(0)
    k_pos = np.stack([random.permutation(S) for _ in range(2)])
    k_pos[1][k_pos[1] >= S - 5] = -1
    q_pos = np.stack([np.arange(S - T, S), np.arange(S - T, S) - 5])
    q_pos[0, -2:] = -1
    return positions(q_pos, k_pos)


def edges():
    """Blocks of queries whose first or last one alone sees something of a tile, with window 11."""
    return positions([np.arange(9, 49)], [np.arange(49)])


def ring(T=24, R=16, start=37):
    """A ring that has gone round, read before a chunk, and the chunk; then a ring half full."""
    slots = np.arange(R)
    old = start - 1 - (start - 1 - slots) % R
    rings = [old, np.where(slots < 7, slots, -1)]
    new = [np.arange(start, start + T), np.arange(7, 7 + T)]
    return positions(new, np.concatenate([rings, new], axis=1))


def nothing():
    """Rows of padding, and keys that are all later."""
    return positions([np.full(16, -1), np.arange(16)], [np.arange(20), np.arange(16, 36)])


def older():
    """Keys that are all visible to all queries."""
    return positions([np.arange(100, 116)], [np.arange(48)])


CASES = {
    "a prompt": (whole(), None, 2, 8),
    "a prompt in a window": (whole(), 7, 1, 8),
    "a chunk": (chunk(), None, 1, 8),
    "a chunk in a window": (chunk(), 9, 2, 8),
    "a chunk after a ring": (ring(), 9, 1, 8),
    "edges of tiles": (edges(), 11, 1, 8),
    "two queries a head": (ring(), 12, 2, 2),
    "no masks": (older(), None, 1, 8),
    "nothing to see": (nothing(), None, 1, 8),
}
cases = pytest.mark.parametrize("case", CASES)


def problem(case):
    where, window, K, G = CASES[case]
    (B, T), S = where["q_pos_BT"].shape, where["k_pos_BS"].shape[1]
    return inputs(B, T, S, K, G), where | {"window": window}


def listed(where, tokens, window):
    """What `_tiles` says, as masks of tiles [B, blocks, tiles]: seen, and seen without a mask."""
    q_pos = module._padded(where["q_pos_BT"], tokens, mode="edge")
    k_pos = jnp.where(where["k_pos_BS"] < 0, module._NEVER, where["k_pos_BS"])
    k_pos = module._padded(k_pos, KEYS, constant_values=module._NEVER)
    tiles, counts = map(np.asarray, module._tiles(q_pos, k_pos, tokens, KEYS, window))
    place = np.argsort(tiles, axis=2)
    return place < counts[:, :, 1:], place < counts[:, :, :1]


@cases
def test_tiles_are_those_with_something_to_see(case):
    _, where = problem(case)
    q_pos, k_pos, window = where["q_pos_BT"], where["k_pos_BS"], where["window"]
    seen, whole = listed(where, 8, window)
    distance = q_pos[:, :, None] - k_pos[:, None]
    visible = (k_pos[:, None] >= 0) & (distance >= 0)
    if window is not None:
        visible &= distance < window
    padding = [(0, 0), (0, -q_pos.shape[1] % 8), (0, -k_pos.shape[1] % KEYS)]

    def of_tiles(fill):
        padded = np.pad(visible, padding, constant_values=fill)
        return padded.reshape(len(q_pos), -1, 8, seen.shape[2], KEYS)

    some, all_ = of_tiles(False).any(axis=(2, 4)), of_tiles(False).all(axis=(2, 4))
    assert (seen >= some).all()
    assert (whole <= of_tiles(True).all(axis=(2, 4))).all()
    if (jnp.diff(k_pos) > 0).all() and (jnp.diff(q_pos) > 0).all():
        np.testing.assert_array_equal(seen, some)
        np.testing.assert_array_equal(whole, all_)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"dtype": jnp.float32}, "takes bfloat16, got float32"),
        ({"H": 32}, "heads of 64"),
        ({"G": 3}, "queries of a key head, got 64 and 3"),
    ],
)
def test_what_it_does_not_cover_is_refused(options, said):
    with pytest.raises(NotImplementedError, match=said):
        many_queries(*inputs(2, 40, 40, **options), **whole(), window=None)


if jax.__version_info__ >= (0, 11, 2):

    @pytest.fixture
    def run(monkeypatch):
        monkeypatch.setattr(module, "_MAX_STAGES", 2)
        multiply_as_the_interpreter_can(monkeypatch, WARPGROUPS, 64, KEYS)
        return functools.partial(interpreted, many_queries, warpgroups=WARPGROUPS, keys=KEYS)

    @cases
    def test_equals_xla(run, case):
        args, where = problem(case)
        check(case, args, where, run(*args, **where))

    def check(case, args, where, got):
        assert got.dtype == jnp.bfloat16
        want = attention_in_float32(*args, **where)
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=1e-2, rtol=1e-2)
        if case == "nothing to see":
            np.testing.assert_array_equal(got.astype(jnp.float32), 0)

    def test_tiles_that_no_query_sees_are_not_read(run):
        (q, k, v, sinks), where = problem("a prompt in a window")
        q, where = q[:, 32:], where | {"q_pos_BT": where["q_pos_BT"][:, 32:]}
        got = run(q, k.at[:, :16].set(jnp.nan), v.at[:, :16].set(jnp.nan), sinks, **where)
        want = attention_in_float32(q, k, v, sinks, **where)
        np.testing.assert_allclose(got.astype(jnp.float32), want, atol=1e-2, rtol=1e-2)

    @pytest.mark.parametrize(("window", "warpgroups"), [(None, 4), (128, 2)])
    def test_a_window_has_small_blocks(window, warpgroups):
        """Of which a multiprocessor holds two; elsewhere a warpgroup only copies."""
        where = positions([np.arange(64)], [np.arange(64)])
        run = lambda *args: many_queries(*args, **where, window=window)
        assert f"num_threads={warpgroups}," in str(jax.make_jaxpr(run)(*inputs(1, 64, 64)))

    @pytest.mark.parametrize(
        ("B", "T", "S", "K", "G", "window"),
        [(1, 2048, 4096, 8, 8, None), (8, 100, 228, 8, 8, 128), (2, 2, 5, 2, 2, 7)],
    )
    def test_lowers_for_cuda(B, T, S, K, G, window):
        where = {"q_pos_BT": jnp.zeros((B, T), jnp.int32), "k_pos_BS": jnp.zeros((B, S), jnp.int32)}
        run = lambda *args: many_queries(*args, **where, window=window)
        assert kernels_for_cuda(run, *inputs(B, T, S, K, G)) == 1
