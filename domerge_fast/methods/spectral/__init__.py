"""Methods on the singular vectors of stacked factors, in R x R matrices."""
