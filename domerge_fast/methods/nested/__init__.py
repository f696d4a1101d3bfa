"""Methods that bring the updates to another basis, and let a method work there."""
