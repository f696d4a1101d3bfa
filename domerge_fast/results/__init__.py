"""What is said of a merge: its report and its model card."""
