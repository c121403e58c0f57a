"""Configurations that come with the package: `--config=synthetic:smoke` finds them by name, from any folder."""
