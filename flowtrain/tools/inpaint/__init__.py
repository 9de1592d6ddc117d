"""Missing pixels, sampled from their posterior."""
