"""Ray drivers, one file per stage, and the command line."""
