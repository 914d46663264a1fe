"""Benchmarks and static reports. Not installed; imports triton_conv3d, and nothing of it imports this."""
