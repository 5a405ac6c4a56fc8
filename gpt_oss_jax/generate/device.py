"""The device's side of generation: the state, and the programs that are compiled.

Each takes the leaves of a model, split once, and its `Skeleton`.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jax.sharding import Mesh, NamedSharding

from gpt_oss_jax.config import Config
from gpt_oss_jax.kernels.dispatch import say_once
from gpt_oss_jax.kernels.target import platform
from gpt_oss_jax.model import Cache, Transformer, init_cache
from gpt_oss_jax.model.cache import cache_sharding
from gpt_oss_jax.sampling import sample
from gpt_oss_jax.sharding import named_sharding

STEPS = 16  # Tokens a row and call at most.
# What XLA puts into CUDA graphs: what it does by itself on one GPU, and loops.
_IN_GRAPHS = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,WHILE"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class DecodeState:
    """All that the decode loop changes. Donated to every call, which returns the next one.

    Attributes:
      cache: Holds each row's tokens before its newest.
      keys_B: Typed PRNG key of each row; the position of the token to draw is folded into it.
      token_B: int32 newest token of each row, not in the cache yet.
      position_B: int32 position of that token.
      last_B: int32 last position that the row may fill.
      done_B: bool, true where the row has ended or pads the batch: it changes no more.
    """

    cache: Cache
    keys_B: jax.Array
    token_B: jax.Array
    position_B: jax.Array
    last_B: jax.Array
    done_B: jax.Array


@dataclasses.dataclass(frozen=True, eq=False)
class Skeleton:
    """A model without its weights.

    Goes into every call as a static argument, so it is compared by identity, and `split` makes one
    for each structure: to compare those of 24 layers takes a millisecond.

    Attributes:
      treedef: Structure of the modules and their variables.
      config: Sizes.
      dtype: Of activations and cache.
      mesh: Where the weights lie, None for one device.
    """

    treedef: jax.tree_util.PyTreeDef
    config: Config
    dtype: jnp.dtype
    mesh: Mesh | None

    def model(self, leaves: tuple[jax.Array, ...]) -> Transformer:
        """The model with these weights."""
        model = jax.tree.unflatten(self.treedef, leaves)
        # They are arguments of the program: nothing in it writes them.
        model.weights_at_rest = True
        return model

    def placed(self, tree):
        """Splits state over the mesh; left alone, XLA would keep all rows on every device."""
        if self.mesh is None:
            return tree

        kv_heads = self.config.num_key_value_heads
        where = jax.tree.map(lambda x: cache_sharding(self.mesh, x, kv_heads), tree)
        return lax.with_sharding_constraint(tree, where)

    def whole(self, tree):
        """What the host reads, whole on every device: a process sees its own devices only."""
        if self.mesh is None:
            return tree
        return lax.with_sharding_constraint(tree, named_sharding(self.mesh, ()))


_skeleton = functools.cache(Skeleton)


@dataclasses.dataclass(frozen=True)
class _Known:
    """What `split` found of a model, whose metadata nobody may change in place.

    Attributes:
      variables: In the order of the leaves: the attributes of a module, the name there, and `id`
        of the variable, which itself would be kept alive.
      others: What else modules have: their attributes, the name there, and the value.
      sizes: The attributes of each module, and how many.
      skeleton: Of the model.
    """

    variables: list[tuple[dict, str, int]]
    others: list[tuple[dict, str, Any]]
    sizes: list[tuple[dict, int]]
    skeleton: Skeleton

    def is_still_so(self) -> bool:
        """Whether no attribute was replaced, added or taken away."""
        return (
            all(id(have.get(name)) == number for have, name, number in self.variables)
            and all(have.get(name) is value for have, name, value in self.others)
            and all(len(have) == size for have, size in self.sizes)
        )


_known: weakref.WeakKeyDictionary[Transformer, _Known] = weakref.WeakKeyDictionary()


def split(model: Transformer) -> tuple[Skeleton, tuple[jax.Array, ...]]:
    """A model's structure and its weights; models of one structure share the skeleton object."""
    # An accelerator waits meanwhile: JAX takes 2 to 3 ms to flatten 24 layers, and to find that
    # they are those of the time before; `nnx.split` takes 10 to 20.
    known = _known.pop(model, None)  # Of what was replaced it keeps nothing any longer.
    if known is not None and known.is_still_so():
        leaves = tuple(have[name].get_raw_value() for have, name, _ in known.variables)
        if (known.skeleton.dtype, known.skeleton.mesh) == _placed(model, leaves):
            _known[model] = known
            return known.skeleton, leaves
    leaves, treedef = jax.tree.flatten(model)
    skeleton = _skeleton(treedef, model.config, *_placed(model, leaves))
    variables, others, owners = {}, [], list(_owners(model))
    for have in owners:
        for name, value in have.items():
            if isinstance(value, nnx.Variable):
                variables[id(value.get_raw_value())] = have, name, id(value)
            elif not name.startswith("_pytree__"):  # Flax's own.
                others.append((have, name, value))
    # Each is a leaf. There are more of those where two have one array, as it would not be known
    # which is which once one has another, and where arrays are elsewhere than in modules.
    if len(variables) == len(leaves):
        in_order = [variables[id(x)] for x in leaves]
        sizes = [(have, len(have)) for have in owners]
        _known[model] = _Known(in_order, others, sizes, skeleton)
    return skeleton, tuple(leaves)


