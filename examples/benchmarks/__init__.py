"""Benchmarks: each prints a table and writes what it measured as JSON."""
