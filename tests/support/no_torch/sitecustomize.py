"""Makes torch look uninstalled to a Python whose path begins with this folder."""

import sys

sys.modules["torch"] = None
