"""Which process of how many this is, from what Slurm, GKE and Cloud TPU tell their machines.

Asks the environment; on a machine with TPU chips also Google's metadata server, which is the
machine's own host. Touches no device.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import urllib.error
import urllib.request
from collections.abc import Callable

import jax

_METADATA_SECONDS = 5.0
_SLURM = (
    "SLURM_JOB_ID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_STEP_NODELIST",
)


@dataclasses.dataclass(frozen=True)
class Place:
    """This process among the others.

    Attributes:
      host: Name or address of the host of process 0.
      count: Processes.
      index: Of this one.
      method: What JAX calls what was detected; "deactivate" if it has nothing to add.
    """

    host: str
    count: int
    index: int
    method: str = "deactivate"


def detect() -> Place | None:
    """Where this process is, or None: it is alone, or nobody says."""
    if all(name in os.environ for name in _SLURM):
        # JAX takes one GPU for each process, by the number that Slurm gives it on its host.
        place = Place(
            _first_node(os.environ["SLURM_STEP_NODELIST"]),
            int(os.environ["SLURM_NTASKS"]),
            int(os.environ["SLURM_PROCID"]),
            "slurm",
        )
    elif "tpu" in (jax.config.jax_platforms or "tpu"):
        place = _on_tpu()
    else:
        return None
    return place if place is not None and place.count > 1 else None


def _on_tpu() -> Place | None:
    hosts = os.environ.get("TPU_PROCESS_ADDRESSES") or os.environ.get("TPU_WORKER_HOSTNAMES")
    worker = os.environ.get("TPU_WORKER_ID")
    setting: Callable[[str], str | None] = os.environ.get
    if not (hosts and worker):
        # JAX sets the variable where it finds no chips, Colab and Kaggle where nobody would answer.
        if "TPU_SKIP_MDS_QUERY" in os.environ or importlib.util.find_spec("libtpu") is None:
            return None
        hosts, worker = _metadata("worker-network-endpoints"), _metadata("agent-worker-number")
        if not (hosts and worker):
            return None
        settings = _settings(_metadata("tpu-env") or "")
        setting = lambda name: os.environ.get(name) or settings.get(name)
    # A host is a name or an address, with or without a port; in an older form name:id:address.
    parts = [host.strip().split(":") for host in hosts.split(",")]
    names = [part[2] if len(part) == 3 else part[0] for part in parts]
    slices, here = (int(setting(f"MEGASCALE_{x}") or 0) for x in ("NUM_SLICES", "SLICE_ID"))
    first = (setting("MEGASCALE_COORDINATOR_ADDRESS") or names[0]).split(":")[0]
    return Place(first, max(1, slices) * len(names), here * len(names) + int(worker))


def _first_node(nodes: str) -> str:
    """Of Slurm's list: node7 of "node7,node9", and node007 of "node[007-010,12],other"."""
    found = re.match(r"([^,\[]+)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", nodes)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST must name nodes, got {nodes!r}.")
    return "".join(part or "" for part in found.groups())


def _settings(text: str) -> dict[str, str]:
    """Lines such as WORKER_ID: '0'."""
    lines = (line.split(":", 1) for line in text.splitlines() if ":" in line)
    return {name.strip(): value.strip().strip("'") for name, value in lines}


def _metadata(key: str) -> str | None:
    """An attribute of this virtual machine, None if it has none or is none of Google's."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(request, timeout=_METADATA_SECONDS) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None