def _owners(module: nnx.Module) -> Iterator[dict[str, Any]]:
    """The attributes of a module and of all inside it."""
    have = vars(module)
    yield have
    for value in have.values():
        if isinstance(value, nnx.Module):
            yield from _owners(value)


def _placed(model: Transformer, leaves) -> tuple[jnp.dtype, Mesh | None]:
    """Type of the activations, and the mesh that the first leaf is on."""
    sharding = leaves[0].sharding
    mesh = sharding.mesh if isinstance(sharding, NamedSharding) else None
    return jnp.dtype(model.dtype), mesh


def memory(leaves: tuple[jax.Array, ...]) -> int:
    """Bytes that JAX can have of a device of the weights; 0 if it does not say."""
    device = min(leaves[0].sharding.addressable_devices, key=lambda d: d.id)
    return (device.memory_stats() or {}).get("bytes_limit", 0)


# A cache is bound to a device if a weight is, as `prefill` returns it: otherwise a prompt's first
# chunk and its second would be two programs. Unused arguments bind nothing. One weight is enough,
# and all would take a millisecond, for which an accelerator waits.
@functools.partial(jax.jit, static_argnums=(1, 2, 3), keep_unused=True)
def empty_cache(leaf, skeleton, rows, slots):
    """An empty cache, where a weight is."""
    return skeleton.placed(init_cache(skeleton.config, rows, slots, skeleton.dtype))


@functools.partial(jax.jit, static_argnums=4, donate_argnums=1)
def prefill(leaves, cache, tokens_BT, positions_BT, skeleton):
    """The cache after a chunk of prompt. Nobody uses the logits, so none are computed."""
    _, cache = skeleton.model(leaves).forward(tokens_BT, positions_BT, cache)
    return skeleton.placed(cache)


@functools.partial(jax.jit, static_argnums=5, donate_argnums=1)
def score_chunk(leaves, cache, tokens_BT, positions_BT, next_BT, skeleton):
    """Log-probabilities [B, T] of the tokens after those of a chunk, and the cache after it."""
    logits_BTV, cache = skeleton.model(leaves).forward(tokens_BT, positions_BT, cache)
    chosen_BT = jnp.take_along_axis(logits_BTV, next_BT[..., None], axis=-1)[..., 0]
    logprobs_BT = chosen_BT - jax.nn.logsumexp(logits_BTV, axis=-1)
    return skeleton.whole(logprobs_BT), skeleton.placed(cache)


@functools.partial(jax.jit, static_argnums=2)
def copied(cache, rows_B, skeleton):
    """A cache of these rows, each as often as it is named."""
    return skeleton.placed(jax.tree.map(lambda x: x[rows_B], cache))


@functools.partial(jax.jit, static_argnums=6, donate_argnums=0)
def begin(cache, seeds_B, samples_B, token_B, position_B, last_B, skeleton):
    """The state before the first token, with a key for each seed and number of the sample."""

    def row_key(seed, i):
        # Threefry whatever the user's default is: rbg numbers would depend on the other rows.
        return jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), i)

    keys_B, done_B = jax.vmap(row_key)(seeds_B, samples_B), position_B >= last_B
    return skeleton.placed(DecodeState(cache, keys_B, token_B, position_B, last_B, done_B))


