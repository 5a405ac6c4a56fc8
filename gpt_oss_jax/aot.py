"""Compiles a step for TPUs that are not there, with the compiler in the `libtpu` package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from gpt_oss_jax.config import Config
from gpt_oss_jax.model import Transformer, init_cache
from gpt_oss_jax.model.cache import cache_sharding
from gpt_oss_jax.model.layers import rows_whole
from gpt_oss_jax.model.moe import can_use_words
from gpt_oss_jax.sharding import named_sharding

# Chips of a slice by how many there are; the smallest that has enough is taken.
_SHAPES = {
    "v5e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v6e": {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4"},
    "v5p": {4: "2x2x1", 8: "2x2x2", 16: "2x2x4"},
    "tpu7x": {8: "2x2x1", 16: "2x2x2"},
}


def devices(kind: str, count: int) -> list:
    """Devices of a topology, of which nothing can be asked but to be compiled for.

    Args:
      kind: "v5e", "v5p", "v6e" or "tpu7x".
      count: How many; a tpu7x chip has two.

    Raises:
      ValueError: If libtpu is not installed, or knows no such slice.
    """
    fitting = [n for n in _SHAPES.get(kind, ()) if n >= count]
    if not fitting:
        raise ValueError(f"the compiler is asked for up to 16 devices of {', '.join(_SHAPES)}.")
    shape = _SHAPES[kind][min(fitting)]
    # Without these libtpu asks the cloud where it runs.
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
    # Several may compile at once: no chip is taken.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError('the TPU compiler is needed: pip install "gpt-oss-jax[tpu]".')
    one = {"chips_per_host_bounds": (1, 1, 1)} if shape == "1x1" else {}
    try:
        found = topologies.get_topology_desc(f"{kind}:{shape}", platform="tpu", **one)
    except (RuntimeError, NotImplementedError) as error:
        raise ValueError(
            f"the TPU compiler cannot be asked about {kind}:{shape}: {error}"
        ) from error
    return list(found.devices)[:count]


def compile_for(mesh: Mesh, function: Callable, *args, **options):
    """Compiles a function of arrays whose shardings are on the mesh; options are those of jit."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jax.jit(function, **options).trace(*args).lower().compile()


def compile_step(
    config: Config,
    mesh: Mesh,
    *,
    tokens: int = 1,
    context: int = 8192,
    batch: int = 1,
    dtype=jnp.bfloat16,
    expert_form: str = "packed",
):
    """Compiles one call of the model with a cache, which is donated.

    Args:
      config: Sizes.
      mesh: Of `make_mesh`, over `devices`.
      tokens: New tokens of each row: 1 decodes, more are a chunk of a prompt.
      context: Slots of the cache.
      batch: Rows.
      dtype: Of what is not MXFP4.
      expert_form: "packed" or "folded".

    Returns:
      What `jax.stages.Lowered.compile` does: `memory_analysis()`, `as_text()`.
    """

    def make():
        of = None if mesh.size == 1 else mesh
        model = Transformer(config, rngs=nnx.Rngs(0), dtype=dtype, mesh=of)
        if can_use_words(config, mesh):
            for layer in model.layers:
                for projection in (layer.mlp.up, layer.mlp.down):
                    projection.use_words(form=expert_form)
        return model

    def on_mesh(x, axes):
        where = named_sharding(mesh, axes, x.shape)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    graphdef, state = nnx.split(nnx.eval_shape(make))
    flat = {path: x.replace(on_mesh(x, x.axes)) for path, x in nnx.to_flat_state(state)}
    table = flat["embedding", "weight"]
    where = rows_whole(named_sharding(mesh, table.axes, table.shape))
    flat["embedding", "weight"] = table.replace(
        jax.ShapeDtypeStruct(table.shape, table.dtype, sharding=where)
    )
    leaves, tree = jax.tree.flatten(nnx.from_flat_state(flat.items()))
    kv_heads = config.num_key_value_heads
    cache = jax.tree.map(
        lambda x: x.update(sharding=cache_sharding(mesh, x, kv_heads)),
        jax.eval_shape(lambda: init_cache(config, batch, context, dtype)),
    )
    rows = on_mesh(jax.ShapeDtypeStruct((batch, tokens), jnp.int32), ("batch", None))

    def step(cache, leaves, tokens_BT, positions_BT):
        model = nnx.merge(graphdef, jax.tree.unflatten(tree, leaves))
        if tokens > 1:
            # Nobody uses the logits of a prompt, so none are computed.
            return model.forward(tokens_BT, positions_BT, cache)[1]
        logits, cache = model.forward(tokens_BT, positions_BT, cache)
        return logits.argmax(-1), cache

    return compile_for(mesh, step, cache, leaves, rows, rows, donate_argnums=0)
