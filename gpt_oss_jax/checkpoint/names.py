"""The name table: each variable of ours, and where the two checkpoint layouts keep it.

Data, and pure functions of shapes and numpy arrays. Load, save, convert and synthetic all go
through it, so a layout is described once and works both ways. Knows nothing of files, JAX or NNX.

A letter is a dimension: V vocabulary, D width, K kv heads, G query heads a kv head, H head size,
E experts, F expert width, d and f the 32-value blocks along D and F, b the 16 bytes of a block,
Z = G + 2, and 1 and 2 themselves. "D KGH" is a stored matrix of D rows whose columns are K, G, H
from slow to fast; ours has each letter as an axis, in the same order unless "->" gives another. "+"
stands between runs of rows, in one tensor or in several; they follow each other along our axis 1: a
kv head's G query heads, then its key head, then its value head.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import ml_dtypes
import numpy as np

from gpt_oss_jax.config import Config

LAYOUTS = ("hf", "original")
BF16 = np.dtype(ml_dtypes.bfloat16)
UINT8 = np.dtype(np.uint8)

# Our path, the stored dimensions, Hugging Face's name or names, original/'s name.
_OUTER = (
    ("embedding/weight", "V D", "model.embed_tokens.weight", "embedding.weight"),
    ("norm/scale", "D", "model.norm.weight", "norm.scale"),
    ("unembedding/weight", "V D", "lm_head.weight", "unembedding.weight"),
)
_Q, _K, _V = (f"self_attn.{x}_proj" for x in "qkv")
_QKV_WEIGHT = (f"{_Q}.weight", f"{_K}.weight", f"{_V}.weight")
_QKV_BIAS = (f"{_Q}.bias", f"{_K}.bias", f"{_V}.bias")
_LAYER_PREFIX = {"hf": "model.layers.", "original": "block."}
_LAYER = (
    ("attention_norm/scale", "D", "input_layernorm.weight", "attn.norm.scale"),
    ("attention/qkv/weight", "KGH+K1H+K1H D -> KZHD", _QKV_WEIGHT, "attn.qkv.weight"),
    ("attention/qkv/bias", "KGH+K1H+K1H -> KZH", _QKV_BIAS, "attn.qkv.bias"),
    ("attention/sinks", "KG", "self_attn.sinks", "attn.sinks"),
    ("attention/out/weight", "D KGH", "self_attn.o_proj.weight", "attn.out.weight"),
    ("attention/out/bias", "D", "self_attn.o_proj.bias", "attn.out.bias"),
    ("mlp_norm/scale", "D", "post_attention_layernorm.weight", "mlp.norm.scale"),
    ("mlp/router/weight", "E D", "mlp.router.weight", "mlp.gate.weight"),
    ("mlp/router/bias", "E", "mlp.router.bias", "mlp.gate.bias"),
    ("mlp/up/bias", "E F2", "mlp.experts.gate_up_proj_bias", "mlp.mlp1_bias"),
    ("mlp/down/bias", "E D", "mlp.experts.down_proj_bias", "mlp.mlp2_bias"),
)
_UP, _DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_EXPERTS = {
    "mxfp4": {
        "mlp/up": (
            ("mlp/up/blocks", "E F2 d b", f"{_UP}_blocks", "mlp.mlp1_weight.blocks"),
            ("mlp/up/scales", "E F2 d", f"{_UP}_scales", "mlp.mlp1_weight.scales"),
        ),
        "mlp/down": (
            ("mlp/down/blocks", "E D f b", f"{_DOWN}_blocks", "mlp.mlp2_weight.blocks"),
            ("mlp/down/scales", "E D f", f"{_DOWN}_scales", "mlp.mlp2_weight.scales"),
        ),
    },
    # In Hugging Face's layout only, and [in, out], unlike every other matrix.
    "dense": {
        "mlp/up": (("mlp/up/weight", "E D F2 -> EF2D", _UP, None),),
        "mlp/down": (("mlp/down/weight", "E F D -> EDF", _DOWN, None),),
    },
}


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of rows of one stored tensor, and where it goes in our variable.

    Attributes:
      tensor: Name in the checkpoint.
      stored: Shape of that whole tensor.
      first_row: Where along its first axis the run begins.
      view: Shape the run is seen as.
      order: Axes of `view` in the order of ours.
      at: Where along our axis 1 the piece begins.
    """

    tensor: str
    stored: tuple[int, ...]
    first_row: int
    view: tuple[int, ...]
    order: tuple[int, ...]
    at: int

    def part(self, ours: np.ndarray) -> np.ndarray:
        """View of our whole variable that this piece is, with the axes of `view`."""
        if ours.ndim > 1:
            ours = ours[:, self.at : self.at + self.view[self.order[1]]]
        return ours.transpose(np.argsort(self.order))


