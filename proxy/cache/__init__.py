"""Who decides: the only package that sees both storage and upstream."""
