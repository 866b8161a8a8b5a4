"""What the endoscopy suite times."""
