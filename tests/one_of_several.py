"""One process of several, for test_distributed.py: `ADDRESS COUNT INDEX TASK ...`.

Says what it found on stdout, a line of JSON.
"""

import json
import os
import signal
import sys
import time

import jax

from gpt_oss_jax import SamplingParams, distributed_init, generate, load, make_mesh, save
from gpt_oss_jax.checkpoint import convert, files
from gpt_oss_jax.generate import device


def found(values) -> None:
    print(json.dumps(values), flush=True)


def model_work(source, folder) -> None:
    """Converts, loads, generates, saves; then process 1 dies while process 0 goes on."""
    read = []
    read_into = files.LocalFolder.read_into

    def counted(self, name, offset, out):
        read.append(out.nbytes)
        read_into(self, name, offset, out)

    files.LocalFolder.read_into = counted
    load(source, mesh=make_mesh(expert=4))
    from_safetensors = sum(read)
    convert(source, f"{folder}/orbax")
    model = load(f"{folder}/orbax", mesh=make_mesh(expert=2, tensor=2))
    save(model, f"{folder}/back", format="hf-mxfp4")
    seeds, begin = [], device.begin

    def noted(cache, seeds_B, *rest):
        seeds.extend(seeds_B.tolist())
        return begin(cache, seeds_B, *rest)

    device.begin = noted
    seeded, free = _generated(model, seed=7), _generated(model, seed=None)
    counts = {"read": from_safetensors, "devices": len(jax.devices())}
    found(counts | {"seeded": seeded, "free": free, "seeds": seeds})
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        _generated(model, seed=7)


def _generated(model, seed) -> list[tuple[int, float]]:
    """Tokens past the window, with their log-probabilities."""
    params = SamplingParams(seed=seed)
    steps = generate(model, [1, 2, 3], max_tokens=20, sampling=params, stop_tokens=())
    return [(step.token, step.logprob) for step in steps]


def wait(*_) -> None:
    """Until the other one ends."""
    found({"devices": len(jax.devices())})
    time.sleep(60)


if __name__ == "__main__":
    coordinator, count, index, task, *arguments = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    distributed_init(coordinator, int(count), int(index), timeout=30)
    {"model": model_work, "wait": wait}[task](*arguments)
