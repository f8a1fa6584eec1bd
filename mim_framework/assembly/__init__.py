"""From a checked recipe to built parts. Start at `builder.build_model`."""
