"""``gates endoscopy demo``: a page that sizes the polyps on dropped files."""
