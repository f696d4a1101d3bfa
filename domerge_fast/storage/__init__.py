"""Bytes on disk: files that are read as they were opened, and strict JSON."""
