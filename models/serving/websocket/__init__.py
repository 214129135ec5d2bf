"""The data plane over WebSocket (RFC 6455), for clients that stay: many requests at once, and news pushed to them."""
