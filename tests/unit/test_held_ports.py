"""A port held for a process that has yet to start is given to that process alone."""

from __future__ import annotations

import socket
from contextlib import closing
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import TCPStore

from sat_train.testing.ports import HeldPort


def test_a_held_port_is_refused_to_others_and_taken_by_the_store() -> None:
    with HeldPort() as port:
        with closing(socket.socket()) as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", port.number))
        store = TCPStore(
            "127.0.0.1",
            port.number,
            1,
            is_master=True,
            timeout=timedelta(seconds=120),
            wait_for_workers=False,
        )
        assert store.port == port.number
        store.set("key", "value")
        assert store.get("key") == b"value"
