"""Images of the store: what they consist of, and what is complete."""
