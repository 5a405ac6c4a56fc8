"""The classic mistakes of gpt-oss ports, planted in a model of ours; importable by other tests."""

import contextlib
import dataclasses
from collections.abc import Callable
from unittest import mock

import jax
import jax.numpy as jnp

from gpt_oss_jax.kernels.attention import xla as attention_xla
from gpt_oss_jax.kernels.expert_matmul import xla as mlp_xla
from gpt_oss_jax.model import layers, moe, rope
from gpt_oss_jax.parity import ours


@dataclasses.dataclass(frozen=True)
class Fault:
    """A mistake, the op that it must be found in, and words that must name it.

    Attributes:
      op: Name of the first op that it changes.
      said: Part of the sentence.
      weights: Changes a model in place.
      code: What to replace in our code: module, name, replacement.
    """

    op: str
    said: str
    weights: Callable | None = None
    code: tuple | None = None

    @contextlib.contextmanager
    def planted(self, model):
        """The model with the mistake; `model` is a copy to be changed."""
        if self.weights is not None:
            self.weights(model)
            yield model
            return
        module, name, replacement = self.code
        # What is compiled already does not know of the replacement.
        names, run = ("wanted", "config", "implementation", "mesh"), ours._block_values.__wrapped__
        afresh = jax.jit(
            lambda *args, **options: run(*args, **options),
            static_argnames=names,
            compiler_options={"xla_backend_optimization_level": 0},  # compiled for one run
        )
        with mock.patch.object(ours, "_block_values", afresh):
            with mock.patch.object(module, name, replacement):
                yield model


def _window_off_by_one(model):
    for layer in list(model.layers)[::2]:
        layer.attention.window += 1


def _windows_on_odd_layers(model):
    for i, layer in enumerate(model.layers):
        layer.attention.window = model.config.layer_window(i + 1)


def _rounded_ramp(model):
    model.config = dataclasses.replace(model.config, rope_truncate=True)


def _scaled_sinks(model):
    for layer in model.layers:
        layer.attention.sinks[...] = layer.attention.sinks[...] * model.config.head_dim**-0.5


def _swapped_nibbles(model):
    for layer in model.layers:
        for projection in (layer.mlp.up, layer.mlp.down):
            blocks = projection.blocks[...]
            projection.blocks[...] = (blocks << 4) | (blocks >> 4)


def _shifted_split(model):
    """q, k and v begin a head later than they should."""
    for layer in model.layers:
        for variable in (layer.attention.qkv.weight, layer.attention.qkv.bias):
            x = variable[...]
            K, G = x.shape[0], x.shape[1] - 2
            runs = (x[:, :G], x[:, G : G + 1], x[:, G + 1 :])
            heads = jnp.concatenate([run.reshape(-1, *x.shape[2:]) for run in runs])
            heads = jnp.roll(heads, -1, axis=0)
            parts = jnp.split(heads, [K * G, K * G + K])
            parts = [part.reshape(K, -1, *x.shape[2:]) for part in parts]
            variable[...] = jnp.concatenate(parts, axis=1)


def _unembedding_a_row_off(model):
    weight = model.unembedding.weight
    weight[...] = jnp.roll(weight[...], 1, axis=0)


def _other_base(model):
    model.config = dataclasses.replace(model.config, rope_theta=10_000.0)


def _transposed_expert(model):
    """Needs dense experts, as wide as the model."""
    weight = model.layers[1].mlp.down.weight
    weight[...] = weight[...].at[3].set(weight[3].T)


_attend, _expert_mlp = attention_xla._attend, moe.expert_mlp
_right_swiglu = mlp_xla.swiglu


def _attend_without_sinks(q, k, v, sinks, *rest):
    return _attend(q, k, v, jnp.full_like(sinks, -1e30), *rest)


def _bias_after_weighting(x, experts, weights, w, **options):
    mixed = _expert_mlp(x, experts, weights, w, **options)
    bias_MXD = w.down_bias[experts].astype(jnp.float32)
    return mixed + ((1 - weights[..., None]) * bias_MXD).sum(-2).astype(mixed.dtype)


def _swiglu(plus=1.0, low=-jnp.inf, linear_low=-1.0):
    """`linear_low` in units of the limit."""

    def swiglu(gate, linear, limit):
        gate = jnp.clip(gate, low * limit, limit)
        linear = jnp.clip(linear, linear_low * limit, limit)
        return gate * jax.nn.sigmoid(1.702 * gate) * (linear + plus)

    return swiglu


def _halves(gate, linear, limit):
    up = jnp.stack([gate, linear], axis=-1).reshape(*gate.shape[:-1], -1)
    return _right_swiglu(*jnp.split(up, 2, axis=-1), limit)


def _softmax_before_top_k(logits, count, **where):
    weights, experts = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), count)
    return experts, weights


def _bf16_norm(self, x):
    x16 = x.astype(jnp.bfloat16)
    x16 *= jax.lax.rsqrt(jnp.mean(x16 * x16, axis=-1, keepdims=True) + jnp.bfloat16(self.epsilon))
    y = (x16 * self.scale[...].astype(jnp.bfloat16)).astype(x.dtype)
    return jax.lax.reduce_precision(y, exponent_bits=8, mantissa_bits=7)  # XLA may keep more


def _moe(said, swiglu):
    return Fault("layers.0.mlp.out", said, code=(mlp_xla, "swiglu", swiglu))


HEADS, OUT = "layers.0.attention.heads", "layers.0.mlp.out"
FAULTS = {
    "window off by one": Fault(HEADS, "a window of 7 keys, not 8", _window_off_by_one),
    "windows on odd layers": Fault(HEADS, "a window of 7 keys where all", _windows_on_odd_layers),
    "rounded ramp": Fault("layers.0.attention.q_rope", "ramp not rounded", _rounded_ramp),
    "other base": Fault("layers.0.attention.q_rope", "with a base of", _other_base),
    "unembedding a row off": Fault("logits", "", _unembedding_a_row_off),
    "sinks scaled": Fault(HEADS, "sinks that are larger", _scaled_sinks),
    "halves": _moe("ours is what the formula gives with gate and linear part as halves", _halves),
    "nibbles swapped": Fault(OUT, "the nibbles of each byte swapped", _swapped_nibbles),
    "qkv a head off": Fault("layers.0.attention.q", "one head too early", _shifted_split),
    "no concentration": Fault(
        "layers.0.attention.q_rope",
        "ours is what the formula gives with no concentration",
        code=(rope, "concentration", lambda config: 1.0),
    ),
    "sinks left out": Fault(
        HEADS,
        "ours is what the formula gives with the sinks left out",
        code=(attention_xla, "_attend", _attend_without_sinks),
    ),
    "no plus one": _moe("no one added to the linear part", _swiglu(plus=0.0)),
    "gate clamped below": _moe("the gate clamped from below too", _swiglu(low=-1.0)),
    "linear not clamped below": _moe("linear part not clamped", _swiglu(linear_low=-jnp.inf)),
    "softmax before top-k": Fault(
        "layers.0.mlp.expert_weights",
        "the softmax over all experts",
        code=(moe, "choose", _softmax_before_top_k),
    ),
    "bias after weighting": Fault(
        OUT,
        "added after weighting",
        code=(moe, "expert_mlp", _bias_after_weighting),
    ),
    "RMSNorm in bf16": Fault(
        "layers.0.attention_norm",
        "ours computes this in bfloat16; all of its values are",
        code=(layers.RMSNorm, "__call__", _bf16_norm),
    ),
}
