"""Files that commands read and write: bundles, and the configuration of clients."""
