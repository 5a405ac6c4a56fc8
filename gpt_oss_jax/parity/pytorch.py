"""The two PyTorch implementations as references, one float32 block in memory at a time.

Their own modules, their own decoding of MXFP4, the checkpoint's bytes: read through our source and
turned back into the tensors that lie in the files, so a mistake in our reading is not shared. Needs
torch, and `gpt_oss` or `transformers`; imported only when a reference is made.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator

import numpy as np

from gpt_oss_jax.checkpoint import names
from gpt_oss_jax.checkpoint.experts import Source
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.parity.ops import stages

# The official experts gather the weights of every chosen expert of every token: 0.4 GB a token.
_TOKENS_AT_ONCE = 4
_MISSING = {
    "official": (
        "torch, gpt_oss.torch.model",
        "torch and, with --no-deps --ignore-requires-python, gpt-oss==0.0.9",
    ),
    "hf": ("torch, transformers", "torch and transformers>=5"),
}


def reference(name: str, source: Source, step: Callable[[int], None] = lambda nbytes: None):
    """A reference for `compare`: a function from tokens to arrays by stage.

    Args:
      name: "official", the model of OpenAI's gpt-oss package, or "hf", that of transformers.
      source: The checkpoint.
      step: Hears how many bytes of the checkpoint were read.

    Raises:
      ValueError: If what it needs is not installed, or it cannot be configured as the model is.
    """
    modules, wanted = _MISSING[name]
    try:
        for module in modules.split(", "):
            importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f"the reference {name!r} needs {wanted}, but {error}; --golden FILE needs neither."
        ) from error
    run = {"official": _official, "hf": _hugging_face}[name]
    if name == "official":
        try:
            source.config.to_original_dict()
        except ValueError as error:
            raise ValueError(
                f"the reference 'official' lacks a setting, 'hf' has it: {error}"
            ) from error
    return functools.partial(run, source, step)


def _official(source: Source, step, tokens_T: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    import torch
    from gpt_oss.torch import model as official

    config = source.config
    theirs = official.ModelConfig(**config.to_original_dict())
    weights = functools.partial(_official_weights, source, step)
    x = _embedding(torch, source, step, tokens_T)
    yield {"embedding": x.numpy()}
    heads = np.cumsum([config.num_attention_heads, config.num_key_value_heads]) * config.head_dim
    for i, (prefix, _) in enumerate(stages(config)[1:-1]):
        with torch.device("meta"):
            block = official.TransformerBlock(theirs, i)
        block.load_state_dict(weights(f"layers/{i}", f"block.{i}."), assign=True)
        seen = _Seen(torch)
        seen.watch(block.attn.norm, "attention_norm")
        seen.watch(block.attn.qkv, "qkv")
        seen.watch(block.attn.rope, "attention.q_rope", lambda _, output: output[0])
        seen.watch(block.attn.rope, "attention.k_rope", lambda _, output: output[1])
        seen.watch(block.attn.out, "attention.heads", lambda inputs, _: inputs[0])
        seen.watch(block.attn.out, "attention.out")
        seen.watch(block.attn, "middle")
        seen.watch(block.mlp.norm, "mlp_norm")
        seen.watch(block.mlp.gate, "mlp.router_logits")
        with torch.no_grad():
            x = block.attn(x)
            x = torch.cat([block.mlp(part) for part in x.split(_TOKENS_AT_ONCE)])
        del block
        arrays = seen.arrays() | {"output": x.numpy()}
        parts = np.split(arrays.pop("qkv"), heads, 1)
        arrays |= {f"attention.{name}": part for name, part in zip("qkv", parts, strict=True)}
        arrays |= _choice(torch, arrays["mlp.router_logits"], config)
        yield {prefix + name: array for name, array in arrays.items()}
    with torch.device("meta"):
        norm = official.RMSNorm(config.hidden_size)
    norm.load_state_dict({"scale": _tensor(torch, source, step, "norm/scale")}, assign=True)
    yield _end(torch, source, step, norm, x)


def _choice(torch, logits_TE: np.ndarray, config) -> dict[str, np.ndarray]:
    """Experts and weights, which that model keeps to itself, by the operators that it calls."""
    top = torch.topk(torch.from_numpy(logits_TE), k=config.experts_per_token, dim=-1, sorted=True)
    weights = torch.nn.functional.softmax(top.values, dim=1)
    return {"mlp.experts": top.indices.numpy(), "mlp.expert_weights": weights.numpy()}


def _official_weights(source: Source, step, path: str, prefix: str) -> dict:
    import torch
    from gpt_oss.torch.weights import Checkpoint

    stored = _stored(source, step, path, "original")

    class Decoder(Checkpoint):
        """Decodes the tensors at hand instead of those of a folder."""

        def __init__(self):
            self.tensor_name_to_file = stored

        def _get_tensor(self, name):
            return stored[name]

    decoder, found = Decoder(), {}
    for name in list(stored):
        short = name.removeprefix(prefix)
        if short.endswith(".blocks"):
            scales = name.removesuffix("blocks") + "scales"
            found[short.removesuffix(".blocks")] = decoder._get_mxfp4_tensor(
                name, scales, dtype=torch.float32, rows_per_chunk=1 << 20
            )
            del stored[name], stored[scales]
        elif name in stored and not short.endswith(".scales"):
            found[short] = stored.pop(name).float()
    return found


def _hugging_face(source: Source, step, tokens_T: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
    import torch
    import transformers
    from transformers.models.gpt_oss import modeling_gpt_oss as hf

    config = source.config
    values = config.to_hf_dict() | {"pad_token_id": None, "eos_token_id": None}
    kinds = values.pop("layer_types")
    x = _embedding(torch, source, step, tokens_T)
    yield {"embedding": x.numpy()}
    for i, (prefix, _) in enumerate(stages(config)[1:-1]):
        # A model of this one layer: its masks and rotations come from its own forward pass.
        theirs = transformers.GptOssConfig.from_dict(
            values | {"num_hidden_layers": 1, "layer_types": [kinds[i]]}
        )
        theirs._attn_implementation = theirs._experts_implementation = "eager"
        with torch.device("meta"):
            model = hf.GptOssModel(theirs).eval()
        model.rotary_emb = hf.GptOssRotaryEmbedding(theirs)
        model.norm = torch.nn.Identity()
        (block,) = model.layers
        weights = _hugging_face_weights(source, step, f"layers/{i}", f"model.layers.{i}.")
        block.load_state_dict(weights, assign=True)
        del weights
        seen, row = _Seen(torch), lambda _, output: output[0]
        attention = block.self_attn
        seen.watch(block.input_layernorm, "attention_norm", row)
        for name in "qkv":
            seen.watch(getattr(attention, f"{name}_proj"), f"attention.{name}", row)
        seen.watch(attention.o_proj, "attention.heads", lambda inputs, _: inputs[0][0])
        seen.watch(attention.o_proj, "attention.out", row)
        after, router = block.post_attention_layernorm, block.mlp.router
        seen.watch(after, "middle", lambda inputs, _: inputs[0][0])
        seen.watch(after, "mlp_norm", row)
        seen.watch(router, "mlp.router_logits", lambda _, output: output[0])
        seen.watch(router, "mlp.expert_weights", lambda _, output: output[1])
        seen.watch(router, "mlp.experts", lambda _, output: output[2])
        seen.watch(block.mlp.experts, "mlp.out")
        with torch.no_grad():
            x = model(inputs_embeds=x[None], use_cache=False).last_hidden_state[0]
        del model, block, attention, after, router
        arrays = seen.arrays() | {"output": x.numpy()}
        yield {prefix + name: array for name, array in arrays.items()}
    with torch.device("meta"):
        norm = hf.GptOssRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
    norm.load_state_dict({"weight": _tensor(torch, source, step, "norm/scale")}, assign=True)
    yield _end(torch, source, step, norm, x)


def _hugging_face_weights(source: Source, step, path: str, prefix: str) -> dict:
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    stored, found = _stored(source, step, path, "hf"), {}
    for name in list(stored):
        short = name.removeprefix(prefix)
        if short.endswith("_blocks"):
            scales = name.removesuffix("blocks") + "scales"
            found[short.removesuffix("_blocks")] = convert_moe_packed_tensors(
                stored.pop(name), stored.pop(scales), dtype=torch.float32, rows_per_chunk=1 << 20
            )
        elif name in stored:
            found[short] = stored.pop(name).float()
    return found


class _Seen:
    """What modules returned, in order: [T, features] each."""

    def __init__(self, torch):
        self._torch = torch
        self._parts: dict[str, list] = {}

    def watch(self, module, name: str, pick=lambda inputs, output: output) -> None:
        """Files what `module` returns, or what `pick` makes of its inputs and output."""

        def hook(_, inputs, output):
            x = pick(inputs, output)
            self._parts.setdefault(name, []).append(x.detach().reshape(x.shape[0], -1))

        module.register_forward_hook(hook)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it; what a module returned for some tokens at a time is put together."""
        return {name: self._torch.cat(parts).numpy() for name, parts in self._parts.items()}


