"""Which experts a row goes to, and their weights."""
