"""How a run goes, without labels: measures, the loss on kept images, verdicts, a page. Start at `evaluation.py`."""
