"""Files that commands read and write: bundles, client configuration."""
