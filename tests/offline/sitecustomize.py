"""Put on PYTHONPATH by `make test`: every address outside this machine is refused, as on a machine
without a network.

Jupyter kernels talk over 127.0.0.1, so that stays open.
"""

import errno
import socket

_connect, _connect_ex, _getaddrinfo = (
    socket.socket.connect,
    socket.socket.connect_ex,
    socket.getaddrinfo,
)


def _is_local(host: object) -> bool:
    host = host.decode() if isinstance(host, bytes) else host
    return host in (None, "", "localhost", "::1") or str(host).startswith("127.")


def _is_outside(address: object) -> bool:
    return isinstance(address, tuple) and not _is_local(address[0])


def connect(self: socket.socket, address: object) -> None:
    if _is_outside(address):
        raise OSError(errno.ENETUNREACH, f"the network is blocked in this test: {address}")
    return _connect(self, address)


def connect_ex(self: socket.socket, address: object) -> int:
    return errno.ENETUNREACH if _is_outside(address) else _connect_ex(self, address)


def getaddrinfo(host: object, *rest: object, **options: object) -> list:
    if not _is_local(host):
        raise socket.gaierror(socket.EAI_NONAME, f"the network is blocked in this test: {host}")
    return _getaddrinfo(host, *rest, **options)


socket.socket.connect, socket.socket.connect_ex, socket.getaddrinfo = (
    connect,
    connect_ex,
    getaddrinfo,
)
