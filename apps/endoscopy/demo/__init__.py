"""``gates endoscopy demo``: a page that sizes what is dropped on it."""
