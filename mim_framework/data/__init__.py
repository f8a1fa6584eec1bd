"""From files to batches. Read in this order: sources (where samples come from), decode (bytes to pixels, and what is
refused), views (crops and flips), loader (which sample at which position, and prefetching)."""
