"""A line between the ranks that breaks when one of them dies.

Symbols: W ranks.
"""

import os
import secrets
import socket
import weakref
from contextlib import suppress
from multiprocessing.connection import Connection, wait

import torch.distributed as dist

from simclr_pl.distributed import rank, world_size

LOST = 75  # exit code: "try again later", EX_TEMPFAIL of sysexits.h

_SECONDS = 60.0  # for a rank to connect
# A host that is gone without a word, seconds and trials: half a minute in all.
_KEEPALIVE = ((socket.TCP_KEEPIDLE, 10), (socket.TCP_KEEPINTVL, 5), (socket.TCP_KEEPCNT, 4))


class Peers:
    """One connection from rank 0 to every other rank, which the kernel closes when a process ends.

    So a death is known at once, whatever the backend: a collective of NCCL would wait for it. Rank 0,
    which alone hears of every death, tells the others. Collective.

    Args:
        address: of rank 0's host, as the others know it.

    Raises:
        OSError: rank 0 cannot be reached, or a rank does not connect to it.
    """

    def __init__(self, address: str) -> None:
        self._ranks: dict[Connection, int] = {}
        _close_in_children(self)
        place: list[object] = [None, None]
        if rank() == 0:
            family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
            with socket.create_server(("", 0), family=family, backlog=world_size()) as server:
                server.settimeout(_SECONDS)
                key = secrets.token_bytes(16)  # strangers do not know it
                place = [server.getsockname()[1], key]
                dist.broadcast_object_list(place, src=0)
                while len(self._ranks) < world_size() - 1:
                    self._accept(server, key)
        else:
            dist.broadcast_object_list(place, src=0)
            port, key = place  # type: ignore[assignment]
            line = socket.create_connection((address, port), _SECONDS)  # type: ignore[arg-type]
            line.sendall(key + rank().to_bytes(4, "big"))
            self._add(line, 0)

    def _accept(self, server: socket.socket, key: bytes) -> None:
        line, _ = server.accept()
        line.settimeout(_SECONDS)
        with suppress(OSError):
            hello = line.recv(len(key) + 4)  # not more: a message may follow at once
            if secrets.compare_digest(hello[: len(key)], key):
                self._add(line, int.from_bytes(hello[len(key) :], "big"))
                return
        line.close()

    def _add(self, line: socket.socket, number: int) -> None:
        line.settimeout(None)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            line.setsockopt(socket.IPPROTO_TCP, option, value)
        self._ranks[Connection(line.detach())] = number

    def wait(self, wake: Connection, seconds: float) -> tuple[int, str] | None:
        """Waits for the end of a rank, for something to read from ``wake``, or until the time is over.

        Returns:
            The exit code that is due to it and what has happened, or None.
        """
        for ready in wait([wake, *self._ranks], seconds):
            if ready is wake:
                continue
            assert isinstance(ready, Connection)
            number = self._ranks.pop(ready)
            try:
                code, text = ready.recv_bytes().decode().split(" ", 1)
            except (EOFError, OSError):
                return LOST, f"rank {number} has died"
            if text:
                return int(code), text
        return None

    def leave(self, code: int = 0, reason: str = "") -> None:
        """Says to the others that the end of this process, which follows, is no death.

        Args:
            code: that they are to end with, too, if they do not end by themselves.
            reason: empty where they are to go on.
        """
        for connection in self._ranks:
            with suppress(OSError):  # it has ended, too
                connection.send_bytes(f"{code} {reason}".encode())
        self._close()

    def _close(self) -> None:
        for connection in self._ranks:
            connection.close()
        self._ranks = {}


def _close_in_children(peers: Peers) -> None:
    """Loader workers would hold the connections open for as long as they outlive their rank."""
    this = weakref.ref(peers)

    def close() -> None:
        if (peers := this()) is not None:
            peers._close()

    os.register_at_fork(after_in_child=close)
