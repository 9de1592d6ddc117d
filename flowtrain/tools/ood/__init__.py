"""Out-of-distribution scores of images."""
