"""The whole way of a full-size checkpoint: written, loaded, converted, generated from, exported.

Weights are random, since only their size matters here: `python benchmarks/full_size.py FOLDER
[--model 20b]` needs about 45 GB of disk in FOLDER for 20b, and an accelerator that holds the model.
Each stage is a process of its own, so that its peak memory is its own. Ends with one JSON line.
"""

import argparse
import json
import mmap
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

PROMPT = list(range(1000, 2024))


class HostMemory(threading.Thread):
    """Peak anonymous memory of this process, sampled; mapped files are not in it."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak = 0

    def run(self):
        while True:
            self.peak = max(self.peak, self.now())
            time.sleep(0.02)

    @staticmethod
    def now() -> int:
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.split("RssAnon:")[1].split()[0])


def run(folder: Path, source: str, memory: HostMemory) -> dict:
    """Loads, generates greedily from a fixed prompt, and times it."""
    import jax
    from flax import nnx

    from gpt_oss_jax import SamplingParams, bench, generate, load

    # Starts the back end and its compiler, whose 3.5 GB on a GPU are not the loader's.
    jax.block_until_ready(jax.jit(lambda: 1 + jax.numpy.arange(8))())
    before, start = memory.now(), time.perf_counter()
    memory.peak = before
    model = load(folder / source)
    jax.block_until_ready(nnx.state(model))
    load_seconds = time.perf_counter() - start
    peak_host, peak_load = memory.peak, jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    greedy = SamplingParams(temperature=0)
    start, tokens, first = time.perf_counter(), [], None
    for step in generate(model, PROMPT, max_tokens=65, sampling=greedy, stop_tokens=()):
        first = first or time.perf_counter() - start
        tokens.append(step.token)
    speed = bench.measure(model, prompt_tokens=1024, new_tokens=129)
    return {
        "load_seconds": round(load_seconds, 2),
        "host_peak_load_gb_over_start": round((peak_host - before) / 1e9, 2),
        "device_peak_load_gb": round(peak_load / 1e9, 2),
        "device_peak_gb": round(jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e9, 2),
        "first_token_seconds": round(first, 2),
        "prefill_tokens_per_second": speed.prefill_tokens_per_second,
        "decode_tokens_per_second": speed.decode_tokens_per_second,
        "decode_percent_of_bandwidth": speed.decode_percent_of_bandwidth,
        "bandwidth_gb_per_second": speed.bandwidth_gb_per_second,
        "tokens": tokens,
    }


def compare(folder: Path) -> dict:
    """Every tensor of both folders, byte for byte, read by nothing of the package."""
    one, other = (tensors(folder / name) for name in ("hf", "back"))
    different = [name for name in one if name not in other or one[name] != other[name]]
    different += [name for name in other if name not in one]
    return {"tensors": len(one), "different": different}


def tensors(folder: Path) -> dict:
    """Name -> dtype, shape and a view of the bytes, of every safetensors file in a folder."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            view = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        size = int.from_bytes(view[:8], "little")
        for name, tensor in json.loads(bytes(view[8 : 8 + size])).items():
            if name != "__metadata__":
                begin, end = (8 + size + x for x in tensor["data_offsets"])
                found[name] = (tensor["dtype"], tensor["shape"], view[begin:end])
    return found


def stage(name: str, folder: Path, model: str) -> dict:
    from gpt_oss_jax.checkpoint import convert, export, synthetic

    memory = HostMemory()
    memory.start()
    start, result = time.perf_counter(), {}
    if name == "write":
        synthetic.write(synthetic.config_of(f"synthetic:{model}"), folder / "hf")
    elif name == "convert":
        convert(folder / "hf", folder / "orbax")
    elif name == "export":
        export(folder / "orbax", folder / "back", "hf-mxfp4")
    elif name == "compare":
        result = compare(folder)
    else:
        result = run(folder, name.removeprefix("run_"), memory)
    seconds = time.perf_counter() - start
    size = sum(x.stat().st_size for x in (folder / "hf").glob("*.safetensors"))
    timed = result.get("load_seconds", seconds)
    return {
        "seconds": round(seconds, 2),
        "checkpoint_gb": round(size / 1e9, 2),
        "gb_per_second": round(size / timed / 1e9, 2),
        "host_peak_gb": round(memory.peak / 1e9, 2),
    } | result


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", default="20b")
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        print(json.dumps(stage(args.stage, args.folder, args.model)))
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in ("write", "run_hf", "convert", "run_orbax", "export", "compare"):
        command = [sys.executable, __file__, str(args.folder), "--model", args.model]
        # The second run gets the first one's programs: others may round otherwise.
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(args.folder / "programs")}
        done = subprocess.run(
            [*command, "--stage", name], stdout=subprocess.PIPE, text=True, env=env
        )
        if done.returncode:
            sys.exit(f"stage {name} failed with exit code {done.returncode}")
        results[name] = json.loads(done.stdout.splitlines()[-1])
        shown = {key: value for key, value in results[name].items() if key != "tokens"}
        print(f"{name}: {shown}", file=sys.stderr)
    same = results["run_hf"].pop("tokens") == results["run_orbax"].pop("tokens")
    results["same_greedy_tokens"] = same
    print(json.dumps(results))
    if not same or results["compare"]["different"]:
        sys.exit("the round trip changed something")


if __name__ == "__main__":
    main()
