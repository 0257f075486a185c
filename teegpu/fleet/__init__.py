"""A fleet of GPU servers: Ray places whole ``teegpu serve`` groups on machines, and is no part of what runners send."""
