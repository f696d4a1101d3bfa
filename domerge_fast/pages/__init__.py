"""Pages that people look at: what is drawn, how it is drawn, and the templates around it."""
