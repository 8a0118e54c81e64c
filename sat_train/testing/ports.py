"""Ports on which a process that has yet to start will listen."""

from __future__ import annotations

import socket


class HeldPort:
    """A free port of this machine that nobody else is given until `close`.

    A port that is looked up and let go may be another process's before ours listens on it: the kernel gives
    it to the next that asks for any port, and every outgoing connection asks. A bound socket keeps it from
    them. As it has SO_REUSEADDR and does not listen, a process that asks for this very port with SO_REUSEADDR
    gets it nevertheless: torch's store and SLURM's daemons do.
    """

    def __init__(self) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", 0))
        self.number = int(self._socket.getsockname()[1])

    def close(self) -> None:
        """Lets go of the port; whoever listens on it keeps it."""
        self._socket.close()

    def __enter__(self) -> HeldPort:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
