"""Collapsed filters in networks that others trained and published.

``checkpoints.json`` lists them: where each comes from, its licence and checksum, and how it was
trained, as far as its authors say so. The files themselves are fetched by whoever runs
``python -m studies.published`` and never kept here; results/ has what was counted in them.
"""
