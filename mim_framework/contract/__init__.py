"""The plugin contract. Read in this order: components, hooks, mask, records, specs, step, run."""
