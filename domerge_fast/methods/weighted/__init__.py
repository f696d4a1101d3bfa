"""Methods whose result is a weighted sum of the updates."""
