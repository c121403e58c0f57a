"""Attention of completions that grow token by token behind a prompt they share."""
