"""Put on PYTHONPATH by `make test`: every address outside this machine is refused, as on a machine without a network.

Jupyter kernels talk over 127.0.0.1, so that stays open. Each refusal is a line in the file named by COURSE_REFUSALS, if it is set.
"""

import os
import socket

_connect, _getaddrinfo = socket.socket.connect, socket.getaddrinfo


def _refuse(host: str) -> None:
    if os.environ.get("COURSE_REFUSALS"):
        with open(os.environ["COURSE_REFUSALS"], "a", encoding="utf-8") as file:
            file.write(f"{host}\n")
    raise OSError(101, f"the network is blocked in this test: {host}")


def _is_local(host: object) -> bool:
    return host in (None, "", "localhost", "::1") or str(host).startswith("127.")


def connect(self: socket.socket, address: object) -> None:
    if isinstance(address, tuple) and not _is_local(address[0]):
        _refuse(address[0])
    return _connect(self, address)


def getaddrinfo(host: object, *rest: object, **options: object) -> list:
    if not _is_local(host.decode() if isinstance(host, bytes) else host):
        _refuse(host)
    return _getaddrinfo(host, *rest, **options)


socket.socket.connect, socket.getaddrinfo = connect, getaddrinfo
