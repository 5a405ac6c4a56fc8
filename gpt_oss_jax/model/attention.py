"""The attention layer: projections, rotation, cache, and the kernel between them."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gpt_oss_jax.config import Config
from gpt_oss_jax.kernels import attention, store_and_attend
from gpt_oss_jax.kernels.attention import few_queries
from gpt_oss_jax.kernels.attention.xla import scores, write_some
from gpt_oss_jax.kernels.sharded import own_heads
from gpt_oss_jax.kernels.target import platform
from gpt_oss_jax.model.cache import Cache, full_slots, ring_slots, write
from gpt_oss_jax.model.layers import Linear, normal
from gpt_oss_jax.model.rope import apply_rope
from gpt_oss_jax.model.tap import Tap

_MANY_ROWS = 128  # Of fewer, float32 costs nothing.


@dataclasses.dataclass(frozen=True)
class Context:
    """What every layer of one forward pass shares.

    Attributes:
      positions_BT: int32, -1 for padding.
      cos_BTh: Rotations of the positions, in the activation dtype.
      sin_BTh: Likewise.
      cache: The cache as it came in, or None.
      tap: Captures and patches.
      implementation: Kernels to use, None for the fastest that can.
      mesh: Devices that the weights are spread over, None for one.
      few_launches: Whether blocks run as the few kernels of `kernels.dense`; nothing is tapped.
      one_router: Whether at least their routers do.
      early: Whether they may read weights before earlier kernels have ended.
    """

    positions_BT: jax.Array
    cos_BTh: jax.Array
    sin_BTh: jax.Array
    cache: Cache | None
    tap: Tap
    implementation: str | None
    mesh: Mesh | None
    few_launches: bool = False
    one_router: bool = False
    early: bool = False


class Attention(nnx.Module):
    """Grouped-query attention with sinks; windowed on even layers."""

    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs, dtype):
        self.layer = layer
        self.window = config.layer_window(layer)
        D, K, G, H = (
            config.hidden_size,
            config.num_key_value_heads,
            config.group_size,
            config.head_dim,
        )
        self.qkv = Linear(
            (K, G + 2, H),
            (D,),
            ("kv_heads", "heads", "head_dim", "embed"),
            rngs=rngs,
            dtype=dtype,
        )
        self.sinks = nnx.Param(normal(rngs, (K, G), 1.0, dtype), axes=("kv_heads", "heads"))
        self.out = Linear(
            (D,),
            (K, G, H),
            ("embed", "kv_heads", "heads", "head_dim"),
            rngs=rngs,
            dtype=dtype,
        )

    def __call__(
        self, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Returns the output [B, T, D] and this layer's new keys and values for the cache."""
        tap, name = context.tap, f"layers.{self.layer}.attention"
        # Not float32 for many rows, which a GPU would write and read again.
        many = platform() == "gpu" and context.positions_BT.size > _MANY_ROWS
        dtype = x_BTD.dtype if many else jnp.float32
        qkv_BTKCH = self.qkv(x_BTD, dtype=dtype).astype(x_BTD.dtype)
        q_BTKGH = tap(f"{name}.q", qkv_BTKCH[:, :, :, :-2])
        k_BTKH = tap(f"{name}.k", qkv_BTKCH[:, :, :, -2])
        v_BTKH = tap(f"{name}.v", qkv_BTKCH[:, :, :, -1])
        q_BTKGH = tap(f"{name}.q_rope", apply_rope(q_BTKGH, context.cos_BTh, context.sin_BTh))
        k_BTKH = tap(f"{name}.k_rope", apply_rope(k_BTKH, context.cos_BTh, context.sin_BTh))
        heads_BTKGH, k_new, v_new = self.attend(q_BTKGH, k_BTKH, v_BTKH, context)
        # Where devices add what their heads give, as experts are added: half the bytes of a prompt.
        split = own_heads(context.mesh, k_BTKH.shape[2]) < k_BTKH.shape[2]
        out_BTD = self.out(heads_BTKGH, dtype=x_BTD.dtype if split else dtype)
        out_BTD = tap(f"{name}.out", out_BTD.astype(x_BTD.dtype))
        return out_BTD, k_new, v_new

    def room_of(self, shape: tuple[int, int], cache: Cache) -> int:
        """Words of the room that `attend` takes on Hopper, for queries of so many rows and tokens.

        For the heads that are here, as there is no mesh.
        """
        of_queries = *shape, *self.sinks.shape, self.qkv.out_shape[-1]
        return few_queries.room_of(of_queries, cache.k[self.layer].shape[1], self.window)

    def attend(
        self,
        q_BTKGH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        context: Context,
        *,
        room: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """What heads see, [B, T, K, G, H], and this layer's new keys and values for the cache.

        With a `room` of the kernels' `store_and_attend`.
        """
        heads_BTKGH, k_new, v_new = self._attend(q_BTKGH, k_BTKH, v_BTKH, context, room)
        return context.tap(f"layers.{self.layer}.attention.heads", heads_BTKGH), k_new, v_new

    def _attend(self, q_BTKGH, k_BTKH, v_BTKH, context: Context, room):
        cache, positions_BT = context.cache, context.positions_BT
        how = {
            "q_pos_BT": positions_BT,
            "window": self.window,
            "implementation": context.implementation,
            "mesh": context.mesh,
        }
        sinks = self.sinks[...]
        if cache is None:
            self._show_scores(q_BTKGH, k_BTKH, positions_BT, context)
            heads = attention(q_BTKGH, k_BTKH, v_BTKH, sinks, **how, k_pos_BS=positions_BT)
            return heads, None, None
        k_old, v_old = cache.k[self.layer], cache.v[self.layer]
        if self.window is None:
            slots_BT = full_slots(positions_BT, k_old.shape[1])
            positions_BS = cache.full_positions
        else:
            slots_BT = ring_slots(positions_BT, k_old.shape[1])
            positions_BS = cache.ring_positions
        # The cache holds the heads of a slot side by side.
        B, T, K, H = k_BTKH.shape
        apart = lambda x: x.reshape(B, -1, K, H)
        # The first query of a chunk still needs the window before it; where a ring is too small to
        # hold that beside the chunk, it is read as it was, with the chunk after it.
        if self.window is None or self.window + T - 1 <= k_old.shape[1]:
            how |= {"k_pos_BS": write(positions_BS, slots_BT, positions_BT), "slots_BT": slots_BT}
            new = q_BTKGH, k_BTKH, v_BTKH, k_old, v_old, sinks
            heads, k_new, v_new = store_and_attend(*new, **how, room=room)
            self._show_scores(q_BTKGH, apart(k_new), how["k_pos_BS"], context)
            return heads, k_new, v_new
        k_BTL, v_BTL = k_BTKH.reshape(B, T, -1), v_BTKH.reshape(B, T, -1)
        k, v = (
            apart(jnp.concatenate([old, new.astype(old.dtype)], axis=1))
            for old, new in ((k_old, k_BTL), (v_old, v_BTL))
        )
        how["k_pos_BS"] = jnp.concatenate([positions_BS, positions_BT], axis=1)
        self._show_scores(q_BTKGH, k, how["k_pos_BS"], context)
        put = write_some if context.mesh is None and T > k_old.shape[1] else write
        k_new, v_new = put(k_old, slots_BT, k_BTL), put(v_old, slots_BT, v_BTL)
        # Before attention: XLA for GPUs would put off what all layers write to the end, and keep
        # until then what it is written from: of a chunk of 4,096 tokens half of a GB with 20b.
        q_BTKGH, k_new, v_new = jax.lax.optimization_barrier((q_BTKGH, k_new, v_new))
        return attention(q_BTKGH, k, v, sinks, **how), k_new, v_new

    def _show_scores(self, q_BTKGH, k_BSKH, k_pos_BS, context: Context):
        sees = {"q_pos_BT": context.positions_BT, "k_pos_BS": k_pos_BS, "window": self.window}
        context.tap.only_if_captured(
            f"layers.{self.layer}.attention.scores", lambda: scores(q_BTKGH, k_BSKH, **sees)
        )
