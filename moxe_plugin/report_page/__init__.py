"""Shows what recorded runs say as one HTML page that needs nothing else."""
