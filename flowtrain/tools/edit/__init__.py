"""Attributes as directions in latent space."""
