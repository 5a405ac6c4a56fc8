"""A report as one page: no script, no font, no file but itself; plots are inline SVG."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

import numpy as np

from gpt_oss_jax.parity.ops import LAYER
from gpt_oss_jax.parity.report import Report

_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 860, 220, 64, 34
_WORST = 12
_FLOOR, _CEILING = 1e-12, 1e6  # Logarithms of nothing and of what is no number are drawn here.
_STYLE = """
:root { --ink: #1d2530; --soft: #5d6876; --line: #d8dee6; --page: #ffffff; --one: #1f6fb4;
  --two: #d1601f; --bad: #c0262d; --low: #e8f1fa; --high: #1f6fb4; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6eaf0; --soft: #9aa6b4; --line: #353e4a;
  --page: #14181e; --one: #6db3f2; --two: #f0a06a; --bad: #ff6b6b; --low: #1d2a38; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page);
  max-width: 900px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; margin-bottom: 0.2rem; } h2 { font-size: 1.05rem; margin: 2rem 0 0.4rem; }
p { margin: 0.3rem 0; } .soft { color: var(--soft); } .verdict { border-left: 4px solid;
  padding: 0.4rem 0.8rem; margin: 1rem 0; } .well { border-color: var(--one); }
.over { border-color: var(--bad); } svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
td, th { text-align: right; padding: 0.15rem 0.7rem; border-bottom: 1px solid var(--line); }
pre { overflow-x: auto; font-size: 12px; }
"""


def write(report: Report, path: str | os.PathLike, title: str, decode: Callable | None = None):
    """Writes the page, whole or not at all; see `page`."""
    path = Path(path)
    handle, unfinished = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(page(report, title, decode))
        os.chmod(unfinished, 0o644)
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def page(report: Report, title: str, decode: Callable[[int], str] | None = None) -> str:
    """The page.

    Args:
      report: What to show.
      title: Which model against which reference.
      decode: From a token to its text; None: only ids are shown.
    """
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="soft">{len(report.tokens_T)} tokens, ours in {report.dtype}</p>',
        f'<p class="verdict {"well" if report.ok else "over"}">{escape(report.sentence)}</p>',
        *_heat_map(report),
        *_errors(report),
        *_routing(report),
        *_positions(report, decode),
        "<h2>Every op</h2>",
        f"<details><summary>The whole table</summary><pre>{escape(report.table())}</pre></details>",
    ]
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body>{''.join(parts)}</body></html>\n"
    )


def _heat_map(report: Report) -> list[str]:
    """A cell for each op of each layer: difference over tolerance."""
    cells = {op.name: float(op.judged.excess_T.max()) for op in report.ops}
    for x in report.routing:
        cells[x.name] = max((f.margin / f.allowed for f in x.wrong), default=0.0)
    columns = [op.name for op in LAYER if any(name.endswith(f".{op.name}") for name in cells)]
    layers = sorted({int(name.split(".")[1]) for name in cells if name.startswith("layers.")})
    if not layers:
        return []
    left, top, high = 40, 118, 18
    wide = (_WIDTH - left) / len(columns)
    marks = []
    for i, name in enumerate(columns):
        x = left + (i + 0.6) * wide
        marks.append(f'<text transform="translate({x:.0f},{top - 6}) rotate(-50)">{name}</text>')
    for row, layer in enumerate(layers):
        y = top + row * high
        marks.append(f'<text x="{left - 8}" y="{y + 13}" text-anchor="end">{layer}</text>')
        for i, column in enumerate(columns):
            name = f"layers.{layer}.{column}"
            if name in cells:
                marks.append(_cell(left + i * wide, y, wide - 2, high - 2, name, cells[name]))
    svg = _svg(top + high * len(layers), marks)
    return [
        "<h2>Where rounding does not explain the difference</h2>",
        '<p class="soft">Largest difference over tolerance, a row a layer. Blue, the darker the '
        "nearer to the tolerance (logarithmic, from a thousandth); red above it.</p>",
        svg,
    ]


def _cell(x, y, wide, high, name: str, excess: float) -> str:
    if excess > 1:
        fill = 'fill="var(--bad)"'
    else:
        share = min(1.0, max(0.0, 1 + np.log10(max(excess, _FLOOR)) / 3))
        fill = f'fill="color-mix(in srgb, var(--high) {100 * share:.0f}%, var(--low))"'
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{wide:.1f}" height="{high}" {fill}>'
        f"<title>{name}: {excess:.2g} of the tolerance</title></rect>"
    )


def _errors(report: Report) -> list[str]:
    outputs = [op for op in report.ops if op.name.endswith(".output")]
    if not outputs:
        return []
    layers = [int(op.name.split(".")[1]) for op in outputs]
    worst = {layer: 0.0 for layer in layers}
    for op in report.ops:
        if op.name.startswith("layers.") and op.local is not None:
            layer = int(op.name.split(".")[1])
            worst[layer] = max(worst.get(layer, 0.0), op.local.relative)
    lines = [("own: the block's output, errors gathered", [op.own.relative for op in outputs])]
    if any(worst.values()):
        lines.append(("local: the worst op on the reference's inputs", [worst[x] for x in layers]))
    return [
        "<h2>Error per layer</h2>",
        '<p class="soft">Relative to the size of a row, worst position; logarithmic.</p>',
        _plot(layers, lines, "layer"),
    ]


def _routing(report: Report) -> list[str]:
    if not report.routing:
        return []
    left, high = _LEFT, 14
    marks = []
    for row, x in enumerate(report.routing):
        y, wide = row * high, (_WIDTH - left - 70) * x.agreement
        marks.append(f'<text x="{left - 8}" y="{y + 11}" text-anchor="end">{row}</text>')
        marks.append(
            f'<rect x="{left}" y="{y}" width="{wide:.1f}" height="{high - 3}" fill="var(--one)">'
            f"<title>{x.name}: {len(x.own)} of {x.positions} tokens differ</title></rect>"
        )
        marks.append(
            f'<text x="{left + wide + 6:.1f}" y="{y + 11}">{100 * x.agreement:.2f}%</text>'
        )
    return [
        "<h2>Tokens sent to the same experts</h2>",
        '<p class="soft">On our own input, a bar a layer.</p>',
        _svg(high * len(report.routing), marks),
    ]


def _positions(report: Report, decode) -> list[str]:
    x = report.predictions
    if x is None:
        return []
    positions = list(range(len(x.kl_T)))
    off = np.abs(x.nll_T - x.reference_nll_T)
    lines = [("divergence from the reference (KL)", x.kl_T)]
    if off.size:
        lines.append(("difference of the negative log-likelihood", off))
    rows = []
    for t in x.worst(_WORST):
        token = int(report.tokens_T[t])
        known = t < len(x.nll_T)
        cells = [
            str(t),
            str(token),
            *([f"<code>{escape(repr(decode(token)))}</code>"] if decode else []),
            f"{x.kl_T[t]:.1e}",
            f"{x.nll_T[t]:.4f}" if known else "",
            f"{x.reference_nll_T[t]:.4f}" if known else "",
            "same" if x.top1_T[t] else "other",
        ]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    heads = ["position", "token", *(["text"] if decode else []), "KL, nats"]
    heads += ["NLL, ours", "NLL, reference", "likeliest"]
    return [
        "<h2>Error per position</h2>",
        '<p class="soft">Of the distribution over the next token, nats; logarithmic.</p>',
        _plot(positions, lines, "position"),
        "<h2>Worst tokens</h2>",
        "<table><tr>" + "".join(f"<th>{head}</th>" for head in heads) + "</tr>",
        *rows,
        "</table>",
    ]


def _plot(xs: Sequence[int], lines: list[tuple[str, Sequence[float]]], label: str) -> str:
    """Lines over `xs`, logarithmic."""
    finite = lambda values: np.nan_to_num(values, nan=_CEILING, posinf=_CEILING)
    logs = [(text, np.log10(np.clip(finite(x), _FLOOR, _CEILING))) for text, x in lines]
    low = np.floor(min(values.min() for _, values in logs))
    high = max(low + 1, np.ceil(max(values.max() for _, values in logs)))
    wide, tall = _WIDTH - _LEFT - 10, _HEIGHT - _BOTTOM - 24
    at_x = lambda x: _LEFT + wide * (x - xs[0]) / max(1, xs[-1] - xs[0])
    at_y = lambda y: 24 + tall * (high - y) / (high - low)
    marks = []
    for power in np.arange(low, high + 1, max(1, (high - low) // 5)):
        y = at_y(power)
        marks.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - 10}" stroke="var(--line)"/>')
        text = "0" if 10.0**power <= _FLOOR else f"1e{power:.0f}"
        marks.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for x in sorted({xs[0], xs[-1], *(xs[len(xs) * i // 6] for i in range(1, 6))}):
        marks.append(f'<text x="{at_x(x):.1f}" y="{_HEIGHT - 16}" text-anchor="middle">{x}</text>')
    marks.append(f'<text x="{_WIDTH - 10}" y="{_HEIGHT - 2}" text-anchor="end">{label}</text>')
    for i, (text, values) in enumerate(logs):
        colour = ("var(--one)", "var(--two)")[i]
        points = [(at_x(x), at_y(y)) for x, y in zip(xs, values, strict=False)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        marks.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
        )
        if len(points) <= 60:
            marks += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in points
            ]
        start = _LEFT + 330 * i
        marks.append(f'<rect x="{start}" y="3" width="12" height="4" fill="{colour}"/>')
        marks.append(f'<text x="{start + 18}" y="10">{text}</text>')
    return _svg(_HEIGHT, marks)


def _svg(height: float, marks: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" role="img">{"".join(marks)}</svg>'
