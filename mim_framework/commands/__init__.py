"""What a user types: the command line, and what each command does."""
