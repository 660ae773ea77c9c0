"""The address that the server listens on."""

import ipaddress
import socket

from sae_steer.errors import StartError


def bind(host: str, port: int) -> socket.socket:
    """Takes the port, before anything slow is loaded; connections are refused until the server listens.

    Raises:
        StartError: The address cannot be had.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind, protocol)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind(address)
    except OSError as error:
        reason = error.strerror or error
        raise StartError(f"Cannot bind {host} port {port}: {reason}. Choose others with --host and --port.") from None
    return sock


def url_of(sock: socket.socket) -> str:
    """The address of a bound socket."""
    host, port = sock.getsockname()[:2]
    return f"http://[{host}]:{port}" if sock.family == socket.AF_INET6 else f"http://{host}:{port}"


def is_local(address: str) -> bool:
    """Whether only this machine reaches a bound address."""
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
