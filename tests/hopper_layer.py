"""What the tests of the Hopper kernels share: a random expert layer and what it must give, lowering
for CUDA, and what JAX's interpreter of Mosaic GPU lacks."""

import contextlib
import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import ptx

from gpt_oss_jax.kernels.attention import xla
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.quant import MXArray


def layer(M, E=5, X=2, D=96, F=64, bias=np.float32, same=False):
    """Rows, experts, routing weights and expert weights, all random."""
    random = np.random.default_rng(M)

    def packed(*shape):
        blocks = random.integers(0, 256, (*shape[:-1], shape[-1] // 32, 16))
        scales = random.integers(110, 124, (*shape[:-1], shape[-1] // 32))
        packed = (jnp.asarray(x, jnp.uint8) for x in (blocks, scales))
        return MXArray(*packed, shuffled=True)

    w = ExpertWeights(
        packed(E, F, 2, D),
        jnp.asarray(random.normal(size=(E, F, 2)), bias),
        packed(E, D, F),
        jnp.asarray(random.normal(size=(E, D)), bias),
    )
    x = jnp.asarray(random.normal(size=(M, D)), jnp.bfloat16)
    chosen = np.stack([random.permutation(X if same else E)[:X] for _ in range(M)])
    weight = random.random((M, X))
    return x, jnp.asarray(chosen, jnp.int32), jnp.asarray(weight, jnp.float32), w


@jax.jit
def wanted(x, chosen, weight, w):
    """What the oracle makes of the decoded weights, in float32."""
    up, down = w.up.dequantize(jnp.float32), w.down.dequantize(jnp.float32)
    return oracle.expert_mlp(x, chosen, weight, up, w.up_bias, down, w.down_bias, limit=7.0)


@functools.partial(jax.jit, static_argnames="window")
def attention_in_float32(*args, **where):
    """XLA's."""
    return xla.attention(*(a.astype(jnp.float32) for a in args), **where)


def launched(program, *arrays, **how):
    """What a thread program makes of its last operand, with the PTX interpreter for the GPU."""
    memory = ptx.Memory()
    arrays = [np.asarray(a) for a in arrays]
    places = [memory.put(a) for a in arrays]
    size = {"shared_bytes": program.shared_bytes, "warps": program.block_warps}
    ptx.launch(program.ptx(), places, memory, grid=program.grid, **size, **how)
    return memory.get(places[-1], arrays[-1].shape, arrays[-1].dtype)


def kernels_for_cuda(function, *args):
    """How many Mosaic GPU kernels a function becomes."""
    text = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return text.count("mosaic_gpu_v2")


def interpreted(function, *args, **options):
    """A function whose Mosaic GPU kernels run in JAX's interpreter, which must find no race.

    Of some that it finds it raises an error, others it only prints.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    said = io.StringIO()
    params = plgpu.InterpretGPUParams(detect_races=True)
    with contextlib.redirect_stdout(said), plgpu.force_gpu_interpret_mode(params):
        result = jax.block_until_ready(function(*args, **options))
    assert "RACE DETECTED" not in said.getvalue(), said.getvalue()
    return result


def multiply_as_the_interpreter_can(monkeypatch, warpgroups, rows, columns):
    """Left operands that are registers, bf16 [rows, columns], go through shared memory.

    The interpreter multiplies only what is there. It looks for races only where memory is read in
    the ordinary way, so operands are, and a fence after it stands for the matrix unit, which reads
    as the copies write. So a fence that is missing after other reads before it is not found.
    """
    from jax.experimental.pallas import mosaic_gpu as plgpu

    width = min(64, columns)
    tiled = (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(2 * width))
    through = plgpu.SMEM((warpgroups, rows, columns), jnp.bfloat16, transforms=tiled)
    kernel, wgmma, lent = plgpu.kernel, plgpu.wgmma, []

    def lending(block, *, scratch_types, **options):
        def lent_to(*refs):
            lent.append(refs[-1])
            block(*refs[:-1])

        return kernel(lent_to, scratch_types=[*scratch_types, through], **options)

    def multiply(sums, a, b):
        if isinstance(a, jax.Array):
            own = lent[-1].at[jax.lax.axis_index("warpgroup")]
            own[...] = a
            plgpu.commit_smem()
            a = own
        _ = a[...], b[...]
        plgpu.commit_smem()
        wgmma(sums, a, b)

    monkeypatch.setattr(plgpu, "kernel", lending)
    monkeypatch.setattr(plgpu, "wgmma", multiply)
