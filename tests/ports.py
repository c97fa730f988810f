"""TCP ports of this machine."""

import socket


def free_port() -> int:
    """A TCP port that nothing listens on at this moment, on 127.0.0.1."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
