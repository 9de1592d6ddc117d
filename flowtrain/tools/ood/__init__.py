"""Out-of-distribution scores of images, and verdicts by them."""
