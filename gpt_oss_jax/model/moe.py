"""The mixture of experts: a router and the experts it sends each token to."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from gpt_oss_jax.config import Config
from gpt_oss_jax.kernels import choose, expert_mlp
from gpt_oss_jax.kernels.expert_matmul.weights import ExpertWeights
from gpt_oss_jax.model.attention import Context
from gpt_oss_jax.model.layers import Linear, Packed, normal
from gpt_oss_jax.quant import MXArray, quantize
from gpt_oss_jax.sharding import named_sharding

EXPERT_FORMATS = ("mxfp4", "dense")
# Of MXFP4, for the kernels for TPU.
EXPERT_FORMS = {"packed": MXArray.in_words, "folded": MXArray.folded}


class Projection(nnx.Module):
    """One matrix and bias for each expert; the matrix MXFP4 (two variables) or dense (one)."""

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        rngs: nnx.Rngs,
        dtype,
        experts: str,
    ):
        self.words_of: tuple[int, ...] | None = None
        self.native = self.shuffled = False
        weight = normal(rngs, shape, shape[-1] ** -0.5, dtype)
        self.bias = nnx.Param(normal(rngs, shape[:-1], 0.1, dtype), axes=axes[:-1])
        if experts == "dense":
            self.weight = nnx.Param(weight, axes=axes)
        else:
            blocks, scales = jax.jit(quantize)(weight)
            # Blocks shard where the packed axis would, whole blocks at a time.
            packed = (*axes[:-1], {"expert_width": "expert_width_blocks"}.get(axes[-1], axes[-1]))
            self.blocks = Packed(blocks, axes=(*packed, None))
            self.scales = Packed(scales, axes=packed)

    @property
    def matrix(self) -> MXArray | jax.Array:
        """The matrix, [E, ..., in], as the kernels take it."""
        if hasattr(self, "weight"):
            return self.weight[...]
        factors = self.factors[...] if hasattr(self, "factors") else None
        how = {"native": self.native, "shuffled": self.shuffled}
        return MXArray(self.blocks[...], self.scales[...], self.words_of, factors, **how)

    def folds(self) -> bool:
        """Whether `use_words` could fold an MXFP4 matrix exactly."""
        return bool(folds(self.matrix))

    def use_words(
        self, mesh: Mesh | None = None, form: str = "packed", native: bool = False
    ) -> None:
        """Puts an MXFP4 matrix into the order that kernels for TPU want, once, where it lies.

        Args:
          mesh: Where it lies.
          form: "packed", 4.25 bits a weight; "folded", 8.25 bits, only if it `folds`.
          native: The TPU `knows_fp4`, which packed ones then are.
        """
        words = in_words(mesh, self.matrix.shape[0], form, native)(self.matrix)
        self.words_of, self.native = self.matrix.shape, words.native
        self.shuffled = False
        axes = ("experts", None, None, None)
        self.blocks, self.scales = Packed(words.blocks, axes=axes), Packed(words.scales, axes=axes)
        if words.factors is not None:
            self.factors = Packed(words.factors, axes=("experts",))


folds = jax.jit(MXArray.folds)


@functools.cache
def in_words(
    mesh: Mesh | None, experts: int, form: str, native: bool
) -> Callable[[MXArray], MXArray]:
    """What `Projection.use_words` runs, jitted once for all layers.

    Each device has its own experts, and none is moved.
    """
    make = EXPERT_FORMS[form]
    if form == "packed":
        make = functools.partial(make, native=native)
    if mesh is None:
        return jax.jit(make)
    spec = named_sharding(mesh, ("experts",), (experts,)).spec
    run = jax.shard_map(make, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    return jax.jit(run)


def can_use_words(config: Config, mesh: Mesh | AbstractMesh | None) -> bool:
    """Whether experts can be in the order of TPU kernels: each has to be whole on its device."""
    if mesh is None:
        return True
    width = (config.intermediate_size,)
    return named_sharding(mesh, ("expert_width",), width).shard_shape(width) == width


class MoE(nnx.Module):
    """Routed SwiGLU experts."""

    def __init__(self, config: Config, layer: int, *, rngs: nnx.Rngs, dtype, experts: str):
        self.layer = layer
        self.experts_per_token = config.experts_per_token
        self.limit = config.swiglu_limit
        E, D, F = config.num_experts, config.hidden_size, config.intermediate_size
        self.router = Linear((E,), (D,), (None, "embed"), rngs=rngs, dtype=dtype)
        kind = {"rngs": rngs, "dtype": dtype, "experts": experts}
        self.up = Projection((E, F, 2, D), ("experts", "expert_width", None, "embed"), **kind)
        self.down = Projection((E, D, F), ("experts", "embed", "expert_width"), **kind)

    def use_words(
        self, mesh: Mesh | None = None, form: str = "packed", native: bool = False
    ) -> list[str]:
        """Like `Projection.use_words`; what does not fold stays packed.

        Returns:
          Names of the matrices that do not fold.
        """
        not_folded = []
        for name, projection in (("up", self.up), ("down", self.down)):
            own = form
            if form == "folded" and not projection.folds():
                own = "packed"
                not_folded.append(f"layers.{self.layer}.mlp.{name}")
            projection.use_words(mesh, own, native)
        return not_folded

    @property
    def weights(self) -> ExpertWeights:
        """Those of all experts, as the kernels take them."""
        up, down = self.up, self.down
        return ExpertWeights(up.matrix, up.bias[...], down.matrix, down.bias[...])

    def __call__(self, x_BTD: jax.Array, context: Context, residual_BTD: jax.Array) -> jax.Array:
        """The residual stream plus the output of the mixture for x, [B, T, D].

        Where the output alone is asked for, or devices share it, it is rounded by itself first.
        """
        tap, name = context.tap, f"layers.{self.layer}.mlp"
        logits_BTE = tap(f"{name}.router_logits", self.router(x_BTD))
        where = {"implementation": context.implementation, "mesh": context.mesh}
        experts_BTX, weights_BTX = choose(logits_BTE, self.experts_per_token, **where)
        experts_BTX = tap(f"{name}.experts", experts_BTX)
        weights_BTX = tap(f"{name}.expert_weights", weights_BTX)
        run = functools.partial(self.through, x_BTD, experts_BTX, weights_BTX, context)
        if tap.idle and context.mesh is None:
            return run(residual=residual_BTD)
        return residual_BTD + tap(f"{name}.out", run())

    def through(
        self,
        x_BTD: jax.Array,
        experts_BTX: jax.Array,
        weights_BTX: jax.Array,
        context: Context,
        **more: jax.Array | None,
    ) -> jax.Array:
        """The weighted sum of these experts' outputs, [B, T, D]; `more` as in `expert_mlp`."""
        return expert_mlp(
            x_BTD,
            experts_BTX,
            weights_BTX,
            self.weights,
            limit=self.limit,
            implementation=context.implementation,
            mesh=context.mesh,
            **more,
        )
