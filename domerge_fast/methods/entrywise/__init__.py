"""Methods on the entries of the updates."""