@dataclasses.dataclass(frozen=True)
class Variable:
    """One of our variables.

    Attributes:
      path: "/"-joined, the layer's number in it.
      shape: Its shape.
      dtype: bfloat16 or uint8, as checkpoints hold it.
      layouts: Layout -> the pieces it is made of.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    layouts: Mapping[str, tuple[Piece, ...]]

    @property
    def nbytes(self) -> int:
        """Bytes in a checkpoint."""
        return math.prod(self.shape) * self.dtype.itemsize


def variables(config: Config, experts: str | Mapping[str, str] = "mxfp4") -> tuple[Variable, ...]:
    """All variables of a model, embedding first, unembedding last.

    Args:
      config: Sizes.
      experts: "mxfp4" (blocks and scales) or "dense" (weight), or a dict of that for each matrix.
    """
    embedding, norm, unembedding = (_variable(row, config) for row in _OUTER)
    layers = []
    for i in range(config.num_hidden_layers):
        layers += [_variable(row, config, i) for row in _LAYER]
        for matrix in (f"layers/{i}/{kind}" for kind in _EXPERTS["mxfp4"]):
            kind = experts if isinstance(experts, str) else experts[matrix]
            layers += matrix_variables(config, matrix, kind)
    return (embedding, *layers, norm, unembedding)


def matrices(config: Config) -> tuple[str, ...]:
    """Paths of the expert matrices."""
    layers = range(config.num_hidden_layers)
    return tuple(f"layers/{i}/{kind}" for i in layers for kind in _EXPERTS["mxfp4"])


def matrix_variables(config: Config, matrix: str, experts: str) -> tuple[Variable, ...]:
    """The variables that hold one expert matrix: blocks and scales ("mxfp4"), or weight ("dense").

    Raises:
      ValueError: For another kind of experts.
    """
    if experts not in _EXPERTS:
        raise ValueError(f"experts must be one of {', '.join(_EXPERTS)}, got {experts!r}.")
    _, layer, kind = matrix.split("/", 2)
    return tuple(_variable(row, config, int(layer)) for row in _EXPERTS[experts][kind])


def stored_tensors(variable: Variable, layout: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that hold a variable in a layout."""
    return {piece.tensor: piece.stored for piece in variable.layouts[layout]}


def to_stored(variable: Variable, layout: str, ours: np.ndarray) -> dict[str, np.ndarray]:
    """Our variable as a layout's tensors; the bytes move, no value changes.

    Raises:
      ValueError: If the array's shape is not the variable's.
    """
    if ours.shape != variable.shape:
        raise ValueError(f"{variable.path} must have shape {variable.shape}, got {ours.shape}.")
    runs: dict[str, list[np.ndarray]] = {}
    for piece in variable.layouts[layout]:
        rows = piece.part(ours).reshape(-1, *piece.stored[1:])
        runs.setdefault(piece.tensor, []).append(rows)
    return {name: np.concatenate(x) if len(x) > 1 else x[0] for name, x in runs.items()}


def _sizes(config: Config) -> dict[str, int]:
    return {
        "V": config.vocab_size,
        "D": config.hidden_size,
        "d": config.hidden_size // 32,
        "F": config.intermediate_size,
        "f": config.intermediate_size // 32,
        "b": 16,
        "E": config.num_experts,
        "K": config.num_key_value_heads,
        "G": config.group_size,
        "Z": config.group_size + 2,
        "H": config.head_dim,
        "1": 1,
        "2": 2,
    }


def _variable(row, config: Config, layer: int | None = None) -> Variable:
    path, dims, *stored = row
    dims, _, axes = dims.partition(" -> ")
    axes = axes or dims.replace(" ", "")
    sizes = _sizes(config)
    layouts = {}
    for layout, tensors in zip(LAYOUTS, stored, strict=True):
        if tensors is not None:
            tensors = (tensors,) if isinstance(tensors, str) else tensors
            prefix = "" if layer is None else f"{_LAYER_PREFIX[layout]}{layer}."
            layouts[layout] = _pieces([prefix + name for name in tensors], dims, axes, sizes)
    return Variable(
        path=path if layer is None else f"layers/{layer}/{path}",
        shape=tuple(sizes[x] for x in axes),
        dtype=UINT8 if path.endswith(("/blocks", "/scales")) else BF16,
        layouts=layouts,
    )


def _pieces(tensors, dims: str, axes: str, sizes: Mapping[str, int]) -> tuple[Piece, ...]:
    first, *rest = dims.split(" ")
    runs = first.split("+")
    rows = [_product(run, sizes) for run in runs]
    single = len(tensors) == 1
    pieces, at = [], 0
    for i, run in enumerate(runs):
        letters = run + "".join(rest)
        # The axis that runs share has another letter in each: it stands in the same place.
        order = tuple(letters.index(x if x in letters else letters[j]) for j, x in enumerate(axes))
        pieces.append(
            Piece(
                tensor=tensors[0 if single else i],
                stored=(sum(rows) if single else rows[i], *(_product(x, sizes) for x in rest)),
                first_row=sum(rows[:i]) if single else 0,
                view=tuple(sizes[x] for x in letters),
                order=order,
                at=at,
            )
        )
        at += sizes[letters[order[1]]] if len(axes) > 1 else 0
    return tuple(pieces)


def _product(letters: str, sizes: Mapping[str, int]) -> int:
    return math.prod(sizes[x] for x in letters)
