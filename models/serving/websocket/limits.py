"""What one WebSocket server and one session may take."""

from __future__ import annotations

import msgspec


class WebSocketLimits(msgspec.Struct, frozen=True):
    """`message_bytes`: of one message, as a body over REST; `message_frames`: it may be cut into.

    `connections`: sessions at once. `in_flight`: requests of one session in work at once; beyond it nothing more is read.
    `subscriptions`: of one session, of models and jobs together; asked about once a second. `outgoing_bytes`: waiting for a
    client that does not read, the answers to all it has in flight included; beyond it, or after `write_seconds`, it is cut off.
    `ping_seconds`: of silence before a ping. `pong_seconds`: for its pong, and for the other half of closing.
    `message_seconds`: for one frame to arrive. `turn`: frames of one session that are taken, and requests of its queue that
    are begun, before all others have their turn. `invalid_messages`: one after another that cannot be read, then the session
    ends.
    """

    message_bytes: int = 64 * 1024 * 1024
    message_frames: int = 1024
    connections: int = 1024
    in_flight: int = 32
    subscriptions: int = 16
    outgoing_bytes: int = 128 * 1024 * 1024
    write_seconds: float = 30.0
    ping_seconds: float = 20.0
    pong_seconds: float = 20.0
    message_seconds: float = 60.0
    turn: int = 64
    invalid_messages: int = 64
