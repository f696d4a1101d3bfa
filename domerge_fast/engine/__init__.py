"""Takes a plan group by group through a method: read ahead, compute, write behind."""
