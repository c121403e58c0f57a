"""A page on this machine that shows what a model answers; `mer-r1 serve` opens it. Needs the extra `[serve]`."""
