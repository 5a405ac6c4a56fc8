"""The choice of experts on Hopper, without the GPU: interpreted, and lowered."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import ptx
import pytest
from hopper_layer import kernels_for_cuda
from random_model import random_model
from sizes import SHARDABLE

from gpt_oss_jax.kernels import choose, target
from gpt_oss_jax.kernels.routing import api, mosaic_gpu, xla
from gpt_oss_jax.model import moe
from gpt_oss_jax.sharding import make_mesh


@pytest.fixture
def launched(monkeypatch):
    """The PTX interpreter in the place of the GPU; the rows of every launch."""
    rows = []

    def launch(name, text, outs, inputs, *, grid, warpgroups):
        size = {"grid": grid, "warps": 4 * warpgroups, "shared_bytes": 16}
        size["second"] = bool(len(rows) % 2)
        rows.append(len(inputs[0]))

        def run(logits):
            memory = ptx.Memory()
            at = memory.put(np.asarray(logits))
            own = [memory.put(np.full(o.shape, -2, o.dtype)) for o in outs]
            ptx.launch(text, [at, *own], memory, **size)
            return tuple(memory.get(at, o.shape, o.dtype) for at, o in zip(own, outs, strict=True))

        return jax.pure_callback(run, outs, *inputs)

    monkeypatch.setattr(mosaic_gpu, "launch", launch)
    monkeypatch.setattr(api, "why_not_hopper", lambda: "")
    # What is traced has the launch of its time in it.
    mosaic_gpu._launch.clear_cache()
    yield rows
    mosaic_gpu._launch.clear_cache()


def logits_of(shape, seed=0):
    """Of every size and sign, some of a row the same."""
    numbers = np.random.default_rng(seed)
    scale = 10.0 ** numbers.integers(-3, 3, shape[:-1])
    logits = numbers.normal(size=shape).round(1) * scale[..., None]
    return jnp.asarray(logits, jnp.float32)


@pytest.mark.parametrize(
    ("shape", "X"), [((7, 32), 4), ((2, 5, 128), 4), ((4, 3), 3), ((3, 40), 32), ((1, 200), 1)]
)
def test_experts_are_chosen_as_by_xla(launched, shape, X):
    logits = logits_of(shape)
    experts, weights = choose(logits, X, implementation="mosaic_gpu")
    wanted, of_wanted = xla.choose(logits, choices=X)
    assert (experts.dtype, weights.dtype) == (jnp.int32, jnp.float32)
    np.testing.assert_array_equal(experts, wanted)
    np.testing.assert_allclose(weights, of_wanted, rtol=1e-5, atol=1e-30)
    assert launched == [np.prod(shape[:-1])]


def test_a_second_grid_does_the_same(launched):
    """As which the interpreter runs every other launch; vmap makes several of one."""
    logits = logits_of((9, 40))
    for ours, its in zip(choose(logits, 4), choose(logits[:8], 4), strict=True):
        np.testing.assert_array_equal(ours[:8], its)
    assert launched == [9, 8]


def test_more_choices_than_experts_are_refused():
    with pytest.raises(ValueError, match="wanted 5 of at least as many experts, got 4"):
        choose(logits_of((2, 4)), 5)


@pytest.mark.parametrize("sign", [1, -1], ids=["large", "small"])
def test_all_logits_of_a_row_may_be_the_same(launched, sign):
    """The lower ids; infinite ones too, but of those there must not be two."""
    logits = jnp.full((2, 40), sign * 3e38, jnp.float32).at[1, 39].set(jnp.inf)
    experts, weights = choose(logits, 4)
    np.testing.assert_array_equal(experts, [[0, 1, 2, 3], [39, 0, 1, 2]])
    np.testing.assert_allclose(weights[0], 0.25)


def test_gradients_are_those_of_xla(launched):
    logits, factors = logits_of((6, 32)), jnp.arange(24.0).reshape(6, 4)
    gradient = lambda f: jax.grad(lambda x: (f(x)[1] * factors).sum())(logits)
    got, want = gradient(lambda x: choose(x, 4)), gradient(lambda x: xla.choose(x, choices=4))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    assert launched == [6]


@pytest.mark.parametrize(
    ("axes", "rows"), [({"data": 2}, 8), ({"expert": 2}, 16), ({"context": 2}, 8)]
)
@pytest.mark.parametrize("shape", [(2, 8, 32), (16, 32)])
def test_devices_of_a_mesh_choose_for_their_rows(launched, axes, rows, shape):
    logits = logits_of(shape)
    rows = 16 if axes == {"context": 2} and len(shape) == 2 else rows
    got = jax.jit(lambda x: choose(x, 4, mesh=make_mesh(**axes)))(logits)
    for ours, wanted in zip(got, xla.choose(logits, choices=4), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=1e-5, atol=1e-30)
    assert launched == [rows]


@pytest.mark.parametrize(
    ("dtype", "choices", "how"),
    [
        (jnp.float32, 4, {"implementation": "xla"}),
        (jnp.float32, 4, {"implementation": "mosaic_tpu"}),
        (jnp.bfloat16, 4, {}),
        (jnp.float32, 33, {}),
    ],
    ids=["XLA is named", "another kernel is", "another type", "more than lanes"],
)
def test_xla_chooses_where_the_kernel_does_not(launched, dtype, choices, how):
    logits = logits_of((2, 40)).astype(dtype)
    experts, _ = choose(logits, choices, **how)
    np.testing.assert_array_equal(experts, jax.lax.top_k(logits, choices)[1])
    assert not launched


def test_a_model_says_where_and_how(monkeypatch):
    came = []

    def record(logits, choices, **how):
        came.append(how)
        return xla.choose(logits, choices=choices)

    monkeypatch.setattr(moe, "choose", record)
    mesh = make_mesh(expert=2)
    model = random_model(SHARDABLE, mesh=mesh)
    model.implementation = "xla"
    jax.eval_shape(lambda model: model(jnp.zeros((2, 4), jnp.int32)), model)
    assert came == SHARDABLE.num_hidden_layers * [{"implementation": "xla", "mesh": mesh}]


if jax.__version_info__ >= target.JAX_FOR_HOPPER:

    def test_it_lowers_for_cuda():
        run = functools.partial(mosaic_gpu.choose, choices=4)
        assert kernels_for_cuda(run, logits_of((300, 128))) == 1
        run = jax.vmap(run)
        assert kernels_for_cuda(run, logits_of((2, 300, 128))) == 1
