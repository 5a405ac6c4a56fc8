"""The figure of `gpt-oss-jax bench --plot`: tokens a second against the batch, under their limits.

It needs matplotlib, which is in no other part of the package, and makes nothing of it global.
"""

import importlib.util
import itertools
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gpt_oss_jax.bench import Measurement


def check(path: str | os.PathLike) -> None:
    """Whether the figure can be written, before anything takes time.

    Raises:
      ValueError: If it cannot, saying why.
    """
    path = Path(path)
    if path.suffix not in (".svg", ".png"):
        raise ValueError(f"a plot must be a file that ends in .svg or .png, got {str(path)!r}.")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path} cannot be written: a file in a folder that exists is wanted.")
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError('--plot needs matplotlib: pip install "gpt-oss-jax[tools]".')


def draw(model: str, measured: Sequence[Measurement], path: str | os.PathLike) -> None:
    """Writes the figure, whole or not at all.

    Args:
      model: Its name.
      measured: Shapes of that model.
      path: To write, .svg or .png.
    """
    # Not pyplot, which keeps figures and picks a screen.
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    prompt = lambda x: x.prompt_tokens
    for tokens, group in itertools.groupby(sorted(measured, key=prompt), prompt):
        found = sorted(group, key=lambda x: x.batch)
        batches, speeds = zip(*((x.batch, x.decode_tokens_per_second) for x in found), strict=True)
        ranges = zip(*(x.decode_tokens_per_second_range for x in found), strict=True)
        errors = [[abs(a - b) for a, b in zip(speeds, r, strict=True)] for r in ranges]
        label = f"after {tokens:,} tokens"
        line, *_ = axes.errorbar(batches, speeds, errors, marker="o", capsize=3, label=label)
        limits = [x.decode_tokens_per_second_limit for x in found]
        axes.plot(batches, limits, "_--", color=line.get_color(), label=f"{label}: limit")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:,g}")
    ticks = sorted({x.batch for x in measured})
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_xlabel("batch, rows")
    axes.set_ylabel("decoding, tokens/s of all rows")
    first = measured[0]
    axes.set_title(
        f"{model} on {first.devices} x {first.device}, {first.dtype}\n"
        f"limits at {first.gb_per_second_limit:,.4g} GB/s and "
        f"{first.tflop_per_second_limit:,.4g} TFLOP/s, measured",
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    axes.legend()
    _write(figure, Path(path))


def _write(figure, path: Path) -> None:
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            figure.savefig(file, format=path.suffix[1:], dpi=150)
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise
