"""Models for the Hugging Face Hub."""
