"""Terminal output of the commands: sizes, tables and progress. Nothing here talks to the daemon."""
