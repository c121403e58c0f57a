"""Attention: the interface in `api`, its meaning in `reference`."""