@functools.partial(jax.jit, static_argnums=(1, 2))
def grown(state, skeleton, slots):
    """The state with more slots for the full-attention layers; the rings stay as they are."""
    old = state.cache
    rows, ring = old.ring_positions.shape
    new = init_cache(skeleton.config, rows, slots, old.k[0].dtype, ring=ring)
    into = lambda new, old: lax.dynamic_update_slice(new, old, (0,) * old.ndim)
    return skeleton.placed(dataclasses.replace(state, cache=jax.tree.map(into, new, old)))


def spare_bytes(leaves: tuple[jax.Array, ...], memory: int) -> int:
    """Memory beside the weights and the copies of one with which XLA tries out its products.

    Where nothing is known of the memory, it is taken to be large.
    """
    sizes = [_bytes(x) for x in leaves]
    return (memory or sys.maxsize) - sum(sizes) - 2 * max(sizes)


def _bytes(x: jax.Array | jax.ShapeDtypeStruct) -> int:
    return x.size * x.dtype.itemsize


def decode(leaves, state, sampling, stops_K, steps, skeleton, *, spare: int = 0):
    """Up to `steps` tokens for every row that is not done, fewer when all are.

    Where the state takes more than the `spare_bytes`, XLA tries out nothing.

    Returns:
      The new state, and a block: tokens int32 [B, STEPS], -1 where there is none, their
      log-probabilities, and whether any row still runs.
    """
    run = decode_program(state, skeleton, spare)
    return run(leaves, state, sampling, stops_K, steps, skeleton)


def decode_program(state, skeleton: Skeleton, spare: int):
    """What `decode` calls, jitted, for the device that is there or named."""
    one_gpu = platform() == "gpu" and skeleton.mesh is None
    tight = one_gpu and sum(map(_bytes, jax.tree.leaves(state))) > spare
    return _decode_program(one_gpu, tight)


@functools.cache
def _decode_program(whole_loop_is_a_graph: bool, tight: bool):
    """`_decode`, compiled; where XLA leaves the loop to the host, 0.2 ms go by between steps."""
    options = {}
    if whole_loop_is_a_graph:
        options = {"xla_gpu_enable_command_buffer": _IN_GRAPHS, "xla_gpu_graph_min_graph_size": 1}
    if tight:
        say_once(
            "little memory is free beside the model, so XLA compiles decoding without trying out "
            "its products on the device; several rows at once may be slower for that"
        )
        options["xla_gpu_autotune_level"] = 0
    return jax.jit(_decode, static_argnums=5, donate_argnums=1, compiler_options=options or None)


def _decode(leaves, state, sampling, stops_K, steps, skeleton):
    model = skeleton.model(leaves)
    B = state.token_B.shape[0]

    def unfinished(carry):
        step, state, _, _ = carry
        return (step < steps) & ~jnp.all(state.done_B)

    def advance(carry):
        step, state, tokens_BC, logprobs_BC = carry
        done_B, next_B = state.done_B, state.position_B + 1
        logits_BV, cache = model.forward(
            state.token_B[:, None],
            jnp.where(done_B, -1, state.position_B)[:, None],
            state.cache,
            logits_at=jnp.zeros((B,), jnp.int32),
        )
        keys_B = jax.vmap(jax.random.fold_in)(state.keys_B, next_B)
        token_B, logprob_B = sample(logits_BV, keys_B, sampling)
        tokens_BC = tokens_BC.at[:, step].set(jnp.where(done_B, -1, token_B))
        logprobs_BC = logprobs_BC.at[:, step].set(logprob_B)
        stopped_B = (token_B[:, None] == stops_K).any(axis=-1) | (next_B >= state.last_B)
        state = dataclasses.replace(
            state,
            cache=cache,
            token_B=jnp.where(done_B, state.token_B, token_B),
            position_B=jnp.where(done_B, state.position_B, next_B),
            done_B=done_B | stopped_B,
        )
        return step + 1, state, tokens_BC, logprobs_BC

    tokens_BC = jnp.full((B, STEPS), -1, jnp.int32)
    carry = jnp.int32(0), state, tokens_BC, jnp.zeros((B, STEPS), jnp.float32)
    _, state, tokens_BC, logprobs_BC = lax.while_loop(unfinished, advance, carry)
    block = tokens_BC, logprobs_BC, ~jnp.all(state.done_B)
    return skeleton.placed(state), skeleton.whole(block)
