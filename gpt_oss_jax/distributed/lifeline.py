"""A connection from every process to process 0, held for as long as they run together.

JAX's own service aborts when a process does not come or goes away, with a stack trace that names
nobody. Here all meet first, on the port that JAX then takes over; whoever is missing is named; and
what closes without a word has ended, which ends all others with one line. Messages are JSON, one a
line.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

from gpt_oss_jax.distributed.detect import Place

_LOGGER = logging.getLogger(__name__)
_RETRY, _HELLO, _FAREWELL = 0.2, 5.0, 5.0  # Seconds.
_PATIENCE = 5.0  # Seconds, after which it is said what is waited for.
_GRACE = 1.0  # Seconds, in which a process that fails like another can say so itself.
# A host that is silent, unplugged say, counts as lost after 10 + 3 * 5 seconds.
_KEEPALIVE = (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 3))


class Peer:
    """One end of a connection."""

    def __init__(self, connection: socket.socket):
        self.connection = connection
        self._rest = b""
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _KEEPALIVE:
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, message: Any) -> None:
        """Sends; if nobody is there, whoever receives finds out."""
        with contextlib.suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, timeout: float | None = None) -> Any:
        """The next message, None when the other end has closed.

        Raises:
          ValueError: If what comes is no message of ours.
          TimeoutError: If none comes in so many seconds.
        """
        self.connection.settimeout(timeout)
        while b"\n" not in self._rest:
            try:
                new = self.connection.recv(65536)
            except TimeoutError:
                raise
            except OSError:
                new = b""
            if not new:
                return None
            self._rest += new
        line, self._rest = self._rest.split(b"\n", 1)
        return json.loads(line)

    def is_closed(self) -> bool:
        """Whether the other end has closed, and nothing it sent is left to be read."""
        self.connection.settimeout(0)
        try:
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True


def meet(place: Place, port: int, timeout: float) -> dict[int, Peer]:
    """Waits until all processes have come.

    Args:
      place: This process.
      port: Of process 0.
      timeout: Seconds to wait.

    Returns:
      A connection to every other process for process 0, one to process 0 for the others.

    Raises:
      ValueError: Naming who did not come, and what to do; or if the processes disagree on how many
        they are, two are the same, or the port is taken.
    """
    end = time.monotonic() + timeout
    if place.index:
        with _waiting(f"process {place.index} waits for process 0 at {place.host}:{port}"):
            return {0: _go_to_first(place, port, end, timeout)}
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(
            ("", port), family=family, backlog=place.count, dualstack_ipv6=both
        )
    except OSError as error:
        raise ValueError(
            f"port {port} of this host cannot be listened on: {error}. Name another everywhere, "
            f"such as --coordinator {place.host}:{port + 1}."
        ) from error
    peers: dict[int, Peer] = {}
    with server, _waiting(f"process 0 waits for {place.count - 1} others at port {port}"):
        try:
            while len(peers) < place.count - 1:
                server.settimeout(max(0.01, end - time.monotonic()))
                with contextlib.suppress(TimeoutError):
                    _take(Peer(server.accept()[0]), place, peers)
                for who in [who for who, peer in peers.items() if peer.is_closed()]:
                    peers.pop(who).connection.close()
                if time.monotonic() >= end and len(peers) < place.count - 1:
                    raise ValueError(_missing(place, port, timeout, peers))
        except BaseException as error:
            for peer in peers.values():
                peer.send({"no": str(error)})
                peer.connection.close()
            raise
    for peer in peers.values():
        peer.send({"go": True})
    return peers


@contextlib.contextmanager
def _waiting(what: str) -> Iterator[None]:
    timer = threading.Timer(_PATIENCE, _LOGGER.info, [what])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _take(peer: Peer, place: Place, peers: dict[int, Peer]) -> None:
    """Lets one in that says who it is; anything else that knocks at a port is sent away."""
    try:
        hello = peer.receive(_HELLO)
        who, of = int(hello["process"]), int(hello["of"])
    except (ValueError, TypeError, KeyError, TimeoutError):
        peer.connection.close()
        return
    wrong = None
    if of != place.count or not 0 < who < of:
        wrong = f"process 0 waits for {place.count} processes, but one came as {who} of {of}"
    elif who in peers and not peers[who].is_closed():
        wrong = f"two processes came as {who} of {of}"
    if wrong:
        message = f"{wrong}: give every process the same number of them and its own id."
        peer.send({"no": message})
        peer.connection.close()
        raise ValueError(message)
    if who in peers:
        peers[who].connection.close()
    peers[who] = peer


def _go_to_first(place: Place, port: int, end: float, timeout: float) -> Peer:
    why = "nobody answers"
    while (left := end - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((place.host, port), min(left, _HELLO))
        except OSError as error:
            why = str(error)
        else:
            peer = Peer(connection)
            peer.send({"process": place.index, "of": place.count})
            answer = {}
            with contextlib.suppress(ValueError, TimeoutError):
                # Process 0 may have begun to wait later, and says who is missing.
                answer = peer.receive(left + _HELLO) or {}
            if "go" in answer:
                return peer
            connection.close()
            if "no" in answer:
                raise ValueError(answer["no"])
            why = "whoever is there is not process 0, or has ended"
        time.sleep(min(_RETRY, max(0.0, left)))
    raise ValueError(
        f"process {place.index} of {place.count} did not reach process 0 at {place.host}:{port} "
        f"within {timeout:.0f} s ({why}). {_fix(place, port)}"
    )


def _missing(place: Place, port: int, timeout: float, peers: dict[int, Peer]) -> str:
    missing = [str(who) for who in range(1, place.count) if who not in peers]
    here = ["0", *map(str, sorted(peers))]
    return (
        f"of {place.count} processes these did not come to {place.host}:{port} within "
        f"{timeout:.0f} s: {', '.join(missing)} (here: {', '.join(here)}). {_fix(place, port)}"
    )


def _fix(place: Place, port: int) -> str:
    return (
        "Start the same command on every host, at about the same time. If they all run, TCP port "
        f"{port} is closed between them: the firewall rule that Google Cloud makes for TPUs opens "
        f"8476, so --coordinator {place.host}:8476 may do; or open it with\n  gcloud compute "
        f"firewall-rules create gpt-oss-jax --network=default --allow=tcp:{port} "
        "--source-ranges=10.0.0.0/8"
    )


class Lifeline:
    """Watches the others, and speaks to them."""

    def __init__(self, index: int, peers: dict[int, Peer]):
        self.index = index
        self._peers = peers
        self._values: queue.SimpleQueue = queue.SimpleQueue()
        self._leaving, self._lost = threading.Event(), threading.Lock()
        self._watchers = [
            threading.Thread(target=self._watch, args=item, name="gpt-oss-lifeline", daemon=True)
            for item in peers.items()
        ]
        for watcher in self._watchers:
            watcher.start()

    def broadcast(self, value: Any) -> Any:
        """Process 0's value, on every process; it must be JSON."""
        if self.index:
            return self._values.get()
        for peer in self._peers.values():
            peer.send({"value": value})
        return json.loads(json.dumps(value))

    def part(self) -> None:
        """Says that this process has come to its end as it should."""
        for peer in self._peers.values():
            peer.send({"bye": True})

    def leave(self, code: int) -> None:
        """Ends this process at once, and the others with it."""
        self._leaving.set()
        if not self.index:
            self._end_others("process 0 ended with an error")
        _exit(code)

    def await_news(self) -> None:
        """Waits a little, for the end that another process's end may be."""
        time.sleep(2 * _GRACE)

    def _watch(self, who: int, peer: Peer) -> None:
        parted = False
        while (message := peer.receive()) is not None:
            if "value" in message:
                self._values.put(message["value"])
            parted |= "bye" in message
            if "end" in message:
                self._end(message["end"], _GRACE)
        if not parted:
            # Where process 0 is gone JAX is about to abort.
            self._end(f"process {who} is gone", 0.0 if self.index else _GRACE)

    def _end(self, why: str, grace: float) -> None:
        if self._leaving.is_set() or self._lost.locked():
            return
        time.sleep(grace)
        if self._leaving.is_set() or not self._lost.acquire(blocking=False):
            return
        sys.stderr.write(f"gpt-oss-jax: {why}, so process {self.index} ends, too.\n")
        if not self.index:
            self._end_others(why)
        _exit(1)

    def _end_others(self, why: str) -> None:
        """They end before this one, and with it JAX's service, does: else JAX aborts them."""
        for peer in self._peers.values():
            peer.send({"end": why})
        end = time.monotonic() + _FAREWELL
        while time.monotonic() < end and not all(map(_is_over, self._watchers)):
            time.sleep(0.05)


def _is_over(watcher: threading.Thread) -> bool:
    return watcher is threading.current_thread() or not watcher.is_alive()


def _exit(code: int) -> None:
    """Ends the process, whatever its threads wait for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
