"""Where the time of a decode step goes inside its CUDA graph: needs a Hopper.

From the root: python benchmarks/timeline.py synthetic:20b --batch 8 --prompt 1024
A profiler sees a graph as one thing, or serialises it. Here every warp of our kernels notes when it
began, when those before it had ended (`griddepcontrol.wait`) and when it ended itself, by the
device's own clock; what a step takes with notes is printed, to be held against `bench`. Each kernel
is given the time from the end of the launch before it to its own end. Kernels of XLA's take no
notes: their time is part of the next one's.
"""

import argparse
import collections
import sys

import jax
import jax.numpy as jnp
import numpy as np

from gpt_oss_jax import bench, load
from gpt_oss_jax.kernels.launch import launch
from gpt_oss_jax.kernels.ptx import NEXT, WAIT
from gpt_oss_jax.kernels.target import why_not_hopper

NOTES = 2**24  # Of 32 bytes.
SKIPPED_STEPS = 4


class Notes:
    """In device memory, where kernels write without JAX's knowledge.

    Attributes:
      names: Kernels by number, each with its warps.
    """

    def __init__(self):
        self.names: list[tuple[str, int]] = []
        self._array = jax.block_until_ready(jnp.zeros(8 * (NOTES + 2), jnp.uint32))
        self._place = self._array.unsafe_buffer_pointer()

    def taking(self, launch):
        """A `launch` of programs that take notes, in the first thread of every warp."""

        def run(name, text, outs, inputs, *, grid, warpgroups, **options):
            kernel = name, 4 * warpgroups * grid
            if kernel not in self.names:
                self.names.append(kernel)
            text = self._noting(text, self.names.index(kernel))
            return launch(name, text, outs, inputs, grid=grid, warpgroups=warpgroups, **options)

        return run

    def _noting(self, text: str, number: int) -> str:
        first = min(at for at in map(text.find, (NEXT, WAIT)) if at >= 0)
        begin = f"""
.reg .b64 note_begin, note_ready, note_end, note_at; .reg .b32 note_n, note_what; .reg .pred noting;
mov.u64 note_begin, %globaltimer;
mov.u32 note_n, %tid.x; and.b32 note_n, note_n, 31; setp.eq.u32 noting, note_n, 0;
mov.u64 note_at, {self._place}; mov.u32 note_n, 0; @noting atom.global.add.u32 note_n, [note_at], 1;
"""
        end = f"""
mov.u64 note_end, %globaltimer; mov.u32 note_what, {number};
min.u32 note_n, note_n, {NOTES - 1}; mul.wide.u32 note_at, note_n, 32;
add.u64 note_at, note_at, {self._place + 32};
@noting st.global.v2.b64 [note_at], {{note_begin, note_ready}};
mov.b64 note_begin, {{note_what, $0}};
@noting st.global.v2.b64 [note_at + 16], {{note_end, note_begin}};
}}"""
        text = text[:first] + begin + text[first:]
        text = text.replace(WAIT, f"{WAIT} mov.u64 note_ready, %globaltimer;")
        return text.rstrip().removesuffix("}") + end

    @property
    def taken(self) -> int:
        """So far."""
        return int(np.asarray(self._array[:1])[0])

    def launches(self, first: int) -> list[tuple[str, np.ndarray]]:
        """From note `first` on, in the order of their ends: name, and [warps, 3] in ns."""
        taken = self.taken
        if taken > NOTES:
            raise SystemExit(f"room for {NOTES:,} notes, {taken:,} were taken: make fewer tokens.")
        notes = np.asarray(self._array)[8:].view(np.uint64).reshape(-1, 4)[first:taken]
        number = notes[:, 3] & 0xFFFFFFFF
        times, found = notes[:, :3].astype(np.int64), []
        for n, (name, warps) in enumerate(self.names):
            own = times[number == n]
            own = own[np.argsort(own[:, 0], kind="stable")]
            # No launch begins before the last one of its kind has ended.
            found += [(name, launch) for launch in own.reshape(-1, warps, 3)]
        return sorted(found, key=lambda launch: launch[1][:, 2].max())


def report(launches, steps):
    """A line for each kernel and what it came after; medians of the launches."""
    found, before, end = collections.defaultdict(list), None, 0
    for name, warps in launches:
        if before is not None:
            begin, ready, ends = (warps - end).T / 1e3
            found[before, name].append(
                [begin.min(), ready.min(), np.median(ready), np.median(ends), ends.max()]
            )
        before, end = name, max(end, warps[:, 2].max())
    print("us after the end of the one before: first begin, first and median wait over, median and")
    print(f"last end; then launches, and us of all of them, of a step; {steps} steps")
    for (before, name), times in sorted(found.items(), key=lambda x: -sum(t[-1] for t in x[1])):
        if len(times) * 2 < steps:
            continue
        columns = " ".join(f"{x:6.2f}" for x in np.median(times, axis=0))
        total = sum(t[-1] for t in times) / steps
        print(f"{before:24} {name:24} {columns} {len(times) / steps:5.1f} {total:8.1f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--new-tokens", type=int, default=32)
    args = parser.parse_args()
    if reason := why_not_hopper():
        sys.exit(f"there is nothing to measure: {reason}")
    notes = Notes()
    plain, noting = launch, notes.taking(launch)
    for module in list(sys.modules.values()):
        if getattr(module, "launch", None) is plain:
            module.launch = noting

    model = load(args.model)
    size = args.batch, args.prompt
    prompts = np.random.default_rng(0).integers(model.config.vocab_size, size=size, dtype=np.int32)
    bench._timed(model, prompts, args.new_tokens)
    first = notes.taken
    _, seconds, _ = bench._timed(model, prompts, args.new_tokens)
    print(f"{args.model}, {size}: {1e6 * seconds / (args.new_tokens - 1):,.0f} us a step, noted")
    found = notes.launches(first)
    # Whole steps, the last ones: attention of a step and layer is one launch.
    attention = [i for i, (name, _) in enumerate(found) if name.startswith("attention_1_")]
    steps = args.new_tokens - 1 - SKIPPED_STEPS
    layers = model.config.num_hidden_layers
    report(found[attention[-layers * steps - 1] + 1 :], steps)


if __name__ == "__main__":
    main()
