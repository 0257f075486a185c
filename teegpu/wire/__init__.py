"""The protocol between TEE runner and GPU server: typed messages, their bytes, and the limits that both sides keep."""
