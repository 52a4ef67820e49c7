"""Streams of experiences for Avalanche, made in memory from what packages ship: no download, no cache on disk."""
