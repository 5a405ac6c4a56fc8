"""Trains the small model in the package, `tiny`, from nothing; a CPU will do.

    python examples/train_tiny.py --out gpt_oss_jax/data/tiny

The defaults are those of the packaged weights: 28 minutes on two cores of a CPU, or two and a half
on an H200, where the packaged ones were made. Each kind of device rounds differently, so weights
differ; all six seeds that were tried pass the exam in `tests/test_tiny.py`.

A gpt-oss of four layers with the real vocabulary, trained on the conversations of
`tiny_batches.py`. Only the rows of the tokens that its world uses are learned; all other tokens
share one embedding and one unembedding row, and the softmax counts that row as often as it occurs,
so the loss is exactly the full vocabulary's. The experts are quantised to MXFP4 in every forward
pass and the gradient passes through the rounding (straight-through, arXiv:1308.3432), so what is
stored is what was trained. The optimizer is Muon (https://kellerjordan.github.io/posts/muon/): on
this task it needs half of Adam's steps. Attention and experts are written here, for packed
sequences and without a cache. Needs `pip install "gpt-oss-jax[train]"`.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import safetensors.numpy
import tiny_batches

from gpt_oss_jax.checkpoint import names
from gpt_oss_jax.config import Config
from gpt_oss_jax.model import rope
from gpt_oss_jax.quant import mxfp4

CONFIG = Config(
    num_hidden_layers=4,
    num_experts=8,
    experts_per_token=2,
    vocab_size=201088,
    hidden_size=192,
    intermediate_size=192,
    head_dim=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=128,
)
QUANTIZATION = {
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
    "quant_method": "mxfp4",
}
# Our names of a layer's parameters, and the package's.
PATHS = {
    "attention_norm": "attention_norm/scale",
    "qkv": "attention/qkv/weight",
    "qkv_bias": "attention/qkv/bias",
    "sinks": "attention/sinks",
    "out": "attention/out/weight",
    "out_bias": "attention/out/bias",
    "mlp_norm": "mlp_norm/scale",
    "router": "mlp/router/weight",
    "router_bias": "mlp/router/bias",
    "up_bias": "mlp/up/bias",
    "down_bias": "mlp/down/bias",
}
# Inputs and outputs of the matrices that Muon trains, each expert apart; Adam trains the rest.
MATRICES = {
    "qkv": optax.contrib.MuonDimensionNumbers(3, (0, 1, 2)),
    "out": optax.contrib.MuonDimensionNumbers((1, 2, 3), 0),
    "up": optax.contrib.MuonDimensionNumbers(3, (1, 2)),
    "down": optax.contrib.MuonDimensionNumbers(2, 1),
}
LENGTH = 384
# Rows that one expert may take in training, as a multiple of its fair share.
CAPACITY = 1.25


def init(key: jax.Array, rows: int) -> dict:
    """Random parameters; `rows` tokens of its own and the shared row."""
    c = CONFIG
    D, F, H, E = c.hidden_size, c.intermediate_size, c.head_dim, c.num_experts
    K, G = c.num_key_value_heads, c.group_size
    keys = iter(jax.random.split(key, 64))

    def normal(shape, fan_in, scale=1.0):
        return scale * fan_in**-0.5 * jax.random.normal(next(keys), shape)

    depth = (2 * c.num_hidden_layers) ** -0.5
    layers = [
        {
            "attention_norm": jnp.ones(D),
            "qkv": normal((K, G + 2, H, D), D),
            "qkv_bias": jnp.zeros((K, G + 2, H)),
            "sinks": jnp.zeros((K, G)),
            "out": normal((D, K, G, H), K * G * H, depth),
            "out_bias": jnp.zeros(D),
            "mlp_norm": jnp.ones(D),
            "router": normal((E, D), D),
            "router_bias": jnp.zeros(E),
            "up": normal((E, F, 2, D), D),
            "up_bias": jnp.zeros((E, F, 2)),
            "down": normal((E, D, F), F, depth),
            "down_bias": jnp.zeros((E, D)),
        }
        for _ in range(c.num_hidden_layers)
    ]
    return {
        "embedding": normal((rows + 1, D), 1.0, 0.5),
        "layers": layers,
        "norm": jnp.ones(D),
        "unembedding": normal((rows + 1, D), D, 0.5),
    }


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + CONFIG.rms_norm_eps) * scale


def attention(p, x_BTD, angles, visible_BTS):
    B, T, _ = x_BTD.shape
    K, G, H = CONFIG.num_key_value_heads, CONFIG.group_size, CONFIG.head_dim
    qkv = jnp.einsum("btd,kghd->btkgh", x_BTD, p["qkv"]) + p["qkv_bias"]
    qk, v = rope.apply_rope(qkv[..., :-1, :], *angles), qkv[..., -1, :]
    # One plain matrix product per key head is twice as fast on a CPU as a contraction of five axes.
    q = qk[..., :-1, :].transpose(0, 2, 3, 1, 4).reshape(B, K, G * T, H) * H**-0.5
    k, v = qk[..., -1, :].transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("bkmh,bksh->bkms", q, k).reshape(B, K, G, T, T)
    scores = jnp.where(visible_BTS[:, None, None], scores, -1e9)
    sinks = p["sinks"][:, :, None, None]
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(-1, keepdims=True), sinks))
    weights = jnp.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + jnp.exp(sinks - top)
    mixed = jnp.einsum("bkms,bksh->bkmh", weights.reshape(B, K, G * T, T), v)
    mixed = mixed.reshape(B, K, G, T, H) / total
    return jnp.einsum("bkgth,dkgh->btd", mixed, p["out"]) + p["out_bias"]


def swiglu(gate, linear):
    gate = jnp.minimum(gate, CONFIG.swiglu_limit)
    linear = jnp.clip(linear, -CONFIG.swiglu_limit, CONFIG.swiglu_limit)
    return gate * jax.nn.sigmoid(1.702 * gate) * (linear + 1)


def experts(p, x_MD, real_M):
    """The expert block on M rows; also its balance loss, 1 where all experts get equal rows.

    Rows are gathered by expert into slots of a fixed number; what overflows is dropped, which the
    balance loss makes rare. First choices come first, and rows that are not real never take a slot.
    """
    M, D = x_MD.shape
    E, X = CONFIG.num_experts, CONFIG.experts_per_token
    C = int(CAPACITY * M * X / E)
    logits = x_MD @ p["router"].T + p["router_bias"]
    top, chosen = jax.lax.top_k(logits, X)
    weights = jax.nn.softmax(top)

    chosen_N = chosen.T.reshape(-1)
    takes_NE = (chosen_N[:, None] == jnp.arange(E)) & jnp.tile(real_M, X)[:, None]
    rank_N = jnp.sum(jnp.where(takes_NE, jnp.cumsum(takes_NE, 0) - 1, 0), -1)
    slot_N = jnp.where(takes_NE.any(-1) & (rank_N < C), chosen_N * C + rank_N, E * C)
    row_S = jnp.full(E * C, M).at[slot_N].set(jnp.tile(jnp.arange(M), X), mode="drop")
    padded = jnp.concatenate([x_MD, jnp.zeros((1, D))])
    x_ECD = padded[row_S].reshape(E, C, D)
    up = jnp.einsum("ecd,efzd->ecfz", x_ECD, p["up"]) + p["up_bias"][:, None]
    act = swiglu(up[..., 0], up[..., 1])
    down = jnp.einsum("ecf,edf->ecd", act, p["down"]) + p["down_bias"][:, None]
    down = jnp.concatenate([down.reshape(E * C, D), jnp.zeros((1, D))])
    y = jnp.sum(down[slot_N].reshape(X, M, D) * weights.T[..., None], 0)

    share = jnp.mean(jax.nn.softmax(logits), 0, where=real_M[:, None])
    load = jnp.mean(takes_NE, 0) * M / jnp.maximum(real_M.sum(), 1)
    return y, E * jnp.sum(share * jax.lax.stop_gradient(load))


def forward(params, batch):
    """Logits [B, T, rows + 1] and the mean balance loss of packed sequences."""
    positions, segments = batch["positions"], batch["segments"]
    q, k = positions[:, :, None], positions[:, None, :]
    own = (segments[:, None, :] == 0) | (segments[:, None, :] == segments[:, :, None])
    visible = (k >= 0) & (k <= q) & own
    angles = rope.cos_sin(jnp.maximum(positions, 0), CONFIG, jnp.float32)
    x = params["embedding"][batch["tokens"]]
    B, T, D = x.shape
    balance = 0.0
    for i, p in enumerate(params["layers"]):
        window = CONFIG.layer_window(i)
        seen = visible if window is None else visible & (q - k < window)
        x = x + attention(p, rms_norm(x, p["attention_norm"]), angles, seen)
        rows = rms_norm(x, p["mlp_norm"]).reshape(B * T, D)
        y, loss = experts(p, rows, (positions >= 0).reshape(-1))
        x = x + y.reshape(B, T, D)
        balance += loss / len(params["layers"])
    return rms_norm(x, params["norm"]) @ params["unembedding"].T, balance


def quantized(params):
    """The parameters with experts rounded to MXFP4; gradients pass as if they were not."""

    def straight_through(x):
        rounded = mxfp4.dequantize(*mxfp4.quantize(jax.lax.stop_gradient(x)), jnp.float32)
        return x + jax.lax.stop_gradient(rounded - x)

    layers = [
        p | {"up": straight_through(p["up"]), "down": straight_through(p["down"])}
        for p in params["layers"]
    ]
    return params | {"layers": layers}


def loss_fn(params, batch):
    logits, balance = forward(quantized(params), batch)
    # The last row stands for every token that has none of its own.
    others = CONFIG.vocab_size - logits.shape[-1] + 1
    logits = logits.at[..., -1].add(np.log(others).astype(np.float32))
    learned = batch["targets"] >= 0
    wanted = jnp.maximum(batch["targets"], 0)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, wanted)
    right = logits.argmax(-1) == wanted
    loss = jnp.mean(losses, where=learned)
    return loss + 0.01 * balance, (loss, jnp.mean(right, where=learned), balance)


def score(params, batch):
    """Which branches are right in every token: bool [B, T] at their last targets, and a mask."""
    logits, _ = forward(quantized(params), batch)
    learned = batch["targets"] >= 0
    wrong = learned & (logits.argmax(-1) != batch["targets"])
    # A branch's last token is followed by another segment's.
    segments = batch["segments"]
    last = learned & (segments != jnp.pad(segments, ((0, 0), (0, 1)))[:, 1:])
    own = segments[:, :, None] == segments[:, None, :]
    return last & ~jnp.any(own & wrong[:, None, :], -1), last


def write(params, rows: Sequence[int], folder: Path):
    """Writes the folder that `gpt_oss_jax.checkpoint.tiny` unpacks."""
    config = dataclasses.replace(CONFIG, vocab_size=len(rows) + 1)
    arrays = {
        "embedding/weight": params["embedding"],
        "norm/scale": params["norm"],
        "unembedding/weight": params["unembedding"],
    }
    for i, p in enumerate(params["layers"]):
        layer = {path: p[name] for name, path in PATHS.items()}
        for name in ("up", "down"):
            layer[f"mlp/{name}/blocks"], layer[f"mlp/{name}/scales"] = mxfp4.quantize(p[name])
        arrays |= {f"layers/{i}/{path}": array for path, array in layer.items()}
    tensors = {"rows": np.asarray(rows, np.int32)}
    for variable in names.variables(config):
        array = np.asarray(arrays[variable.path]).astype(variable.dtype)
        tensors |= names.to_stored(variable, "hf", array)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    text = json.dumps(CONFIG.to_hf_dict() | {"quantization_config": QUANTIZATION}, indent=2)
    (folder / "config.json").write_text(text + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=5, help="sequences a step")
    parser.add_argument("--every", type=int, default=300, help="steps between scores")
    parser.add_argument("--rate", type=float, default=2e-3, help="peak learning rate")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    # Large buffers are otherwise mapped and cleared anew in every step, at half the speed.
    if sys.platform == "linux":
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD

    rows = tiny_batches.vocabulary()
    params = init(jax.random.key(args.seed), len(rows))
    count = sum(x.size for x in jax.tree.leaves(params))
    print(f"{count / 1e6:.2f} M parameters, {len(rows)} tokens have rows of their own")
    warm = min(200, args.steps // 10)
    rate = optax.join_schedules(
        [
            optax.linear_schedule(0, args.rate, warm),
            optax.linear_schedule(args.rate, 0, args.steps - warm),
        ],
        [warm],
    )
    optimizer = optax.contrib.muon(
        rate,
        consistent_rms=0.2,
        adam_b2=0.98,
        muon_weight_dimension_numbers=jax.tree_util.tree_map_with_path(
            lambda path, _: MATRICES.get(getattr(path[-1], "key", None)), params
        ),
    )
    state = optimizer.init(params)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, batch):
        grads, report = jax.grad(loss_fn, has_aux=True)(params, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, report

    scored = list(itertools.islice(tiny_batches.batches(1, LENGTH, 8, held_out=True), 6))
    examine = jax.jit(score)
    stream = tiny_batches.batches(args.seed, LENGTH, args.batch)
    start = last = time.perf_counter()
    before = 0
    for i in range(1, args.steps + 1):
        params, state, report = step(params, state, next(stream))
        if i % args.every == 0 or i == args.steps:
            loss, right, balance = map(float, report)
            now = time.perf_counter()
            print(
                f"step {i} of {args.steps}: loss {loss:.4f} nats a token, {right:.2%} right, "
                f"balance {balance:.3f}, {(i - before) * args.batch * LENGTH / (now - last):.0f} "
                f"tokens/s, {(now - start) / 60:.1f} min",
            )
            right, asked = np.zeros((2, len(tiny_batches.CATEGORIES)), int)
            for batch in scored:
                for counts, where in zip((right, asked), examine(params, batch), strict=True):
                    np.add.at(counts, batch["categories"][np.asarray(where)], 1)
            parts = zip(tiny_batches.CATEGORIES, right, asked, strict=True)
            print("  held out, answers right:", *(f"{n} {r}/{a}" for n, r, a in parts), flush=True)
            last, before = time.perf_counter(), i
    write(jax.device_get(params), rows, args.out)


if __name__ == "__main__":
    main()
