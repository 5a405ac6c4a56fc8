"""One process of several, for test_distributed.py: `one_of_several.py ADDRESS COUNT INDEX TASK ...`.

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
    mesh = make_mesh(expert=2, tensor=2)
    model = load(source, mesh=mesh)
    from_safetensors = sum(read)
    convert(source, f"{folder}/orbax")
    model = load(f"{folder}/orbax", mesh=mesh)
    save(model, f"{folder}/back")
    runs = {
        name: [(x.token, x.logprob) for x in generate(model, [1, 2, 3], sampling=params)]
        for name, params in (
            ("greedy", SamplingParams(temperature=0.0)),
            ("seeded", SamplingParams(seed=7)),
            ("free", SamplingParams()),
        )
        for generate in [lambda *a, **k: _generate(*a, **k)]
    }
    found({"read": from_safetensors, "devices": len(jax.devices()), "runs": runs})
    if jax.process_index() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        list(_generate(model, [1, 2, 3], sampling=SamplingParams(temperature=0.0)))


def _generate(model, prompt, sampling):
    return generate(model, prompt, max_tokens=20, sampling=sampling, stop_tokens=())


def die_first(*_) -> None:
    """Process 0 dies."""
    found({"devices": len(jax.devices())})
    if jax.process_index() == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def fail(*_) -> None:
    """Process 1 fails."""
    found({"devices": len(jax.devices())})
    if jax.process_index() == 1:
        raise ValueError("on purpose")
    time.sleep(60)


if __name__ == "__main__":
    coordinator, count, index, task, *arguments = sys.argv[1:]
    jax.config.update("jax_num_cpu_devices", 2)
    distributed_init(coordinator, int(count), int(index), timeout=30)
    {"model": model_work, "die_first": die_first, "fail": fail}[task](*arguments)
