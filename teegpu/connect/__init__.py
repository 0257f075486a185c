"""The verifying proxy: applications talk to it here, and it talks to an endpoint that has proved what it is."""
