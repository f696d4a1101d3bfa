"""What tests share: how inputs are made, where they run, how results are compared."""
