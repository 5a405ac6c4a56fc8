"""Attention with sinks and a window, positions instead of masks."""
