"""Joins two interfaces by a wire that delivers each frame later: python slow_wire.py IFACE IFACE SECONDS.

For kernels without netem. Frames are read and sent with the kernel's offload header, so that large segments and
checksums that are left to the hardware pass as they are.
"""

from __future__ import annotations

import select
import socket
import sys
import time
from collections import deque

ALL_PROTOCOLS = 0x0003
SOL_PACKET, PACKET_VNET_HDR = 263, 15
OUTGOING = 4  # a frame that this wire sent itself


def tap(interface: str) -> socket.socket:
    """A raw socket on an interface."""
    made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ALL_PROTOCOLS))
    made.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    made.bind((interface, ALL_PROTOCOLS))
    return made


def main() -> None:
    """Carries frames until it is killed."""
    ends = [tap(sys.argv[1]), tap(sys.argv[2])]
    delay_s = float(sys.argv[3])
    waiting: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        pause = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        for end in select.select(ends, [], [], pause)[0]:
            frame, origin = end.recvfrom(2**17)
            if origin[2] != OUTGOING:
                waiting.append((time.monotonic() + delay_s, ends[1 - ends.index(end)], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, out, frame = waiting.popleft()
            out.send(frame)


if __name__ == "__main__":
    main()
