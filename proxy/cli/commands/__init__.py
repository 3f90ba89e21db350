"""The commands, one module for each or for a few that belong together, as `export` and `import`."""
