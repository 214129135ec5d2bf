"""Metrics, statistics and traces of the data plane: counted for about a microsecond a request, formatted when asked for."""
