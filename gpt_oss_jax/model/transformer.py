"""The transformer: blocks between an embedding and an unembedding.

Knows nothing of files, tokenizers or sampling. Follows the gpt-oss model card (arXiv:2508.10925)
and the PyTorch reference.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from gpt_oss_jax.config import Config
from gpt_oss_jax.kernels import IMPLEMENTATIONS, sharded
from gpt_oss_jax.kernels.dense import mosaic_gpu as dense
from gpt_oss_jax.kernels.dispatch import say_once
from gpt_oss_jax.kernels.expert_matmul.mosaic_gpu import room_of
from gpt_oss_jax.kernels.target import why_not_hopper
from gpt_oss_jax.model.attention import Attention, Context
from gpt_oss_jax.model.cache import Cache, full_slots, ring_slots, write
from gpt_oss_jax.model.layers import Embedding, Linear, RMSNorm, placed
from gpt_oss_jax.model.moe import EXPERT_FORMATS, MoE
from gpt_oss_jax.model.rope import cos_sin
from gpt_oss_jax.model.tap import Tap
from gpt_oss_jax.sharding import named_sharding, spelled


class Block(nnx.Module):
    """Attention and experts, each normalised before and added to the residual stream."""

    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs, dtype, experts: str):
        self.layer = layer
        D, epsilon = config.hidden_size, config.rms_norm_eps
        self.attention_norm = RMSNorm(D, epsilon, rngs=rngs, dtype=dtype)
        self.attention = Attention(config, layer, rngs=rngs, dtype=dtype)
        self.mlp_norm = RMSNorm(D, epsilon, rngs=rngs, dtype=dtype)
        self.mlp = MoE(config, layer, rngs=rngs, dtype=dtype, experts=experts)

    def __call__(
        self, x_BTD: jax.Array, context: Context
    ) -> tuple[jax.Array, jax.Array | None, jax.Array | None]:
        """Returns the residual stream after the block, and its new keys and values."""
        tap, name = context.tap, f"layers.{self.layer}"
        x_BTD = tap(f"{name}.input", x_BTD)
        if context.few_launches:
            x_BTD, k_new, v_new = self._attend_in_few_launches(x_BTD, context)
        else:
            h_BTD = tap(f"{name}.attention_norm", self.attention_norm(x_BTD))
            attended_BTD, k_new, v_new = self.attention(h_BTD, context)
            x_BTD = tap(f"{name}.middle", x_BTD + attended_BTD)
        if context.one_router:
            return self._experts_in_few_launches(x_BTD, context), k_new, v_new
        h_BTD = tap(f"{name}.mlp_norm", self.mlp_norm(x_BTD))
        return tap(f"{name}.output", self.mlp(h_BTD, context, x_BTD)), k_new, v_new

    def _attend_in_few_launches(self, x_BTD, context: Context):
        own = self.attention_norm, self.attention
        if context.mesh is None:
            return _attended(*own, x_BTD, context)
        cache, layer = context.cache, self.layer
        kept = cache.k[layer], cache.v[layer]
        where = {n: getattr(context, n) for n in ("positions_BT", "cos_BTh", "sin_BTh")}
        kept_where = {n: getattr(cache, n) for n in ("full_positions", "ring_positions")}

        def of_own_heads(own, kept, x_BTD, shared, over):
            where, kept_where = shared
            k, v = ((None,) * layer + (x,) for x in kept)
            here = dataclasses.replace(cache, k=k, v=v, **kept_where)
            here = dataclasses.replace(context, mesh=None, cache=here, **where)
            return _attended(*own, x_BTD, here, over=over)

        shared = where, kept_where
        return sharded.by_heads(context.mesh, of_own_heads, own, kept, x_BTD, shared)

    def _experts_in_few_launches(self, x_BTD, context: Context):
        mlp, x_MD, mesh = self.mlp, x_BTD.reshape(-1, x_BTD.shape[-1]), context.mesh
        alone = mesh is None
        route = functools.partial(
            dense.route,
            epsilon=self.mlp_norm.epsilon,
            choices=mlp.experts_per_token,
            room=room_of(len(x_MD), mlp.experts_per_token, mlp.weights) if alone else 0,
            early=context.early,
        )
        run = route if alone else sharded.on_all(mesh, route)
        h_MD, experts_MX, weights_MX, room = run(
            x_MD, self.mlp_norm.scale[...], mlp.router.matrix, mlp.router.bias[...]
        )
        apart = lambda x: x.reshape(*x_BTD.shape[:2], *x.shape[1:])
        chosen = apart(h_MD), apart(experts_MX), apart(weights_MX)
        if alone:
            return mlp.through(*chosen, context, room=room, residual=x_BTD)
        return x_BTD + mlp.through(*chosen, context)


def _attended(norm: RMSNorm, attention: Attention, x_BTD, context: Context, over=()):
    """The residual stream after attention, in three launches, and its new keys and values.

    Of a device's own heads: what they give is summed over the mesh axes `over`.
    """
    rows = lambda x: x.reshape(-1, *x.shape[2:])
    apart = lambda x: x.reshape(*x_BTD.shape[:2], *x.shape[1:])
    q_MKGH, k_MKH, v_MKH, room = dense.queries_keys_values(
        rows(x_BTD),
        norm.scale[...],
        attention.qkv.matrix,
        attention.qkv.bias[...].reshape(-1),
        rows(context.cos_BTh),
        rows(context.sin_BTh),
        epsilon=norm.epsilon,
        group=attention.qkv.out_shape[1] - 2,
        room=attention.room_of(x_BTD.shape[:2], context.cache),
        early=context.early,
    )
    new = apart(q_MKGH), apart(k_MKH), apart(v_MKH)
    heads_BTKGH, k_new, v_new = attention.attend(*new, context, room=room)
    x_MD, heads_MI = rows(x_BTD), heads_BTKGH.reshape(x_BTD.shape[0] * x_BTD.shape[1], -1)
    out, early = attention.out, context.early
    if over:
        y_MD = jax.lax.psum(dense.part_of_product(heads_MI, out.matrix, early=early), over)
        x_MD += (y_MD + out.bias[...].astype(jnp.float32)).astype(x_MD.dtype)
    else:
        x_MD = dense.add_product(heads_MI, out.matrix, out.bias[...], x_MD, early=early)
    return apart(x_MD), k_new, v_new


class Transformer(nnx.Module):
    """A gpt-oss model.

    Example:
      ```python
      model = Transformer(config, rngs=nnx.Rngs(0))
      logits = jax.jit(lambda m, t: m(t))(model, tokens)   # Pass the model, never close over it.
      ```

    Attributes:
      config: Its sizes.
      implementation: Name of the kernels to use, None for the fastest that can.
      mesh: Devices that the weights are spread over, None for one. Whoever moves them by hand says
        so here.
      weights_at_rest: Whether no program that runs the model also writes its weights, which kernels
        may then read early; `generate` says so of its programs.
    """

    def __init__(
        self,
        config: Config,
        *,
        rngs: nnx.Rngs,
        dtype=jnp.float32,
        experts: str = "mxfp4",
        implementation: str | None = None,
        mesh: Mesh | None = None,
    ):
        """Makes a model with random weights.

        Args:
          config: Sizes.
          rngs: Random numbers of the weights, stream "params".
          dtype: Of parameters, activations and cache; float32 means float32 arithmetic too.
          experts: "mxfp4" holds expert weights in 4.25 bits, "dense" in `dtype`, to train them.
          implementation: Name of the kernels to use, None for the fastest that can.
          mesh: Devices that the weights will be spread over, by `named_sharding` of their axes;
            kernels then run on what each device has. None: one device.

        Raises:
          ValueError: If `experts` or `implementation` is none of those.
        """
        if experts not in EXPERT_FORMATS:
            raise ValueError(f"experts must be one of {EXPERT_FORMATS}, got {experts!r}.")
        if implementation is not None and implementation not in IMPLEMENTATIONS:
            raise ValueError(
                f"implementation must be None or one of {', '.join(IMPLEMENTATIONS)}, got "
                f"{implementation!r}."
            )
        self.config = config
        self.implementation = implementation
        self.mesh = mesh
        self.weights_at_rest = False
        V, D = config.vocab_size, config.hidden_size
        self.embedding = Embedding(V, D, rngs=rngs, dtype=dtype)
        self.layers = nnx.List(
            Block(config, i, rngs=rngs, dtype=dtype, experts=experts)
            for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(D, config.rms_norm_eps, rngs=rngs, dtype=dtype)
        self.unembedding = Linear(
            (V,), (D,), ("vocab", "embed"), bias=False, rngs=rngs, dtype=dtype
        )

    @property
    def dtype(self):
        """Of parameters, activations and cache."""
        return self.embedding.weight.dtype

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Logits of every position: int32 [B, T] -> float32 [B, T, V]."""
        return self.forward(tokens_BT)[0]

    def forward(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        cache: Cache | None = None,
        logits_at: jax.Array | None = None,
        *,
        capture: Sequence[str] = (),
        patch: Mapping[str, jax.Array] | None = None,
    ):
        """One pass over new tokens, after what the cache holds.

        Args:
          tokens_BT: int32 token ids, under `config.vocab_size`; larger ones are clamped by JAX.
          positions_BT: int32 positions, contiguous within a row; -1 is padding, which writes
            nothing and whose logits mean nothing. None, without a cache: every row starts at 0.
          cache: Keys and values of earlier tokens (`init_cache`); None: there are none, and none
            are kept. Positions from `cache.max_len` on are not kept by full-attention layers.
          logits_at: int32 [B], the index along T to compute logits at, under T (a larger one gives
            NaN); None: everywhere.
          capture: Names of values to return, or patterns: "layers.*.mlp.router_logits". Attention
            scores are computed by XLA for this, whatever kernel the layer runs on.
          patch: Values to use instead, by name, of the same shape. What is captured under a patched
            name is what was computed.

        Returns:
          float32 logits, [B, T, V] or [B, V] with `logits_at`; the new cache, None without one;
          and, if anything is captured, a dict of the captured values.

        Raises:
          ValueError: If shapes disagree, or a captured or patched name does not exist.
          NotImplementedError: If the named implementation cannot run this model here.
        """
        positions_BT = self._checked_positions(tokens_BT, positions_BT, cache, logits_at)
        tap = Tap(capture, patch)
        cos_BTh, sin_BTh = cos_sin(positions_BT, self.config, self.dtype)
        few = cache is not None and tokens_BT.size <= dense.MAX_ROUTED
        launches = few and tap.idle and self._can_launch()
        context = Context(
            positions_BT,
            cos_BTh,
            sin_BTh,
            cache,
            tap,
            self.implementation,
            self.mesh,
            few_launches=launches and tokens_BT.size <= dense.MAX_ROWS,
            one_router=launches,
            # Over a mesh a program may gather weights first.
            early=self.weights_at_rest and self.mesh is None,
        )

        # Few rows move, where the table would be gathered whole.
        embedding = placed(self.embedding, self.mesh, in_use=False)
        gathered = functools.partial(placed, mesh=self.mesh, in_use=True)
        x_BTD = tap("embedding", embedding(tokens_BT, self.mesh))
        x_BTD = self._split(x_BTD)
        keys, values = [], []
        for layer in self.layers:
            x_BTD, k_new, v_new = gathered(layer)(x_BTD, context)
            keys.append(k_new)
            values.append(v_new)
        if logits_at is not None:
            x_BTD = jnp.take_along_axis(x_BTD, logits_at[:, None, None], axis=1)[:, 0]
        norm, unembedding = (gathered(x) for x in (self.norm, self.unembedding))
        logits = tap("logits", unembedding(tap("final_norm", norm(x_BTD))))
        tap.check()

        if cache is not None:
            cache = _updated(cache, keys, values, positions_BT)
        return (logits, cache, tap.captured) if tap.captures else (logits, cache)

    def _split(self, x_BTD: jax.Array) -> jax.Array:
        """Rows, then tokens, split over the mesh: XLA does not see how to do both at once."""
        for axes in ("batch", None, None), ("batch", "tokens", None):
            if self.mesh is not None:
                where = named_sharding(self.mesh, axes, x_BTD.shape)
                x_BTD = jax.lax.with_sharding_constraint(x_BTD, where)
        return x_BTD

    def _can_launch(self) -> bool:
        """Whether blocks can run as the kernels of `kernels.dense`; on Hopper, why not is logged.

        Raises:
          NotImplementedError: If kernels for Hopper are named, and not these sizes or weights.
        """
        # Elsewhere attention and experts say why, or raise.
        if self.implementation not in (None, "mosaic_gpu") or why_not_hopper():
            return False
        if self.mesh is not None and not sharded.rows_are_whole(self.mesh):
            reason = f"rows, slots or weights are split over the mesh {spelled(self.mesh.shape)}"
        else:
            reason = self._why_no_launches()
        # On a mesh, which may be the reason, the named kernels still run attention and experts.
        if reason and self.implementation is not None and self.mesh is None:
            raise NotImplementedError(
                f"mosaic_gpu, for what is around attention and experts, {reason}; "
                "implementation=None runs it on xla"
            )
        if reason:
            say_once(f"what is around attention and experts runs on xla (mosaic_gpu: {reason})")
        return not reason

    def _why_no_launches(self) -> str:
        """What of sizes and weights the kernels of `kernels.dense` do not cover; "" for nothing."""
        config = self.config
        own = sharded.own_heads(self.mesh, config.num_key_value_heads)
        widths = config.hidden_size, own * config.group_size * config.head_dim
        if reason := dense.why_not(widths, config.head_dim, config.num_experts, self.dtype):
            return reason
        parts = operator.attrgetter(
            "attention_norm", "attention.qkv", "attention.out", "mlp_norm", "mlp.router"
        )
        weights = jax.tree.leaves([nnx.state(part) for b in self.layers for part in parts(b)])
        others = {str(x.dtype) for x in weights if x.dtype != self.dtype}
        return f"takes {self.dtype}, got weights of {', '.join(sorted(others))}" if others else ""

    def _checked_positions(self, tokens_BT, positions_BT, cache, logits_at) -> jax.Array:
        """The positions, after a look at everything whose mistakes JAX would not show."""
        shape, dtype = jnp.shape(tokens_BT), getattr(tokens_BT, "dtype", None)
        if dtype is None or not jnp.issubdtype(dtype, jnp.integer):
            got = dtype or type(tokens_BT).__name__
            raise ValueError(f"tokens must be an array of whole numbers [B, T], got {got}.")
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"tokens must have shape [B, T], both at least 1, got {shape}.")
        B, T = tokens_BT.shape
        if cache is not None and positions_BT is None:
            raise ValueError("positions must be given with a cache: where do these tokens go?")
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
        if positions_BT.shape != (B, T):
            raise ValueError(f"positions must have shape {(B, T)}, got {positions_BT.shape}.")
        if logits_at is not None and logits_at.shape != (B,):
            raise ValueError(f"logits_at must have shape {(B,)}, got {logits_at.shape}.")
        if cache is not None and (cache.k[0].shape[0], cache.k[0].dtype) != (B, self.dtype):
            raise ValueError(
                f"the cache must have {B} rows of {self.dtype}, got {cache.k[0].shape[0]} of "
                f"{cache.k[0].dtype}."
            )
        return positions_BT


def _updated(cache: Cache, keys, values, positions_BT: jax.Array) -> Cache:
    full_BT = full_slots(positions_BT, cache.full_positions.shape[1])
    ring_BT = ring_slots(positions_BT, cache.ring_positions.shape[1])
    return dataclasses.replace(
        cache,
        k=tuple(keys),
        v=tuple(values),
        full_positions=write(cache.full_positions, full_BT, positions_BT),
        ring_positions=write(cache.ring_positions, ring_BT, positions_BT),
    )
