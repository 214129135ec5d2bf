"""HTTP/1.1 for pure handlers: connections on httptools, and the sockets they come from."""
