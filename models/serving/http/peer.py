"""Who is at the other end of a transport."""

from __future__ import annotations

import asyncio
import socket

from models.serving.caller import LOCAL_PEER, Peer


def peer_of(transport: asyncio.BaseTransport) -> Peer:
    """Who is at the other end: an address, and the name in the client's certificate when one was verified."""
    sock = transport.get_extra_info("socket")
    if sock is not None and sock.family == socket.AF_UNIX:
        address = "unix"
    else:
        # A client that has reset the connection already has no name: it must not pass for a local one.
        name = transport.get_extra_info("peername")
        address = str(name[0]) if isinstance(name, tuple) and name else ""
    tls = transport.get_extra_info("ssl_object")
    if tls is None:
        return LOCAL_PEER if address == LOCAL_PEER.address else Peer(address)
    subject = (tls.getpeercert() or {}).get("subject", ())
    names = [value for part in subject for key, value in part if key == "commonName"]
    return Peer(address, names[0] if names else None, encrypted=True)
