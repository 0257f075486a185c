"""The GPU servers of a run, seen from the TEE runner: connections, handshake, requests, failover."""
