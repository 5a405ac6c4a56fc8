"""Expert matrices the other way: dense ones packed, packed ones dense, one expert at a time.

Unpacking is exact. Packing rounds, unless the values came out of MXFP4.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax.checkpoint import names
from gpt_oss_jax.checkpoint.files import allocate
from gpt_oss_jax.checkpoint.names import BF16, UINT8, Variable
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import Config
from gpt_oss_jax.quant import dequantize, quantize

_dequantize = jax.jit(dequantize, static_argnums=2)
_quantize = jax.jit(quantize)


class Source(Protocol):
    """Anything that variables can be read from: a folder, an Orbax checkpoint, a model."""

    config: Config
    variables: Mapping[str, Variable]

    def stream(self, requests: Iterable[Request]) -> Iterator[np.ndarray]:
        """Arrays in the order of the requests; one counts as held until the next is asked for."""
        ...


def expert_kinds(source: Source) -> set[str]:
    """ "mxfp4", "dense", or both, as the source holds its expert matrices."""
    return {
        "dense" if f"{matrix}/weight" in source.variables else "mxfp4"
        for matrix in names.matrices(source.config)
    }


def model_kind(source: Source) -> str:
    """Of the experts of a model that is loaded from it: "dense" if any are."""
    return "dense" if "dense" in expert_kinds(source) else "mxfp4"


def with_experts(source: Source, kind: str) -> Source:
    """The source with every expert matrix "mxfp4" or every one "dense"."""
    return source if expert_kinds(source) == {kind} else _Recoded(source, kind)


@dataclasses.dataclass(frozen=True)
class _Recoded:
    source: Source
    kind: str

    @property
    def config(self) -> Config:
        return self.source.config

    @property
    def variables(self) -> Mapping[str, Variable]:
        return {x.path: x for x in names.variables(self.config, self.kind)}

    def stream(self, requests: Iterable[Request]) -> Iterator[np.ndarray]:
        requests = list(requests)
        plan = [self._needs(request, before) for before, request in _with_last(requests)]
        arrays = self.source.stream([need for needs in plan for need in needs])
        scales = None
        for request, needs in zip(requests, plan, strict=True):
            found = [next(arrays) for _ in needs]
            if request.path in self.source.variables:
                yield found[0]
            elif self.kind == "dense":
                yield _unpacked(*found, request, self.variables[request.path].shape)
            elif request.path.endswith("/blocks"):
                blocks, scales = _packed(found[0])
                yield blocks
            else:
                yield scales

    def _needs(self, request: Request, before: Request | None) -> tuple[Request, ...]:
        if request.path in self.source.variables:
            return (request,)
        matrix, part = request.path.rsplit("/", 1)
        if part == "weight":
            # Whole experts: a slice within one may cut blocks.
            shapes = {x: self.source.variables[f"{matrix}/{x}"].shape for x in ("blocks", "scales")}
            lead = (request.index or (slice(None),))[:1]
            return tuple(
                Request(f"{matrix}/{x}", UINT8, lead + (slice(None),) * (len(shape) - 1))
                for x, shape in shapes.items()
            )
        if part == "scales":
            if before is None or before.path != f"{matrix}/blocks":
                raise ValueError(f"{request.path} must be asked for right after the blocks.")
            return ()
        return (Request(f"{matrix}/weight", BF16),)


def _with_last(requests: list[Request]) -> Iterator[tuple[Request | None, Request]]:
    return zip([None, *requests], requests, strict=False)


def _unpacked(blocks: np.ndarray, scales: np.ndarray, request: Request, shape) -> np.ndarray:
    bounds = request.bounds(shape)
    out = allocate([x.stop - x.start for x in bounds], request.dtype)
    for i in range(len(out)):
        expert = _dequantize(blocks[i], scales[i], jnp.dtype(request.dtype))
        out[i] = np.asarray(expert)[bounds[1:]]
    return out


def _packed(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    experts = [tuple(np.asarray(x) for x in _quantize(expert)) for expert in weight]
    blocks, scales = zip(*experts, strict=True)
    return np.stack(blocks), np.stack(scales)
