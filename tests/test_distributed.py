"""Several processes: found by themselves, missed by name, one in what they do, ended together."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from checkpoint_oracle import read_all, same_bits
from sizes import SHARDABLE

from gpt_oss_jax import SamplingParams, cli, distributed_init, generate, load
from gpt_oss_jax.checkpoint import export, synthetic
from gpt_oss_jax.cli import build_parser, processes
from gpt_oss_jax.distributed import detect as detecting, join
from gpt_oss_jax.distributed.detect import Place, detect
from gpt_oss_jax.distributed.lifeline import meet

ROOT = Path(__file__).parents[1]


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


@contextlib.contextmanager
def two_processes(*command, **options):
    """Two of a command, each with `{port}` and `{index}` filled in; killed if they do not end."""
    port, environment = free_port(), {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    kind = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen(
            [sys.executable, *(part.format(port=port, index=index) for part in command)],
            env=os.environ | environment, text=True, **kind, **options,
        )
        for index in range(2)
    ]  # fmt: skip
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ended(process, timeout=60):
    """Exit code, stdout and the last line of stderr."""
    out, err = process.communicate(timeout=timeout)
    return process.returncode, out, err.splitlines()[-1] if err else ""


def test_two_agree_with_one_and_end_together(tmp_path):
    """Convert, load, generate and save on a mesh of both; then process 1 is killed."""
    source = synthetic.write(SHARDABLE, tmp_path / "hf", "hf", 1)
    command = [str(ROOT / "tests/one_of_several.py"), "localhost:{port}", "2", "{index}", "model"]
    with two_processes(*command, str(source), str(tmp_path)) as processes:
        (_, *second), first = ended(processes[1]), ended(processes[0], 20)
    found = [
        json.loads(next(line for line in out.splitlines() if line.startswith("{")))
        for out in (first[1], second[0])
    ]
    assert processes[1].returncode == -signal.SIGKILL
    assert first[0] == 1
    assert first[2] == "gpt-oss-jax: process 1 is gone, so process 0 ends, too."

    # Seeds that nobody chose among them: other ones would not always show in the tokens.
    assert found[0] == found[1]
    assert found[0]["devices"] == 4
    tensors = read_all(source)
    # Half of the experts, heads and vocabulary, and all that is not split.
    assert found[0]["read"] < 0.6 * sum(x.nbytes for x in tensors.values())

    params = SamplingParams(seed=7)
    steps = generate(load(source), [1, 2, 3], max_tokens=20, sampling=params, stop_tokens=())
    tokens, logprobs = zip(*((step.token, step.logprob) for step in steps), strict=True)
    assert [token for token, _ in found[0]["seeded"]] == list(tokens)
    np.testing.assert_allclose([x for _, x in found[0]["seeded"]], logprobs, atol=1e-4)
    export(tmp_path / "orbax", tmp_path / "from-orbax", "hf-mxfp4")
    for name in ("from-orbax", "back"):
        same_bits(read_all(tmp_path / name), tensors)


def test_the_others_end_when_process_0_is_killed():
    command = ["tests/one_of_several.py", "localhost:{port}", "2", "{index}", "wait"]
    with two_processes(*command, cwd=ROOT) as processes:
        assert all(json.loads(process.stdout.readline()) for process in processes)
        processes[0].kill()
        _, said = processes[1].communicate(timeout=20)
    assert processes[1].returncode == 1
    # JAX may have time for lines of its own, before or after.
    assert "gpt-oss-jax: process 0 is gone, so process 1 ends, too." in said.splitlines()
    assert "Traceback" not in said


def test_command_line_converts_once_and_only_process_0_speaks(tmp_path):
    synthetic.write(SHARDABLE, tmp_path / "hf", "hf", 1)
    where = ["--coordinator", "localhost:{port}", "--num-processes", "2", "--process-id", "{index}"]
    # What process 0 was asked counts.
    command = ["-m", "gpt_oss_jax", "convert", "hf", "to-{index}", *where]
    with two_processes(*command, cwd=tmp_path) as processes:
        results = [ended(process) for process in processes]
    assert results == [(0, "", "gpt-oss-jax: to-0 is written, read back and equal"), (0, "", "")]
    assert sorted(x.name for x in tmp_path.iterdir()) == ["hf", "to-0"]


def test_another_command_than_that_of_process_0_is_refused(monkeypatch):
    line = Mock(index=1)
    line.broadcast.return_value = {"command": "chat", "model": "tiny"}
    monkeypatch.setattr(join, "_line", line)
    monkeypatch.setattr(join, "_count", 2)
    monkeypatch.setattr(processes, "distributed", join)
    monkeypatch.setattr(join, "distributed_init", Mock())
    args = build_parser().parse_args(["generate", "tiny", "text"])
    with pytest.raises(ValueError, match="process 0 was started with chat, this one with generate"):
        processes.join(args)


def test_who_is_missing_is_named():
    port, said = free_port(), []

    def come(index):
        with pytest.raises(ValueError) as refusal:
            meet(Place("localhost", 4, index), port, 1.5)
        said.append(str(refusal.value))

    threads = [threading.Thread(target=come, args=[index]) for index in (0, 2)]
    for thread in threads:
        thread.start()
    with stranger(port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n")
        for thread in threads:
            thread.join(10)
    assert len(said) == 2
    for text in said:
        assert f"of 4 processes these did not come to localhost:{port} within 2 s: 1, 3" in text
        assert f"--allow=tcp:{port}" in text
        assert "--coordinator localhost:8476" in text


def stranger(port) -> socket.socket:
    """A connection, as soon as somebody listens."""
    for _ in range(100):
        with contextlib.suppress(OSError):
            return socket.create_connection(("localhost", port))
        time.sleep(0.02)
    raise TimeoutError("nobody listens")


def test_who_is_missing_on_the_command_line(capsys):
    where = ["--coordinator", f"localhost:{free_port()}", "--num-processes", "2", "--process-id"]
    assert cli.main(["generate", "tiny", "Hello", *where, "1", "--wait", "1"]) == 2
    assert "process 1 of 2 did not reach process 0" in capsys.readouterr().err


def test_process_0_is_missing():
    with pytest.raises(ValueError, match=r"process 1 of 2 did not reach process 0 at localhost:"):
        meet(Place("localhost", 2, 1), free_port(), 0.5)


def test_processes_that_disagree_say_so():
    port, said = free_port(), []

    def come(place):
        with pytest.raises(ValueError) as refusal:
            meet(place, port, 5)
        said.append(str(refusal.value))

    places = [Place("localhost", 2, 0), Place("localhost", 3, 2)]
    threads = [threading.Thread(target=come, args=[place]) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert len(said) == 2
    assert said[0] == said[1]
    assert "process 0 waits for 2 processes, but one came as 2 of 3" in said[0]


def test_a_taken_port_is_said():
    with socket.create_server(("", 0)) as server, pytest.raises(ValueError, match="listened on"):
        meet(Place("localhost", 2, 0), server.getsockname()[1], 1)


SLURM = {
    "SLURM_JOB_ID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_STEP_NODELIST": "tpu[007-009,12],other",
}
GKE = {"TPU_WORKER_HOSTNAMES": "job-0.svc,job-1.svc", "TPU_WORKER_ID": "1"}
SLICES = {
    "MEGASCALE_COORDINATOR_ADDRESS": "slice-0:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, None),
        (SLURM, Place("tpu007", 4, 3, "slurm")),
        (SLURM | {"SLURM_STEP_NODELIST": "a1,b[2-3]"}, Place("a1", 4, 3, "slurm")),
        (SLURM | {"SLURM_NTASKS": "1"}, None),
        (GKE, Place("job-0.svc", 2, 1)),
        (GKE | SLICES, Place("slice-0", 4, 3)),
        ({"TPU_WORKER_HOSTNAMES": "localhost", "TPU_WORKER_ID": "0"}, None),
    ],
)
def test_detected(monkeypatch, variables, place):
    alone(monkeypatch, variables)
    assert detect() == place


@pytest.mark.parametrize(
    "endpoints", ["10.0.0.2,10.0.0.3", "a:1:10.0.0.2,b:2:10.0.0.3"], ids=["addresses", "triples"]
)
def test_detected_on_a_slice_of_cloud_tpu(monkeypatch, endpoints):
    alone(monkeypatch, {})
    answers = {"worker-network-endpoints": endpoints, "agent-worker-number": "1"}
    monkeypatch.setattr(detecting, "_metadata", lambda key: answers.get(key))
    monkeypatch.setattr(detecting.importlib.util, "find_spec", lambda name: name)
    monkeypatch.delenv("TPU_SKIP_MDS_QUERY")
    assert detect() == Place("10.0.0.2", 2, 1)
    answers["tpu-env"] = "ZONE: 'z'\n" + "\n".join(f"{k}: '{v}'" for k, v in SLICES.items())
    assert detect() == Place("slice-0", 4, 3)


def alone(monkeypatch, variables):
    """An environment with these variables only, of those that matter; JAX may use a TPU."""
    for name in (*SLURM, *GKE, *SLICES, "TPU_PROCESS_ADDRESSES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in ({"TPU_SKIP_MDS_QUERY": "1"} | variables).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(detecting.jax, "config", type("", (), {"jax_platforms": None}))


def test_what_is_given_wins_over_what_is_detected(monkeypatch):
    alone(monkeypatch, GKE)
    assert join._place("other", None, None) == Place("other", 2, 1)
    assert join._place(None, None, None) == Place("job-0.svc", 2, 1)
    assert join._place(None, 1, None) is None
    assert join._place("other", 3, 2) == Place("other", 3, 2)


@pytest.mark.parametrize("shared", [True, False])
def test_a_process_that_does_not_see_what_was_written_writes_too(monkeypatch, shared):
    line, written = Mock(index=1), []
    line.broadcast.return_value = None
    monkeypatch.setattr(join, "_line", line)
    monkeypatch.setattr(join, "_count", 2)
    join.once(lambda: written.append(1), lambda: shared)
    assert written == ([] if shared else [1])
    line.broadcast.return_value = "no room"
    with pytest.raises(ValueError, match="process 0: no room"):
        join.once(None, None)


def test_addresses():
    assert join._address(None, 8482) == (None, 8482)
    assert join._address("host", 8482) == ("host", 8482)
    assert join._address("host:1", 8482) == ("host", 1)
    assert join._address(":1", 8482) == (None, 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("host", 2), "missing: process_id"),
        (("host", 2, 2), "process_id must be from 0"),
        (("host", 2, "0"), "must be int .*, got 2 and '0'"),
        (("host:port", 2, 1), "coordinator must be"),
    ],
)
def test_refuses(monkeypatch, arguments, message):
    alone(monkeypatch, {})
    with pytest.raises(ValueError, match=message):
        distributed_init(*arguments)


def test_alone_nothing_is_done(monkeypatch):
    alone(monkeypatch, {})
    monkeypatch.setattr(join, "meet", None)
    distributed_init()
    assert (join.count(), join.index(), join.broadcast("value")) == (1, 0, "value")
