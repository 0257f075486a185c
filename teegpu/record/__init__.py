"""Events of a run, and the files that keep them as they happen."""
