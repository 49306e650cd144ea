"""Time and memory against published formulations: `make bench`."""
