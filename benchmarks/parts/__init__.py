"""What the workers run: a function builds a system and returns what measures one round of it."""
