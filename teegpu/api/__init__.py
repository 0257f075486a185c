"""The endpoint: OpenAI's HTTP interface over the engine of a runner, in the TEE."""
