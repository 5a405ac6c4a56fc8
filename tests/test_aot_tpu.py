"""The kernels for TPU through the real compiler: they build, and nothing copies weights."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import pytest

pytest.importorskip("libtpu", reason="`make test-tpu` installs the compiler for TPU")

from gpt_oss_jax import aot, cli, compile_archive
from gpt_oss_jax.checkpoint import outline
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.generate import ahead
from gpt_oss_jax.kernels import attention, expert_mlp, store_and_attend
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.kernels.target import knows_fp4
from gpt_oss_jax.model.moe import EXPERT_FORMS
from gpt_oss_jax.quant import MXArray
from gpt_oss_jax.sampling import SamplingParams
from gpt_oss_jax.sharding import make_mesh, named_sharding

KINDS = ("v5e", "v5p", "v6e", "tpu7x")


@pytest.fixture(autouse=True, scope="module")
def compiles_quickly():
    """Not here: what the compiler makes of programs is what is looked at."""


class Target:
    """The first chips of a kind."""

    def __init__(self, kind: str, count: int = 1):
        self.mesh = make_mesh(expert=count, devices=aot.devices(kind, count))

    def array(self, shape, dtype=jnp.bfloat16, first=None) -> jax.ShapeDtypeStruct:
        where = named_sharding(self.mesh, (first, *[None] * (len(shape) - 1)), shape)
        return jax.ShapeDtypeStruct(shape, dtype, sharding=where)

    def compile(self, function, *args):
        with aot.in_place_of_ours(self.mesh.devices.flat[0]):
            return jax.jit(function).lower(*args).compile()


target = functools.cache(Target)


def expert_program(kind, E, X, D, F, M, dtype=jnp.bfloat16, form="packed", devices=1):
    """The compiled expert layer, and the bytes of its weights; experts split over devices."""
    t = target(kind, devices)

    def words(*shape):
        scales = jax.ShapeDtypeStruct((*shape[:-1], shape[-1] // 32), jnp.uint8)
        blocks = jax.ShapeDtypeStruct((*scales.shape, 16), jnp.uint8)
        make = EXPERT_FORMS[form]
        if form == "packed":
            native = knows_fp4(t.mesh.devices.flat[0].device_kind)
            make = functools.partial(make, native=native)
        m = jax.eval_shape(make, MXArray(blocks, scales))
        return jax.tree.map(lambda x: t.array(x.shape, x.dtype, "experts"), m)

    w = ExpertWeights(
        words(E, F, 2, D),
        t.array((E, F, 2), dtype, "experts"),
        words(E, D, F),
        t.array((E, D), dtype, "experts"),
    )
    mesh = t.mesh if devices > 1 else None
    run = functools.partial(expert_mlp, limit=7.0, implementation="mosaic_tpu", mesh=mesh)
    program = t.compile(
        run, t.array((M, D), dtype), t.array((M, X), jnp.int32), t.array((M, X), jnp.float32), w
    )
    return program, sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((w.up, w.down)))


@pytest.mark.parametrize(
    ("config", "form", "bits"),
    [
        pytest.param(GPT_OSS_20B, "packed", 4.25, id="20b"),
        pytest.param(GPT_OSS_120B, "packed", 4.25, id="120b"),
        pytest.param(GPT_OSS_120B, "folded", 8.25, id="120b folded"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_experts_of_one_row_are_read_in_place(kind, config, form, bits):
    program, weights = expert_program(
        kind,
        config.num_experts,
        config.experts_per_token,
        config.hidden_size,
        config.intermediate_size,
        1,
        form=form,
    )
    memory = program.memory_analysis()
    assert memory.temp_size_in_bytes < weights / 1000
    # The tiles add nothing but a 45th part of the outputs, and six groups of scales.
    values = 3 * 2880 * 2880 * config.num_experts
    assert memory.argument_size_in_bytes < 1.04 * values * bits / 8


@pytest.mark.parametrize("form", EXPERT_FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("M", "dtype"), [(5, jnp.float32), (40, jnp.bfloat16)])
def test_other_programs_build(kind, M, dtype, form):
    expert_program(kind, 8, 4, 320, 576, M, dtype, form)


def test_a_device_has_room_for_its_share_of_the_rows():
    """Not for those of all devices, whatever they choose: that alone would be over the limit."""
    M, X, D = 8192, 4, 1024
    program, _ = expert_program("v5e", 64, X, D, 544, M, devices=8)
    assert program.memory_analysis().temp_size_in_bytes < M * X * D * 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("T", "S", "window", "dtype"),
    [
        (1, 32768, None, jnp.bfloat16),
        (1, 128, 128, jnp.bfloat16),
        (16, 640, 128, jnp.bfloat16),
        (1, 384, None, jnp.float32),
    ],
)
def test_attention_reads_the_cache_in_place(kind, T, S, window, dtype):
    t, K, G, H = target(kind), 8, 8, 64

    def run(q, k, v, sinks, q_pos, k_pos):
        where = {"q_pos_BT": q_pos, "k_pos_BS": k_pos, "window": window}
        k, v = (x.reshape(1, S, K, H) for x in (k, v))  # As out of the cache.
        return attention(q, k, v, sinks, **where, implementation="mosaic_tpu")

    program = t.compile(
        run,
        t.array((1, T, K, G, H), dtype),
        t.array((1, S, K * H), dtype),
        t.array((1, S, K * H), dtype),
        t.array((K, G), dtype),
        t.array((1, T), jnp.int32),
        t.array((1, S), jnp.int32),
    )
    memory = program.memory_analysis()
    cache = 2 * S * K * H * jnp.dtype(dtype).itemsize
    assert memory.argument_size_in_bytes < 1.1 * cache + (1 << 20)
    assert memory.temp_size_in_bytes < cache / 100 + (3 << 20)


@pytest.mark.parametrize(
    ("kind", "count"), [("v5e", 1), ("v5e", 8), ("v6e", 4), ("v5p", 4), ("tpu7x", 2)]
)
def test_programs_of_whole_models(kind, count):
    """Kernels for every layer, rows and no weights between devices, and no weight copied."""
    config, devices = (
        dataclasses.replace(GPT_OSS_120B, num_hidden_layers=3),
        aot.devices(kind, count),
    )
    mesh = make_mesh(expert=count, devices=devices) if count > 1 else None
    options = {"memory": 0, "samplings": [SamplingParams(0.0)]}
    with aot.in_place_of_ours(devices[0]):
        found = ahead.of_cache(outline(config, mesh=mesh), 1, 2048, [256], **options)
        programs = {program.name: program.compiled for program in found}
    check(config, programs["decode"], 1, count)
    check(config, programs["prefill"], 256, count)


def test_caches_are_not_all_turned_around_at_once():
    """One head a device fills half of the lanes, so XLA stores it another way than kernels read."""
    sizes = {"hidden_size": 1024, "intermediate_size": 512, "num_experts": 32, "vocab_size": 1024}
    config = dataclasses.replace(GPT_OSS_120B, num_hidden_layers=8, **sizes)
    devices = aot.devices("v5e", 8)
    model = outline(config, mesh=make_mesh(expert=8, devices=devices))
    options = {"memory": 0, "samplings": [SamplingParams(0.0)]}
    with aot.in_place_of_ours(devices[0]):
        programs = ahead.of_cache(model, 1, 32768, [4096], **options)
        prefill = next(program for program in programs if program.name == "prefill").compiled
    # Keys and values of the four layers that see everything, of 128 lanes.
    assert prefill.memory_analysis().temp_size_in_bytes < 4 * 2 * 32768 * 128 * 2


def check(config, program, tokens, devices):
    text = program.as_text()
    calls = re.findall(r'"tpu_custom_call".*op_name="(?:[^"]*/)?(expert_up|attention)_', text)
    # Of a prompt's last layer only keys and values are computed: nobody uses what it gives.
    layers = 3 if tokens == 1 else 2
    assert (calls.count("expert_up"), calls.count("attention")) == (layers, layers)
    memory = program.memory_analysis()
    embedding = config.vocab_size * config.hidden_size * 2 / devices
    assert memory.temp_size_in_bytes < 0.5 * embedding + tokens * 2**20
    moved = re.findall(r"= (\w+)\[([\d,]*)\]\S* (?:all-|collective-|reduce-s)\S*\(", text)
    assert bool(moved) == (devices > 1)
    # Never fewer than two rows: `Embedding` says why it looks up one token twice.
    for kind, shape in moved:
        assert kind not in ("u8", "u32") and size(shape) <= max(tokens, 2) * config.hidden_size
        assert kind == "bf16" or size(shape) <= config.hidden_size, "twice the bytes"


def size(shape: str) -> int:
    return functools.reduce(lambda a, b: a * int(b), filter(None, shape.split(",")), 1)


def test_no_slot_leaves_its_device_where_the_context_is_split():
    """By itself XLA gathers the cache to write one token."""
    mesh = make_mesh(context=4, devices=aot.devices("v6e", 4))

    def array(shape, *axes, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=named_sharding(mesh, axes, shape))

    new, row = array((1, 1, 8, 64), *[None] * 4), array((1, 1), None, None, dtype=jnp.int32)
    cache = array((1, 4096, 512), None, "slots", None)
    q, sinks = array((1, 1, 8, 8, 64), *[None] * 5), array((8, 8), None, None)
    positions = array((1, 4096), None, None, dtype=jnp.int32)

    def step(k_BSL, v_BSL, q, new, sinks, row, positions):
        where = {"slots_BT": row, "q_pos_BT": row, "k_pos_BS": positions, "window": None}
        return store_and_attend(q, new, new, k_BSL, v_BSL, sinks, **where, mesh=mesh)

    with aot.in_place_of_ours(mesh.devices.flat[0]):
        run = jax.jit(step, donate_argnums=(0, 1))
        text = run.lower(cache, cache, q, new, sinks, row, positions).compile().as_text()
    assert "all-reduce" in text and "all-gather" not in text


def test_what_does_not_fit_is_not_compiled(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    assert cli.main(["compile", "120b", "--device", "v5e", "--output", "a.tar"]) == 2
    assert "more than each v5e has; gpt-oss-jax plan says" in capsys.readouterr().err


def test_plan_asks_the_compiler_and_leaves_nothing_behind(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(cli, "_enable_compile_cache", lambda: None)
    with compile_archive.kept_in(tmp_path):
        assert cli.main(["plan", "tiny", "--device", "v5e", "-c", "512", "--compile"]) == 0
    told = capsys.readouterr()
    assert re.search(r"\nThe compiler: 0\.1\d GiB, of these 0\.1\d weights and cache", told.out)
    assert re.search(r"decode: 1 x 512 slots, temperature: [\d.]+ s\n", told.err)
    assert not compile_archive.programs(tmp_path)
