"""Twin worlds in which no choice has seen the timelines that are scored."""
