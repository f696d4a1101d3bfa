"""Bytes on disk: inputs read as they were opened, strict JSON, safetensors, locked folders."""
