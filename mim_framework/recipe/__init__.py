"""From a YAML file and overrides to a checked recipe. Read in this order: recipe, draft, rules."""
