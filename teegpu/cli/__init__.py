"""The command line: one module per command, each of which reads its arguments, builds a Config, and makes one call.

Only ``main`` and ``common`` are imported to answer ``teegpu --help``; a command's module is imported when it is called.
"""
