"""The maker of data files, as a fixture."""

from support.record_files import write  # noqa: F401
