"""The formula of each op for one position in NumPy, the right one first, then the known mistakes.

Written from the model's description and independent of our layers, whose weights it takes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import numpy as np

from gpt_oss_jax.config import Config
from gpt_oss_jax.model.rope import inverse_frequencies
from gpt_oss_jax.parity.ops import concentration
from gpt_oss_jax.quant import dequantize

# What to say of a formula, and the row that it gives.
Variants = Iterator[tuple[str, np.ndarray]]
Seen = Mapping[str, np.ndarray]


def of(modules: Mapping, name: str, t: int, seen: Seen, config: Config) -> Variants:
    """Variants of an op at position `t`, on what was seen in its stage; none if it has no trap."""
    block, kind = modules.get("block"), name.rpartition(".")[2]
    row = lambda name: seen[name][t].astype(np.float64)
    if name == "final_norm":
        return _norm(modules["norm"], row("input"))
    if name in ("attention_norm", "mlp_norm"):
        return _norm(getattr(block, name), row("middle" if name == "mlp_norm" else "input"))
    if kind in ("q", "k", "v"):
        return _qkv(block.attention.qkv, row("attention_norm"), kind, config)
    if kind in ("q_rope", "k_rope"):
        return _rope(row(name.removesuffix("_rope")), t, config)
    if kind == "heads":
        return _heads(block.attention, seen, t, config)
    if name == "attention.out":
        return _linear(block.attention.out, row("attention.heads"))
    if kind == "router_logits":
        return _linear(block.mlp.router, row("mlp_norm"))
    if kind == "expert_weights":
        return _expert_weights(row("mlp.router_logits"), config.experts_per_token)
    if name in ("mlp.out", "output"):
        choice = seen["mlp.experts"][t], row("mlp.expert_weights")
        mixed = _mlp(block.mlp, row("mlp_norm"), *choice, config)
        if name == "mlp.out":
            return mixed
        # Not every reference shows what the experts gave.
        return ((text, row("middle") + x) for text, x in mixed)
    return iter(())


def _numpy(variable) -> np.ndarray:
    return np.asarray(variable[...]).astype(np.float64)


def _norm(module, x_D: np.ndarray) -> Variants:
    scale_D = _numpy(module.scale)
    divided = lambda epsilon: x_D / np.sqrt(np.mean(x_D * x_D) + epsilon)
    normed_D = divided(module.epsilon)
    yield "", normed_D * scale_D
    for epsilon in {1e-5, 1e-6} - {module.epsilon}:
        yield f"an epsilon of {epsilon:g}, not {module.epsilon:g}", divided(epsilon) * scale_D
    yield "one added to the scale", normed_D * (1 + scale_D)
    yield "the scale left out", normed_D
    centred_D = x_D - x_D.mean()
    yield (
        "the mean subtracted",
        (centred_D / np.sqrt(np.mean(centred_D**2) + module.epsilon) * scale_D),
    )


def _qkv(module, x_D: np.ndarray, kind: str, config: Config) -> Variants:
    K, G, H = config.num_key_value_heads, config.group_size, config.head_dim

    def part(heads: np.ndarray) -> np.ndarray:
        return dict(zip("qkv", np.split(heads, [K * G, K * G + K]), strict=True))[kind]

    def in_order(x_KZ: np.ndarray) -> np.ndarray:
        """As the checkpoint has them: all of q, all of k, all of v."""
        runs = (x_KZ[:, :G], x_KZ[:, G : G + 1], x_KZ[:, G + 1 :])
        return np.concatenate([x.reshape(-1, H) for x in runs])

    product_KZH = np.einsum("KZHD,D->KZH", _numpy(module.weight), x_D)
    heads = in_order(product_KZH + _numpy(module.bias))
    yield "", part(heads)
    yield "the split of q, k and v one head too early", part(np.roll(heads, 1, axis=0))
    yield "the split of q, k and v one head too late", part(np.roll(heads, -1, axis=0))
    yield "the bias left out", part(in_order(product_KZH))
    yield "heads and the elements of a head swapped", np.ascontiguousarray(part(heads).T)


def _rotations(config: Config) -> Iterator[tuple[str, Callable]]:
    """Ways to rotate [S, N, H] at positions [S]."""

    def rotate(x_SNH, positions_S, config=config, sharp=True, neighbours=False, shift=0):
        sharpness = concentration(config) if sharp else 1.0
        angles = (positions_S + shift)[:, None].astype(np.float32) * inverse_frequencies(config)
        cos, sin = (f(angles.astype(np.float64))[:, None] * sharpness for f in (np.cos, np.sin))
        a, b = (x_SNH[..., 0::2], x_SNH[..., 1::2]) if neighbours else np.split(x_SNH, 2, -1)
        pair = a * cos - b * sin, b * cos + a * sin
        return np.stack(pair, -1).reshape(x_SNH.shape) if neighbours else np.concatenate(pair, -1)

    yield "", rotate
    if config.rope_scaling_factor > 1:
        yield "no concentration, YaRN's factor on cos and sin", partial(rotate, sharp=False)
        ends = "not " if config.rope_truncate else ""
        other = dataclasses.replace(config, rope_truncate=not config.rope_truncate)
        yield f"the bounds of YaRN's ramp {ends}rounded (truncate)", partial(rotate, config=other)
        plain = dataclasses.replace(config, rope_scaling_factor=1.0)
        yield "no YaRN", partial(rotate, config=plain)
    for base in {10_000.0, 150_000.0} - {config.rope_theta}:
        other = dataclasses.replace(config, rope_theta=base)
        yield f"a base of {base:g}, not {config.rope_theta:g}", partial(rotate, config=other)
    yield "neighbours rotated instead of halves", partial(rotate, neighbours=True)
    yield "positions that start at one", partial(rotate, shift=1)
    yield "no rotation", lambda x_SNH, positions_S: x_SNH


def _rope(x_F: np.ndarray, t: int, config: Config) -> Variants:
    for text, rotate in _rotations(config):
        yield text, rotate(x_F.reshape(1, -1, config.head_dim), np.array([t]))


def _heads(attention, seen: Seen, t: int, config: Config) -> Variants:
    """From q and k before their rotation, which not every reference shows."""
    K, G, H = config.num_key_value_heads, config.group_size, config.head_dim
    first = lambda name: seen[name][: t + 2].astype(np.float64).reshape(-1, K, H)
    k_SKH, v_SKH = first("attention.k"), first("attention.v")
    q_1NH = seen["attention.q"][t].astype(np.float64).reshape(1, K * G, H)
    sinks_KG, own = _numpy(attention.sinks), attention.window
    (_, right), *wrong = _rotations(config)

    def heads(window=own, sinks_KG=sinks_KG, scale=H**-0.5, last=t, rotate=right):
        keys = np.arange(0 if window is None else max(0, t + 1 - window), last + 1)
        keys = keys[keys < len(k_SKH)]
        q_KGH = rotate(q_1NH, np.array([t])).reshape(K, G, H)
        scores_KGS = np.einsum("KGH,SKH->KGS", q_KGH, rotate(k_SKH[keys], keys)) * scale
        scores_KGS = np.concatenate([scores_KGS, sinks_KG[..., None]], -1)
        weights_KGS = np.exp(scores_KGS - scores_KGS.max(-1, keepdims=True))
        weights_KGS /= weights_KGS.sum(-1, keepdims=True)
        return np.einsum("KGS,SKH->KGH", weights_KGS[..., :-1], v_SKH[keys])

    yield "", heads()
    if own is None:
        window = config.sliding_window
        yield f"a window of {window} keys where all are seen (the wrong layers)", heads(window)
    else:
        yield f"all keys seen where the window is {own} (the wrong layers)", heads(None)
        for window in (own - 1, own + 1):
            if window > 0:
                yield f"a window of {window} keys, not {own}", heads(window)
    yield "the sinks left out", heads(sinks_KG=np.full_like(sinks_KG, -np.inf))
    yield "the sinks scaled as scores are", heads(sinks_KG=sinks_KG * H**-0.5)
    yield "sinks that are larger by the scale of scores", heads(sinks_KG=sinks_KG * H**0.5)
    swapped_KG = sinks_KG.reshape(G, K).T
    yield "the sinks of other heads (groups and heads swapped)", heads(sinks_KG=swapped_KG)
    yield "scores that are not scaled", heads(scale=1.0)
    yield "one key of the future seen", heads(last=t + 1)
    for text, rotate in wrong:
        yield text, heads(rotate=rotate)


def _linear(module, x_F: np.ndarray) -> Variants:
    weight, bias = _numpy(module.weight), _numpy(module.bias)
    y = weight.reshape(len(bias), -1) @ x_F
    yield "", y + bias
    yield "the bias left out", y
    if weight.size == y.size**2:
        yield "the matrix transposed", weight.reshape(y.size, -1).T @ x_F + bias


def _expert_weights(logits_E: np.ndarray, count: int) -> Variants:
    order = np.argsort(-logits_E, kind="stable")[:count]
    powers_E = np.exp(logits_E - logits_E.max())
    yield "", powers_E[order] / powers_E[order].sum()
    yield "the softmax over all experts, before the top-k", powers_E[order] / powers_E.sum()
    yield "a sigmoid for the softmax", 1 / (1 + np.exp(-logits_E[order]))
    yield "equal weights", np.full(count, 1 / count)


def _mlp(moe, x_D, experts_X, weights_X, config: Config) -> Variants:
    limit = config.swiglu_limit

    def matrix(projection, expert: int, swapped: bool) -> np.ndarray:
        if hasattr(projection, "weight"):
            return np.asarray(projection.weight[expert]).astype(np.float64)
        packed = projection.matrix[expert].in_checkpoint_order()
        blocks, scales = packed.blocks, packed.scales
        if swapped:
            blocks = (blocks << 4) | (blocks >> 4)
        return np.asarray(dequantize(blocks, scales, np.float32)).astype(np.float64)

    def expert(e, *, swapped, transposed, exchanged, halves, plus, low, high, alpha, bias):
        up = np.einsum("FCD,D->FC", matrix(moe.up, e, swapped), x_D)
        up = (up + _numpy(moe.up.bias)[e]).reshape(-1)
        gate, linear = np.split(up, 2) if halves else (up[0::2], up[1::2])
        gate, linear = (linear, gate) if exchanged else (gate, linear)
        gate, linear = np.clip(gate, low, limit), np.clip(linear, high, limit)
        hidden = gate / (1 + np.exp(-alpha * gate)) * (linear + plus)
        down = matrix(moe.down, e, swapped)
        down = down.T if transposed == e else down
        return down @ hidden + bias * _numpy(moe.down.bias)[e]

    right = {"swapped": False, "transposed": -1, "exchanged": False, "halves": False}
    right |= {"plus": 1, "low": -np.inf, "high": -limit, "alpha": 1.702, "bias": 1}

    def mixed(weights_X=weights_X, **changed):
        rows = (expert(int(e), **(right | changed)) for e in experts_X)
        return sum(w * row for w, row in zip(weights_X, rows, strict=True))

    yield "", mixed()
    yield "gate and linear part as halves, not interleaved", mixed(halves=True)
    yield "gate and linear part exchanged", mixed(exchanged=True)
    yield "no one added to the linear part", mixed(plus=0)
    yield "the gate clamped from below too", mixed(low=-limit)
    yield "the linear part not clamped from below", mixed(high=-np.inf)
    yield "a sigmoid of x for one of 1.702 x", mixed(alpha=1.0)
    biases = sum(_numpy(moe.down.bias)[int(e)] for e in experts_X)
    yield "the bias of the down projection added after weighting", mixed(bias=0) + biases
    yield "the bias of the down projection left out", mixed(bias=0)
    yield "equal weights of the experts", mixed(weights_X=np.full_like(weights_X, weights_X.mean()))
    if not hasattr(moe.up, "weight"):
        yield "the nibbles of each byte swapped", mixed(swapped=True)
    if config.hidden_size == config.intermediate_size:
        for e in experts_X:
            yield f"the down matrix of expert {e} transposed", mixed(transposed=int(e))
