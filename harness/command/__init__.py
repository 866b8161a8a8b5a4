"""The command line of an application."""
