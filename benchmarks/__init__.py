"""Measurements that show, once, what the product promises of itself. Not installed; see README.md."""
