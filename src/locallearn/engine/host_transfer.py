"""What it takes from a host's processor to send: the copying in and out of sockets."""

from __future__ import annotations

import socket
import statistics
import threading
import time

_NUM_BYTES = 8 * 2**20
_REPEATS = 7


def measure_host_transfer_ms_per_mib() -> float:
    """Computing time of sending a MiB from one process to another on this host, as gloo does: over
    a socket of the loopback device. Half of what both ends take together; the median of several.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        sender = socket.create_connection(server.getsockname())
        receiver, _ = server.accept()
    with sender, receiver:
        content, arrived = bytes(_NUM_BYTES), bytearray(_NUM_BYTES)
        times = [_transfer_ms(sender, receiver, content, arrived) for _ in range(_REPEATS)]
    return statistics.median(times) / 2 / (_NUM_BYTES / 2**20)


def _transfer_ms(
    sender: socket.socket, receiver: socket.socket, content: bytes, arrived: bytearray
) -> float:
    """Of all of this process's threads."""
    began = time.process_time()
    sending = threading.Thread(target=sender.sendall, args=(content,))
    sending.start()
    rest = memoryview(arrived)
    while rest:
        rest = rest[receiver.recv_into(rest) :]
    sending.join()
    return 1000 * (time.process_time() - began)
