"""What commands print: tables, sizes, progress."""
