"""Split LLM inference between a trusted TEE runner and an untrusted GPU server."""

__version__ = "0.1.0"
