"""Bridges to other libraries. Each module imports its library itself; nothing here is imported by the rest up front."""
