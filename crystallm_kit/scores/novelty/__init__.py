"""What is a copy of another, and what is known already."""
