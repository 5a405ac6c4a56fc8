"""Golden files: what a reference computed, small enough to be kept beside a test.

Tokens, the likeliest logits and the sum of all, the size of every row of every op, and some of its
values, as one npz that needs no PyTorch to be read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import platform
import tempfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from gpt_oss_jax.checkpoint.experts import Source
from gpt_oss_jax.checkpoint.stream import Request
from gpt_oss_jax.config import Config
from gpt_oss_jax.parity.ops import sizes, stages
from gpt_oss_jax.parity.predictions import TopLogits
from gpt_oss_jax.parity.values import Values

_FORMAT = 1
_ROWS, _COLUMNS, _TOP = 8, 8, 20
_EXPERTS = "mlp.experts"  # kept whole: routing is compared exactly
_LOGITS = tuple(f"logits_{field.name}" for field in dataclasses.fields(TopLogits))
_KEYS = ("format", "provenance", "tokens", "names", "sizes", "rows", "columns", "samples")
_KEYS += ("experts", *_LOGITS)
_DISTRIBUTIONS = ("jax", "numpy", "torch", "transformers", "gpt-oss")


@dataclasses.dataclass(frozen=True)
class Golden:
    """A reference's values on one text, sampled.

    Attributes:
      tokens_T: Ids.
      values: Samples by the names of `capture=`.
      logits: The likeliest.
      provenance: What made it: versions, config, checkpoint.
    """

    tokens_T: np.ndarray
    values: Mapping[str, Values]
    logits: TopLogits
    provenance: Mapping[str, Any]

    def by_stage(self) -> Iterator[dict[str, Values | TopLogits]]:
        """What is known of the embedding, of each layer and of the end."""
        found = self.values | {"logits": self.logits}
        for prefix, ops in stages(Config(**self.provenance["config"])):
            names = [op.name for op in ops if prefix + op.name in found]
            yield {name: found[prefix + name] for name in names}

    def check(self, tokens_T: np.ndarray, config: Config) -> None:
        """Refuses to be compared with another model or text.

        Raises:
          ValueError: Naming what differs.
        """
        if odd := unlike(config, self.provenance["config"]):
            raise ValueError(f"the golden file is of another model; this one has {odd}.")
        if not np.array_equal(tokens_T, self.tokens_T):
            raise ValueError("the golden file is of other tokens; leave them out to use its own.")
        known = {prefix + op.name for prefix, ops in stages(config) for op in ops}
        if odd := sorted(self.values.keys() - known):
            raise ValueError(f"the golden file has values of no known name: {', '.join(odd[:5])}.")


class Recorder:
    """A reference that passes another one through and remembers what a golden file keeps."""

    def __init__(self, reference):
        """Takes a function from tokens to an iterator of flat arrays [T, features], by stage."""
        self._reference = reference
        self._values: dict[str, Values] = {}
        self._logits: TopLogits | None = None

    def __call__(self, tokens_T: np.ndarray) -> Iterator[Mapping[str, np.ndarray]]:
        """Yields what the reference does."""
        self._tokens_T = tokens_T
        rows = np.unique(np.linspace(0, len(tokens_T) - 1, _ROWS).astype(np.int32))
        for arrays in self._reference(tokens_T):
            for name, x in arrays.items():
                if name == "logits":
                    self._logits = TopLogits.of(x, tokens_T, _TOP)
                elif name.endswith(_EXPERTS):
                    self._values[name] = Values.whole(x.astype(np.int32))
                else:
                    count = min(_COLUMNS, x.shape[1])
                    random = np.random.default_rng(zlib.crc32(name.encode()))
                    columns = np.sort(random.permutation(x.shape[1])[:count]).astype(np.int32)
                    self._values[name] = Values.whole(x).sample(rows, columns)
            yield arrays
            del arrays, x

    def golden(self, provenance: Mapping[str, Any]) -> Golden:
        """What was remembered, once all has passed."""
        return Golden(self._tokens_T, self._values, self._logits, provenance)


def provenance(reference: str, source: Source) -> dict[str, Any]:
    """What a golden file says about its making."""
    versions = {"python": platform.python_version()}
    for name in _DISTRIBUTIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    config = dataclasses.asdict(source.config)
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    return {
        "reference": reference,
        "versions": versions,
        "config": config,
        "config_sha256": digest,
        "checkpoint": fingerprint(source),
    }


def unlike(config: Config, other: Mapping[str, Any]) -> str:
    """What a config has that another one, as a dict, has not; empty if they are equal."""
    ours = dataclasses.asdict(config)
    return ", ".join(f"{x} {ours[x]}, not {other.get(x)}" for x in ours if ours[x] != other.get(x))


def fingerprint(source: Source) -> str:
    """A hash of some bytes of every variable: the same in every layout of one checkpoint."""
    digest = hashlib.sha256()
    paths = sorted(source.variables)
    requests = []
    for path in paths:
        variable = source.variables[path]
        lead = (slice(0, 1),) * (len(variable.shape) - 1)
        requests.append(Request(path, variable.dtype, (*lead, slice(None))))
    for path, array in zip(paths, source.stream(requests), strict=True):
        digest.update(f"{path} {source.variables[path].shape} {array.dtype}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def save(golden: Golden, path: str | os.PathLike) -> None:
    """Writes a golden file, whole or not at all."""
    sampled = {name: x for name, x in golden.values.items() if not x.is_whole}
    pad = lambda x, fill: np.pad(
        x, [(0, 0)] * (x.ndim - 1) + [(0, _COLUMNS - x.shape[-1])], constant_values=fill
    )
    arrays = {
        "format": np.int32(_FORMAT),
        "provenance": np.str_(json.dumps(golden.provenance)),
        "tokens": golden.tokens_T,
        "names": np.array(list(sampled)),
        "sizes": np.stack([x.size_T for x in sampled.values()]),
        "rows": next(iter(sampled.values())).rows,
        "columns": np.stack([pad(x.columns, -1) for x in sampled.values()]),
        "samples": np.stack([pad(x.values, 0) for x in sampled.values()]),
        "experts": np.stack([x.values for x in golden.values.values() if x.is_whole]),
        **{f"logits_{name}": x for name, x in dataclasses.asdict(golden.logits).items()},
    }
    path = Path(path)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, **arrays)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def load(path: str | os.PathLike) -> Golden:
    """Reads a golden file.

    Raises:
      ValueError: If it is none, or parts of it are missing.
    """
    arrays = read(path)
    if missing := [name for name in _KEYS if name not in arrays]:
        raise ValueError(f"{path} is not a whole golden file; it lacks {', '.join(missing)}.")
    if arrays["format"] != _FORMAT:
        raise ValueError(f"{path} has format {arrays['format']}; this version reads {_FORMAT}.")
    try:
        about = json.loads(str(arrays["provenance"]))
        config = Config(**about["config"])
        _check_shapes(arrays, config)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is a damaged golden file: {error}") from error
    rows = arrays["rows"]
    values = {}
    for i, name in enumerate(map(str, arrays["names"])):
        columns = arrays["columns"][i][arrays["columns"][i] >= 0]
        samples = arrays["samples"][i][:, : len(columns)]
        values[name] = Values(arrays["sizes"][i], samples, rows, columns)
    for layer, experts_TX in enumerate(arrays["experts"]):
        values[f"layers.{layer}.{_EXPERTS}"] = Values.whole(experts_TX)
    logits = TopLogits(*(arrays[name] for name in _LOGITS))
    return Golden(arrays["tokens"], values, logits, about)


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """All arrays of an .npz file.

    Raises:
      ValueError: If it is none, or damaged.
    """
    try:
        with zipfile.ZipFile(path):  # whatever else NumPy can read
            pass
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} is not a whole .npz file: {error}") from error


def _check_shapes(arrays: Mapping[str, np.ndarray], config: Config) -> None:
    """Refuses arrays that do not belong together."""
    T, N, R, C = (len(np.atleast_1d(arrays[x])) for x in ("tokens", "names", "rows", "columns"))
    L, X, V = config.num_hidden_layers, config.experts_per_token, config.vocab_size
    ops = {prefix + op.name: op for prefix, ops in stages(config) for op in ops}
    wanted = {
        "tokens": ((T,), "i", V),
        "rows": ((R,), "i", T),
        "names": ((N,), "U", None),
        "columns": ((N, _COLUMNS), "i", None),
        "sizes": ((N, T), "f", None),
        "samples": ((N, R, _COLUMNS), "f", None),
        "experts": ((L, T, X), "i", config.num_experts),
        "logits_ids": ((T, min(_TOP, V)), "i", V),
        "logits_logits": ((T, min(_TOP, V)), "f", None),
        "logits_logsumexp_T": ((T,), "f", None),
        "logits_next_T": ((T - 1,), "f", None),
    }
    for name, (shape, kind, count) in wanted.items():
        x = arrays[name]
        if x.shape != shape or x.dtype.kind != kind:
            raise ValueError(f"{name} must have shape {shape}, got {x.dtype} {x.shape}.")
        if count is not None and (x.min() < 0 or x.max() >= count):
            raise ValueError(f"{name} must lie below {count}, got {x.min()} to {x.max()}.")
    for name, columns in zip(map(str, arrays["names"]), arrays["columns"], strict=True):
        width = math.prod(sizes(ops[name], config, T)) if name in ops else np.inf
        if columns.min() < -1 or columns.max() >= width:
            raise ValueError(f"the columns of {name} must lie below {width}, got {columns.max()}.")
