"""Which plugins are installed, what they offer, and the classes behind the names in a recipe. Start at `Registry`."""
