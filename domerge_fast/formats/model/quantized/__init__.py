"""Base models in quantized formats: their weights as numbers again, read on demand."""
