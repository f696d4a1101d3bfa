"""The command `domerge-fast`."""
