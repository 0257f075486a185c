"""What each panel of the monitor says: pure, from a snapshot and a size to lines."""
