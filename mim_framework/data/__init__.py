"""From files to batches. Read in this order: stores (bytes of files), sources (where samples come from), decode (bytes
to pixels, and what is refused), views (crops and flips), order (which sample at which position), reader, prefetch (in
workers), loader (what a run iterates over). Companions are what travels beside the views."""
