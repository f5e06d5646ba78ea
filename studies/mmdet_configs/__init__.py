"""psBN in every config of mmdet: `python -m studies.mmdet_configs`."""
