"""What knows nothing of the rest: errors, files, randomness, sections of recipes, schedules, validation, precision."""