def _stored(source: Source, step, path: str, layout: str) -> dict:
    """The tensors of a layout that our variables under `path` are made of, as they are stored."""
    import torch

    found = {}
    variables = [x for x in source.variables.values() if x.path.startswith(f"{path}/")]
    arrays = source.stream([Request(x.path, x.dtype) for x in variables])
    for variable, array in zip(variables, arrays, strict=True):
        step(variable.nbytes)
        if not variable.layouts.get(layout):
            # Unpacked experts exist in Hugging Face's layout only; transposed, they are original's.
            matrix = {"up": "mlp1_weight", "down": "mlp2_weight"}[variable.path.split("/")[-2]]
            layer = variable.path.split("/")[1]
            flat = array.reshape(len(array), -1, array.shape[-1])
            found[f"block.{layer}.mlp.{matrix}"] = _to_torch(torch, flat)
            continue
        for name, x in names.to_stored(variable, layout, array).items():
            found[name] = _to_torch(torch, x)
    return found


def _to_torch(torch, x: np.ndarray):
    if x.dtype == names.BF16:
        return torch.from_numpy(np.ascontiguousarray(x).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(x))


def _tensor(torch, source: Source, step, path: str):
    """One variable, as float32."""
    variable = source.variables[path]
    (array,) = source.stream([Request(path, np.dtype(np.float32))])
    step(variable.nbytes)
    return torch.from_numpy(array)


def _embedding(torch, source: Source, step, tokens_T: np.ndarray):
    """Rows of the table; float32 is made of those alone."""
    variable = source.variables["embedding/weight"]
    (array,) = source.stream([Request(variable.path, variable.dtype)])
    step(variable.nbytes)
    table = _to_torch(torch, array)
    return torch.nn.functional.embedding(torch.from_numpy(tokens_T).long(), table).float()


def _end(torch, source: Source, step, norm, x) -> dict[str, np.ndarray]:
    with torch.no_grad():
        normed = norm(x)
        weight = _tensor(torch, source, step, "unembedding/weight")
        logits = torch.nn.functional.linear(normed, weight)
    return {"final_norm": normed.numpy(), "logits": logits.numpy()}
