"""The Lightning callbacks, and metrics of streams."""
