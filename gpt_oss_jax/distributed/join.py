"""What a program calls: `distributed_init`, and what its processes then have in common."""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from typing import Any

import jax

from gpt_oss_jax.distributed.detect import Place, detect
from gpt_oss_jax.distributed.lifeline import Lifeline, meet

_PORT = 8482
_HEARTBEAT = 30  # Seconds without a sign of life, after which JAX takes a process for dead.

_line: Lifeline | None = None
_count = 1


def distributed_init(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    port: int = _PORT,
    timeout: float = 300.0,
) -> None:
    """Makes one of several processes, so that `jax.devices()` has the devices of all.

    Every process calls it, before anything touches a device. On slices of Cloud TPU, on TPUs of
    GKE and in steps of Slurm it needs no arguments. Where there is one process only, nothing is
    done and nothing waited for. From then on all processes must take the same steps; when one
    ends without having come to its end, all end, each with a line on stderr.

    Args:
      coordinator: "host" or "host:port" of process 0; ":port" is another port of the host that was
        detected.
      num_processes: How many there are.
      process_id: Which one this is, from 0.
      port: On which process 0 listens, if `coordinator` does not say.
      timeout: Seconds to wait for all.

    Raises:
      ValueError: If not all came, naming those that did not, with what may be the reason; if the
        arguments contradict each other or say too little; if a device was touched before; if it
        was called before.
    """
    global _line, _count
    if _line is not None:
        raise ValueError("distributed_init must be called once; these processes are together.")
    host, port = _address(coordinator, port)
    place = _place(host, num_processes, process_id)
    if place is None or place.count == 1:
        return
    peers = meet(place, port, timeout)
    # It takes SIGTERM for a notice, and the process would go on.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            f"{place.host}:{port}",
            place.count,
            place.index,
            cluster_detection_method=place.method,
            heartbeat_timeout_seconds=_HEARTBEAT,
        )
    except RuntimeError as error:
        raise ValueError(f"distributed_init must come before all else of JAX: {error}") from error
    _line, _count = Lifeline(place.index, peers), place.count
    # Runs before what JAX has registered, which waits for the others.
    atexit.register(_part)


def index() -> int:
    """Number of this process; 0 prompts, prints and writes. Touches no device."""
    return 0 if _line is None else _line.index


def count() -> int:
    """Number of processes. Touches no device."""
    return _count


def broadcast(value: Any) -> Any:
    """Process 0's value, which must be JSON, on every process; the others wait for it.

    Raises:
      ValueError: If there are several processes, but not by `distributed_init`.
    """
    if _line is not None:
        return _line.broadcast(value)
    if jax.process_count() > 1:
        raise ValueError(
            "several processes must be brought together by gpt_oss_jax.distributed_init(), in "
            "place of jax.distributed.initialize()."
        )
    return value


def once(write: Callable[[], None], is_there: Callable[[], bool]) -> None:
    """Has process 0 write something, and then those that do not see it, on disks of their own.

    Args:
      write: What to do.
      is_there: Whether this process sees that it is done.

    Raises:
      ValueError: If it failed on process 0, on every process.
    """
    if count() == 1:
        write()
        return
    failed = None
    if index() == 0:
        try:
            write()
        except Exception as error:
            failed = error
    said = broadcast(failed and str(failed))
    if failed is not None:
        raise failed
    if said is not None:
        raise ValueError(f"process 0: {said}")
    if not is_there():
        write()


def leave(code: int) -> None:
    """Ends this process, and all others with it, if there are others."""
    if _line is not None:
        _line.leave(code)


def await_news() -> None:
    """Waits a little if there are other processes: an error here may be another one's end."""
    if _line is not None:
        _line.await_news()


def _part() -> None:
    # Set by the interpreter when nobody has caught an exception.
    if getattr(sys, "last_value", None) is not None:
        await_news()
        leave(1)
    _line.part()


def _address(coordinator: str | None, port: int) -> tuple[str | None, int]:
    if not coordinator:
        return None, port
    host, colon, named = coordinator.rpartition(":")
    if not colon:
        host, named = coordinator, str(port)
    if not (named.isdecimal() and 0 < int(named) < 65536) or ":" in host:
        raise ValueError(f"coordinator must be host, host:port or :port, got {coordinator!r}.")
    return host or None, int(named)


def _place(host: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    if num_processes == 1 and process_id in (None, 0):
        return None
    if not all(isinstance(x, int | None) for x in (num_processes, process_id)):
        raise ValueError(
            "num_processes and process_id must be int (environment variables are not), got "
            f"{num_processes!r} and {process_id!r}."
        )
    detected = None if None not in (host, num_processes, process_id) else detect()
    if detected is None:
        given = {"coordinator": host, "num_processes": num_processes, "process_id": process_id}
        missing = [name for name, value in given.items() if value is None]
        if len(missing) == len(given):
            return None
        if missing:
            raise ValueError(
                "coordinator, num_processes and process_id must be given together where they are "
                f"not detected; missing: {', '.join(missing)}."
            )
        detected = Place(host, num_processes, process_id)
    place = Place(
        host or detected.host,
        detected.count if num_processes is None else num_processes,
        detected.index if process_id is None else process_id,
        detected.method,
    )
    if not 0 <= place.index < place.count:
        raise ValueError(
            f"process_id must be from 0 to num_processes - 1, got {place.index} of {place.count}."
        )
    return place
