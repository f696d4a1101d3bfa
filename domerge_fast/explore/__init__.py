"""A page on this machine with sliders for a merge: what it is before it is made."""
