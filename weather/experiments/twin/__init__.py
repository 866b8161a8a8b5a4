"""Twin experiments: a nature run, its observations, and methods that must find it."""
