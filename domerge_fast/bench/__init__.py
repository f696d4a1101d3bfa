"""`domerge-fast bench`: how fast the ops run, beside what this machine could reach."""
