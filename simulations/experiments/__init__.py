"""The experiments of the papers; see `papers.py`."""
