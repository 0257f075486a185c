"""The live view of a run: a reader of its record, in a process of its own. The run never waits for it."""
