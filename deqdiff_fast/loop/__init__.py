"""The loop over rounds and its decisions, on the host and on a device. It names no solver."""
