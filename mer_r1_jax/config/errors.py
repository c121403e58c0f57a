"""The error every configuration mistake raises."""


class ConfigError(ValueError):
    """A configuration that cannot be used; the message names each field, what it got and what it expects."""
