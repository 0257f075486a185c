"""What stands between the runner's products and the wire where a run is private or verified."""
