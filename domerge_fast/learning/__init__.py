"""Coefficients of prepared merges that are found with data: by gradients, by losses, by trying."""
