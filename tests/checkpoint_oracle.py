"""What a checkpoint folder means, said again: with the safetensors package and plain slices."""

from pathlib import Path

import ml_dtypes  # noqa: F401  (makes bfloat16 known to safetensors.numpy)
import numpy as np
from flax import nnx
from safetensors.numpy import load_file, save_file


def read_all(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor of every file."""
    tensors = {}
    for file in sorted(Path(folder).glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def rewrite(folder: Path, tensors: dict[str, np.ndarray]) -> None:
    """Puts other tensors in place of what is there, in one file without an index."""
    for file in Path(folder).glob("model*.safetensors*"):
        file.unlink()
    save_file(
        {k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / "model.safetensors"
    )


def leaves(model) -> dict[str, np.ndarray]:
    """Path -> value of a model's variables."""
    state = nnx.to_flat_state(nnx.state(model))
    return {"/".join(map(str, path)): np.asarray(x[...]) for path, x in state}


def ours_from_hf(tensors: dict[str, np.ndarray], config) -> dict[str, np.ndarray]:
    """Our variables from Hugging Face's tensors."""
    D, F, H = config.hidden_size, config.intermediate_size, config.head_dim
    E, K, N = config.num_experts, config.num_key_value_heads, config.num_attention_heads
    G = N // K
    out = {
        "embedding/weight": tensors["model.embed_tokens.weight"],
        "norm/scale": tensors["model.norm.weight"],
        "unembedding/weight": tensors["lm_head.weight"],
    }
    for i in range(config.num_hidden_layers):
        there = lambda name: tensors[f"model.layers.{i}.{name}"]  # noqa: B023
        ours = {
            "attention_norm/scale": there("input_layernorm.weight"),
            "mlp_norm/scale": there("post_attention_layernorm.weight"),
            "attention/sinks": np.stack(
                [there("self_attn.sinks")[k * G : (k + 1) * G] for k in range(K)]
            ),
            "attention/out/weight": there("self_attn.o_proj.weight").reshape(D, K, G, H),
            "attention/out/bias": there("self_attn.o_proj.bias"),
            "mlp/router/weight": there("mlp.router.weight"),
            "mlp/router/bias": there("mlp.router.bias"),
            "mlp/up/bias": there("mlp.experts.gate_up_proj_bias").reshape(E, F, 2),
            "mlp/down/bias": there("mlp.experts.down_proj_bias"),
        }
        for kind in ("weight", "bias"):
            q, k, v = (there(f"self_attn.{x}_proj.{kind}") for x in "qkv")
            heads = []
            for kv in range(K):
                group = [q[n * H : (n + 1) * H] for n in range(kv * G, (kv + 1) * G)]
                own = slice(kv * H, (kv + 1) * H)
                heads.append(np.stack([*group, k[own], v[own]]))
            ours[f"attention/qkv/{kind}"] = np.stack(heads)
        experts = f"model.layers.{i}.mlp.experts."
        if experts + "gate_up_proj" in tensors:
            up = np.swapaxes(tensors[experts + "gate_up_proj"], 1, 2)
            ours["mlp/up/weight"] = np.stack([up[:, 0::2], up[:, 1::2]], axis=2)
        else:
            for kind in ("blocks", "scales"):
                up = tensors[f"{experts}gate_up_proj_{kind}"]
                ours[f"mlp/up/{kind}"] = np.stack([up[:, 0::2], up[:, 1::2]], axis=2)
        if experts + "down_proj" in tensors:
            ours["mlp/down/weight"] = np.swapaxes(tensors[experts + "down_proj"], 1, 2)
        else:
            for kind in ("blocks", "scales"):
                ours[f"mlp/down/{kind}"] = tensors[f"{experts}down_proj_{kind}"]
        out |= {f"layers/{i}/{path}": value for path, value in ours.items()}
    return out


def same_bits(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    """Fails unless both hold the same names, dtypes, shapes and bytes."""
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].dtype, a[name].shape) == (b[name].dtype, b[name].shape), name
        assert a[name].tobytes() == b[name].tobytes(), name
