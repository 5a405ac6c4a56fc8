"""Our model one block at a time: in memory already, or read from its checkpoint block by block.

Knows nothing of references.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gpt_oss_jax.checkpoint.experts import Source, model_kind, with_experts
from gpt_oss_jax.checkpoint.loading import shuffle, shuffles
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import Config
from gpt_oss_jax.model.attention import Context
from gpt_oss_jax.model.layers import Embedding, Linear, RMSNorm
from gpt_oss_jax.model.rope import cos_sin
from gpt_oss_jax.model.tap import Tap
from gpt_oss_jax.model.transformer import Block
from gpt_oss_jax.parity.ops import LAYER, Op, sizes, stages


class Streamed:
    """A model whose parts are read when they are used; what the caller drops is free again.

    Attributes:
      config: Its sizes.
      dtype: Of parameters and activations.
      implementation: Name of the kernels to use, None for the fastest that can.
      mesh: None: each part is on one device.
      layers: The blocks, read on access.
    """

    def __init__(
        self,
        source: Source,
        dtype=jnp.float32,
        implementation: str | None = None,
        step: Callable[[int], None] = lambda nbytes: None,
    ):
        """Opens nothing yet; `step` hears how many bytes of the checkpoint each part took."""
        kind = model_kind(source)
        self._source, self._experts = with_experts(source, kind), kind
        self._step = step
        self.config, self.dtype = source.config, jnp.dtype(dtype)
        self.implementation = implementation
        self.mesh = None
        self.layers = _Layers(self)

    @property
    def embedding(self) -> Embedding:
        """The embedding."""
        V, D = self.config.vocab_size, self.config.hidden_size
        return self._read("embedding", lambda rngs: Embedding(V, D, rngs=rngs, dtype=self.dtype))

    @property
    def norm(self) -> RMSNorm:
        """The final normalisation."""
        D, epsilon = self.config.hidden_size, self.config.rms_norm_eps
        return self._read("norm", lambda rngs: RMSNorm(D, epsilon, rngs=rngs, dtype=self.dtype))

    @property
    def unembedding(self) -> Linear:
        """The unembedding."""
        V, D = self.config.vocab_size, self.config.hidden_size
        make = lambda rngs: Linear(
            (V,), (D,), ("vocab", "embed"), bias=False, rngs=rngs, dtype=self.dtype
        )
        return self._read("unembedding", make)

    def _block(self, layer: int) -> Block:
        make = lambda rngs: Block(
            self.config, layer, rngs=rngs, dtype=self.dtype, experts=self._experts
        )
        block = self._read(f"layers/{layer}", make)
        if shuffles(self._experts, None, self.dtype, self.implementation):
            for projection in (block.mlp.up, block.mlp.down):
                blocks, projection.shuffled = projection.blocks, True
                projection.blocks = blocks.replace(shuffle(None)(blocks[...]))
        return block

    def _read(self, prefix: str, make: Callable[[nnx.Rngs], nnx.Module]):
        graphdef, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
        flat = nnx.to_flat_state(state)
        paths = ["/".join((prefix, *map(str, path))) for path, _ in flat]
        requests = [
            Request(path, np.dtype(variable.dtype))
            for path, (_, variable) in zip(paths, flat, strict=True)
        ]
        read = []
        for (path, variable), array in zip(flat, self._source.stream(requests), strict=True):
            # Waited for: until then the memory it was read into is in use.
            read.append((path, variable.replace(jax.block_until_ready(jax.device_put(array)))))
        self._step(sum(self._source.variables[path].nbytes for path in paths))
        return nnx.merge(graphdef, nnx.from_flat_state(read))


class _Layers(Sequence):
    def __init__(self, model: Streamed):
        self._model = model

    def __len__(self) -> int:
        return self._model.config.num_hidden_layers

    def __getitem__(self, layer: int) -> Block:
        return self._model._block(layer)


@dataclasses.dataclass(frozen=True)
class Stage:
    """The embedding, a block or the end of a model, its weights in memory.

    Attributes:
      prefix: Of the names of its values, "layers.3." say.
      ops: What it computes.
      modules: What it computes that with.
      run: From tokens int32 [T] or the residual stream [1, T, D], and patches, values by name.
    """

    prefix: str
    ops: tuple[Op, ...]
    modules: Mapping[str, nnx.Module]
    run: Callable[..., dict[str, jax.Array]]


def open_stages(model) -> Iterator[Stage]:
    """The stages of a `Transformer` or of a `Streamed` one; hold one at a time."""
    # The model as far as it need not be read.
    lean = {x: getattr(model, x) for x in ("config", "implementation", "mesh")}
    first, *layers, last = stages(model.config)
    embedding = model.embedding
    yield Stage(*first, {"embedding": embedding}, functools.partial(_run_embedding, embedding))
    del embedding
    for i, (prefix, ops) in enumerate(layers):
        block = _unnumbered(model.layers[i])
        yield Stage(prefix, ops, {"block": block}, functools.partial(_run_block, block, **lean))
        del block
    norm, unembedding = model.norm, model.unembedding
    yield Stage(*last, {"norm": norm}, functools.partial(_run_end, norm, unembedding))


def _unnumbered(block: Block) -> Block:
    """The block as if it were the first: blocks that differ in their number only compile once."""
    block = nnx.merge(*nnx.split(block))
    block.layer = block.attention.layer = block.mlp.layer = 0
    return block


def _run_embedding(embedding, tokens_T, patch, capture):
    return {"embedding": _apply(embedding, tokens_T[None])}


def _run_block(block, x_BTD, patch, capture, **lean):
    wanted = tuple(f"layers.0.{name}" for name in capture)
    patch = {f"layers.0.{name}": value for name, value in patch.items()}
    seen = _block_values(block, x_BTD, patch, wanted=wanted, **lean)
    return {name.removeprefix("layers.0."): value for name, value in seen.items()}


@functools.partial(jax.jit, static_argnames=("wanted", "config", "implementation", "mesh"))
def _block_values(block, x_BTD, patch, *, wanted, config, implementation, mesh):
    tap = Tap(wanted, patch)
    positions_BT = jnp.arange(x_BTD.shape[1], dtype=jnp.int32)[None]
    cos_BTh, sin_BTh = cos_sin(positions_BT, config, x_BTD.dtype)
    block(x_BTD, Context(positions_BT, cos_BTh, sin_BTh, None, tap, implementation, mesh))
    tap.check()
    return tap.captured


def _run_end(norm, unembedding, x_BTD, patch, capture):
    normed_BTD = _apply(norm, x_BTD)
    given_BTD = patch.get("final_norm", normed_BTD)
    return {
        "final_norm": normed_BTD,
        "logits": _apply(unembedding, given_BTD.astype(normed_BTD.dtype)),
    }


@jax.jit
def _apply(module, x):
    return module(x)


def values(model, tokens_T: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    """Everything our model computes but attention scores, by stage and by name: a reference.

    Args:
      model: A `Transformer`, or a `Streamed` one.
      tokens_T: Ids.
    """
    x = jnp.asarray(tokens_T, jnp.int32)
    capture = tuple(op.name for op in LAYER if op.name != "attention.scores")
    for stage in open_stages(model):
        seen = stage.run(x, {}, capture)
        x = seen.get("output", seen.get("embedding"))
        ops = {op.name: op for op in stage.ops}
        yield {stage.prefix + name: flat(value, ops[name]) for name, value in seen.items()}


def flat(value, op: Op) -> np.ndarray:
    """One of our values as [T, features], on the host; float32 unless it holds ids."""
    value = np.asarray(value)[0]
    if op.axes.endswith("S"):
        value = np.moveaxis(value, -2, 0)
    if op.name != "mlp.experts":
        value = value.astype(np.float32)
    return value.reshape(len(value), -1)


def unflat(value_TF: np.ndarray, op: Op, config: Config) -> jax.Array:
    """The reverse of `flat`, for patches."""
    length = len(value_TF)
    return jnp.asarray(value_TF.reshape(1, length, *sizes(op, config, length)))
