"""Looking inside a forward pass: values by name, captured or replaced."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp


class Tap:
    """Passes values through by name, keeping those asked for and replacing those patched.

    A value that is both is kept as it was computed: so one pass can give every operation the inputs
    of another model and show what it makes of them.

    Lives for one call of `Transformer.forward`; under `jax.jit` the captured values are outputs and
    the patches inputs, so nothing is hidden in module state.
    """

    def __init__(self, capture: Sequence[str] = (), patch: Mapping[str, jax.Array] | None = None):
        """Captures names that match a pattern of `capture`; replaces those that `patch` holds."""
        self._patterns = (capture,) if isinstance(capture, str) else tuple(capture)
        self._patch = dict(patch or {})
        self._names: list[str] = []
        self.captured: dict[str, jax.Array] = {}

    @property
    def captures(self) -> bool:
        """Whether anything is asked for."""
        return bool(self._patterns)

    @property
    def idle(self) -> bool:
        """Whether nothing is captured or patched, so that values need not exist."""
        return not self._patterns and not self._patch

    def wants(self, name: str) -> bool:
        """Whether `name` matches a pattern of `capture`."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in self._patterns)

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        """Returns `value`, or what it is patched with; keeps `value` if asked to.

        Raises:
          ValueError: If the patch has another shape.
        """
        self._names.append(name)
        if self.wants(name):
            self.captured[name] = value
        if name in self._patch:
            patch = jnp.asarray(self._patch[name])
            if patch.shape != value.shape:
                raise ValueError(
                    f"patch {name!r} must have shape {value.shape}, got {patch.shape}."
                )
            value = patch.astype(value.dtype)
        return value

    def only_if_captured(self, name: str, compute: Callable[[], jax.Array]) -> None:
        """Captures a value that the forward pass itself does not need."""
        if name in self._patch:
            raise ValueError(f"{name!r} can be captured, not patched.")
        self._names.append(name)
        if self.wants(name):
            self.captured[name] = compute()

    def check(self) -> None:
        """Refuses names that the forward pass does not have.

        Raises:
          ValueError: Naming them, and what there is.
        """
        unknown = [p for p in self._patterns if not fnmatch.filter(self._names, p)]
        unknown += [name for name in self._patch if name not in self._names]
        if unknown:
            names = [n for n in self._names if not n.startswith("layers.") or ".0." in n]
            raise ValueError(
                f"capture and patch must name values of the forward pass, got {unknown}; there are "
                f"{', '.join(names)}, and so on for each layer."
            )
