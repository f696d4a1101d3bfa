"""What a merge is written as."""
