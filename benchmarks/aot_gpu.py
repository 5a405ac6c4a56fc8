"""Compiles a released model for an H200 that is not there, and prints what memory it needs.

Needs jax[cuda13], no GPU. From the root: python benchmarks/aot_gpu.py 20b --pool-gb 15.16
XLA tries nothing out here; on the device it may find products that take more.
"""

import argparse
import importlib.util
import os
import sys
import time
from pathlib import Path

import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gpt_oss_jax.checkpoint import outline
from gpt_oss_jax.config import GPT_OSS_20B, GPT_OSS_120B
from gpt_oss_jax.generate import ahead, loop
from gpt_oss_jax.model.cache import bucket
from gpt_oss_jax.sampling import SamplingParams

CONFIGS = {"20b": GPT_OSS_20B, "120b": GPT_OSS_120B}


def h200() -> jax.Device:
    """A device of which nothing can be asked but to be compiled for."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = [Path(x) / "cu13" for x in (nvidia.submodule_search_locations if nvidia else ())]
    folder = next((x for x in folders if x.exists()), None)
    if folder is None or importlib.util.find_spec("jax_cuda13_plugin") is None:
        sys.exit('there is nothing to compile with: pip install "gpt-oss-jax[cuda13]"')
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={folder}"
    os.environ["XLA_FLAGS"] = flags.strip()
    jax.config.update("jax_platforms", "cpu")
    target = Path(__file__).with_name("h200.txtpb").read_text()
    where = {"topology_name": "", "topology": "1x1x1", "target_config": target}
    return topologies.get_topology_desc(platform="cuda", **where).devices[0]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", choices=CONFIGS)
    parser.add_argument("--pool-gb", type=float, default=143, help="what JAX may have, 1e9 bytes")
    parser.add_argument("--context", type=int, default=32768, help="slots of the cache")
    parser.add_argument("--batch", type=int, default=1, help="rows")
    parser.add_argument("--tokens", type=int, nargs="+", help="of a prompt, a row and call")
    parser.add_argument("--implementation", help="of the kernels; default: the fastest that can")
    args = parser.parse_args()
    device, memory = h200(), 1e9 * args.pool_gb
    here = SingleDeviceSharding(device)
    rows = bucket(args.batch)
    chunks = args.tokens or sorted(set(loop.call_sizes(rows, "gpu", memory)))
    with jax.default_device(device):
        model = outline(CONFIGS[args.model])
        model.implementation = args.implementation
        place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here)
        model = jax.tree.map(place, model)
        options = {"memory": memory, "samplings": [SamplingParams(0.0)]}
        start, cache, most = time.perf_counter(), 0, 0
        for program in ahead.of_cache(model, rows, args.context, chunks, **options):
            needs, took = program.compiled.memory_analysis(), time.perf_counter() - start
            beside = needs.temp_size_in_bytes
            if program.name == "empty_cache":
                cache = needs.output_size_in_bytes
            most = max(most, beside)
            print(f"{program.what}: {beside / 1e6:,.1f} MB beside what it takes and gives", end="")
            print(f", compiled in {took:.0f} s", flush=True)
            start = time.perf_counter()
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(model))
    parts = " + ".join(f"{x / 1e9:.2f}" for x in (weights, cache, most))
    whole = (weights + cache + most) / 1e9
    print(f"weights, cache and the most beside: {parts} = {whole:.2f} GB of {args.pool_gb:g}")


if __name__ == "__main__":
    main()
