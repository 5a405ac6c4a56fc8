"""The Hopper kernels of the expert layer, without the GPU: interpreted, and lowered for it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import ptx
import pytest
from as_tpu import as_on_a_tpu
from hopper_layer import kernels_for_cuda, launched, layer, wanted

from gpt_oss_jax.kernels import sharded, target
from gpt_oss_jax.kernels.dense import mosaic_gpu as dense_kernels
from gpt_oss_jax.kernels.dispatch import dispatch
from gpt_oss_jax.kernels.expert_matmul import (
    api,
    few_rows,
    mosaic_gpu,
    rows_ptx,
    xla,
)
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights, in_checkpoint_order
from gpt_oss_jax.kernels.ptx import EMPTY
from gpt_oss_jax.sharding import make_mesh

OLD = jax.__version_info__ < target.JAX_FOR_HOPPER
on_hopper = functools.partial(mosaic_gpu.on_hopper, limit=7.0)


def interpreted(x, chosen, weight, w, limit, some_elsewhere=False, at_once=True, **how):
    """`few_rows` with the PTX interpreter in the place of the GPU."""
    M, X = chosen.shape
    # Few blocks, so that each has several tiles.
    program = dataclasses.replace(few_rows.layer(w, M, X, limit), multiprocessors=1)
    up, down = (w.up.blocks, w.up.scales, w.up_bias), (w.down.blocks, w.down.scales, w.down_bias)
    room = np.full(program.room, EMPTY, np.int32)
    y = np.full((M, X, x.shape[1]), np.nan, np.float32)
    arrays = x, chosen, weight, *up, *down, room, y
    y_MXD = launched(program, *arrays, at_once=at_once, **how)
    here = np.asarray(chosen)[..., None] < w.up.shape[0]
    return np.where(here, y_MXD, 0).sum(axis=1) if some_elsewhere else y_MXD.sum(axis=1)


@pytest.mark.parametrize(
    ("M", "options"),
    [
        (1, {}),
        (1, {"bias": ml_dtypes.bfloat16}),
        (3, {"same": True}),
        (8, {"X": 4, "D": 64, "F": 32}),
        (1, {"D": 544, "F": 32}),
        (13, {"D": 64, "F": 32}),
        (20, {"D": 32, "F": 32, "same": True}),
        (70, {"D": 32, "F": 32}),
        (20, {"E": 130, "D": 32, "F": 32}),
    ],
    ids=[
        "one row",
        "bfloat16 biases",
        "the same experts",
        "32 pairs",
        "two steps and a rest",
        "two visits",
        "visits that are full",
        "two pairs for a thread",
        "two experts for a thread",
    ],
)
def test_few_rows_equal_the_oracle(M, options):
    x, chosen, weight, w = layer(M, **options)
    got = interpreted(x, chosen, weight, w, 7.0)
    want = wanted(x, chosen, weight, w)
    assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(want)


@pytest.mark.parametrize(("M", "own"), [(1, 3), (1, 1), (9, 3), (2, 0)])
def test_ids_past_the_experts_add_nothing(M, own):
    """As on a device of a mesh; `own` 0: of several experts, which no row chose."""
    x, chosen, weight, w = layer(M, D=64, F=32)
    some = jax.tree.map(lambda a: a[: own or 2], w)
    past = jnp.resize(jnp.asarray([own or 2, (own or 2) + 1, 2**31 - 1]), chosen.shape)
    ours = jnp.where(chosen < own, chosen, past)
    got = interpreted(x, ours, weight, some, 7.0, some_elsewhere=True)
    run = functools.partial(wanted, x, chosen, w=w)
    want, all_of_it = run(weight=jnp.where(chosen < own, weight, 0)), run(weight=weight)
    assert np.linalg.norm(got - want) < 2e-3 * np.linalg.norm(all_of_it)


def test_blocks_of_several_rows_wait_for_earlier_ones_alone():
    """Or a device that has no room for all of them at once would wait for ever."""
    args = *layer(2), 7.0
    np.testing.assert_array_equal(interpreted(*args, at_once=False), interpreted(*args))


def test_the_order_of_warps_changes_nothing():
    args = *layer(13, D=64, F=32), 7.0
    by_chance = np.random.default_rng(0)
    np.testing.assert_array_equal(interpreted(*args, by_chance=by_chance), interpreted(*args))


@pytest.mark.parametrize("M", [6, 7])
def test_more_rows_than_can_be_sorted_go_through_in_parts(monkeypatch, M):
    x, chosen, weight, w = layer(M, D=64, F=32)
    monkeypatch.setattr(few_rows, "MAX_SORTED", 3 * chosen.shape[1])
    rows = []

    def kernel(x, chosen, weight, w, *, residual_MD, **options):
        rows.append(len(x))
        return residual_MD + xla.expert_mlp(x, chosen, weight, w, **options)

    run = few_rows.few_rows
    monkeypatch.setattr(few_rows, "few_rows", kernel)
    residual = jnp.ones_like(x)
    got = run(x, chosen, weight, w, limit=7.0, residual_MD=residual)
    want = residual + xla.expert_mlp(x, chosen, weight, w, limit=7.0)
    assert set(rows) == {3}
    np.testing.assert_allclose(got.astype(jnp.float32), want.astype(jnp.float32), rtol=2e-2)


if not OLD:

    def test_many_rows_of_other_widths_go_through_as_few(caplog):
        assert kernels_for_cuda(on_hopper, *layer(600, D=96, F=32)) == 1
        assert "more slowly (takes widths of 192 n" in caplog.text

    @pytest.mark.parametrize("M", [1, 8, 25])
    def test_few_rows_lower_for_cuda(M):
        assert kernels_for_cuda(on_hopper, *layer(M)) == 1

    def test_the_residual_stream_is_added_in_a_launch():
        x, *rest = layer(4)
        run = lambda x, *rest: on_hopper(x, *rest, residual=x)
        assert kernels_for_cuda(run, x, *rest) == 2

    def test_few_rows_lower_for_cuda_under_vmap():
        x, chosen, weight, w = layer(4)
        rows = [a.reshape(2, 2, -1) for a in (x, chosen, weight)]
        assert kernels_for_cuda(jax.vmap(lambda *rows: on_hopper(*rows, w)), *rows) == 1

    def test_few_rows_lower_for_cuda_on_a_mesh():
        kernel = functools.partial(on_hopper, some_elsewhere=True)
        run = functools.partial(sharded.expert_mlp, make_mesh(expert=4), kernel)
        assert kernels_for_cuda(run, *layer(4, E=8)) == 1

    @pytest.mark.parametrize("M", [1, 2])
    def test_the_router_makes_the_room_that_few_rows_take(M):
        def run(x, w, scale, router, bias):
            room = mosaic_gpu.room_of(len(x), 2, w)
            assert room == len(x) * 2 * 32 // 2 + (64 if M == 1 else 0)
            sizes = {"epsilon": 1e-5, "choices": 2, "room": room}
            h, chosen, weight, room = dense_kernels.route(x, scale, router, bias, **sizes)
            return on_hopper(h, chosen, weight, w, room=room, residual=x)

        x, *_, w = layer(M, E=8, D=64, F=32)
        more = (jnp.zeros(shape, jnp.bfloat16) for shape in (64, (8, 64), 8))
        # Router and experts, and for several rows their sum; nothing else writes what the experts
        # wait for.
        assert kernels_for_cuda(run, x, w, *more) == (2 if M == 1 else 3)
        assert mosaic_gpu.room_of(2, 2, in_checkpoint_order(w)) == 0


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda x, *rest: (x.astype(jnp.float32), *rest), "bfloat16"),
        (
            lambda x, chosen, weight, w: (
                x.astype(jnp.float32),
                chosen,
                weight,
                in_checkpoint_order(w),
            ),
            "rows are float32",
        ),
        (lambda x, chosen, weight, w: (x, chosen, weight, dense(w)), "MXFP4"),
        (lambda x, chosen, weight, w: (x, chosen, weight, in_words(w)), "TPU words"),
        (lambda x, chosen, weight, w: (x, chosen, weight, in_checkpoint_order(w)), "shuffles"),
        (lambda x, chosen, weight, w: (x, chosen, weight, half_biased(w)), "biases are float16"),
    ],
)
def test_what_it_does_not_cover_is_refused(change, reason):
    with pytest.raises(NotImplementedError, match=reason):
        on_hopper(*change(*layer(1)))


def test_more_experts_than_can_be_sorted_are_refused():
    with pytest.raises(NotImplementedError, match="takes up to 1,024 pairs .*, got 4 and 1,025"):
        on_hopper(*layer(2, E=1025, D=32, F=32))


def dense(w):
    return ExpertWeights(w.up.dequantize(), w.up_bias, w.down.dequantize(), w.down_bias)


def half_biased(w):
    return dataclasses.replace(w, down_bias=w.down_bias.astype(jnp.float16))


def in_words(w):
    return dataclasses.replace(w, up=w.up.in_words(), down=w.down.in_words())


def test_elsewhere_it_says_why_when_named():
    reason = "needs JAX" if OLD else "needs a Hopper GPU, this is cpu"
    with pytest.raises(NotImplementedError, match=reason):
        api.expert_mlp(*layer(1), limit=7.0, implementation="mosaic_gpu")
    with as_on_a_tpu(), pytest.raises(NotImplementedError, match="needs"):
        api.expert_mlp(*layer(1), limit=7.0, implementation="mosaic_gpu")


@pytest.mark.parametrize(
    ("name", "remarks"),
    [("mosaic_gpu", 0), ("fast", 1)],
    ids=["of another device", "for want of something"],
)
def test_what_is_said_of_an_implementation_that_is_passed_over(caplog, name, remarks):
    def refuse():
        raise NotImplementedError(f"not {name}")

    assert dispatch("x", {name: refuse, "xla": lambda: 1}, None) == 1
    assert len(caplog.records) == remarks


def added(program, residual, parts):
    """`rows.add_parts` with the PTX interpreter in the place of the GPU."""
    memory = ptx.Memory()
    poison = np.full(residual.shape, np.nan, ml_dtypes.bfloat16)
    places = [memory.put(np.asarray(x)) for x in (residual, parts, poison)]
    ptx.launch(program.ptx(), places, memory, grid=program.grid, shared_bytes=16)
    return memory.get(places[-1], residual.shape, ml_dtypes.bfloat16)


def on_top(residual, parts):
    """The parts added up over X, one after the other, and to the residual stream; rounded once."""
    total = functools.reduce(np.add, parts.transpose(1, 0, 2))
    return (np.asarray(residual, np.float32) + total).astype(ml_dtypes.bfloat16)


def test_parts_are_added_to_the_residual_stream():
    M, X, D = 3, 4, 300
    numbers = np.random.default_rng(0)
    residual = numbers.normal(size=(M, D)).astype(ml_dtypes.bfloat16)
    parts = numbers.normal(size=(M, X, D)).astype(np.float32)
    got = added(rows_ptx.Add(M, D, X), residual, parts)
    np.testing.assert_array_equal(got, on_top(residual, parts))


def test_few_rows_add_what_they_have_to_the_residual_stream(monkeypatch):
    """Each row to its own; what the experts give is set here."""
    x, chosen, weight, w = layer(3, D=64, F=32)
    numbers = np.random.default_rng(1)
    parts = numbers.normal(size=(*chosen.shape, 64)).astype(np.float32)
    residual = jnp.asarray(numbers.normal(size=x.shape), jnp.bfloat16)
    monkeypatch.setattr(few_rows, "_launch", lambda *args: jnp.asarray(parts).reshape(-1, 64))
    monkeypatch.setattr(few_rows, "add_parts", lambda r, y: added(rows_ptx.Add(3, 64, 2), r, y))
    got = few_rows.few_rows(x, chosen, weight, w, limit=7.0, residual_MD=residual)
    np.testing.assert_array_equal(got, on_top(residual, parts))


@pytest.mark.parametrize("implementation", ["xla", "mosaic_gpu"])
def test_what_the_result_is_added_to(monkeypatch, implementation):
    """And its gradient; with the kernel's own sum in the place of the launch."""
    x, chosen, weight, w = layer(2, D=64, F=32)
    monkeypatch.setattr(mosaic_gpu, "why_not_hopper", lambda: "")
    kernel = lambda *args, residual_MD, room, **more: residual_MD + xla.expert_mlp(*args, **more)
    monkeypatch.setattr(mosaic_gpu, "few_rows", kernel)
    residual = jnp.ones_like(x)
    run = functools.partial(api.expert_mlp, limit=7.0)

    def total(residual, implementation):
        more = {"residual": residual, "implementation": implementation}
        return (run(x, chosen, weight, w, **more).astype(jnp.float32) ** 2).sum()

    want = residual + run(x, chosen, weight, w, implementation="xla")
    got = run(x, chosen, weight, w, residual=residual, implementation=implementation)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(jax.grad(total)(residual, implementation), 2 * want)
    for wrong in residual[:1], residual.astype(jnp.float32):
        with pytest.raises(ValueError, match="residual must be as the rows"):
            run(x, chosen, weight, w, residual=wrong)
