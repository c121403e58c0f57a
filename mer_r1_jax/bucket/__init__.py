"""Paths in a Cloud Storage bucket: objects, and local copies of what has to be a file."""
