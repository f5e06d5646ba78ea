_base_ = "./retinanet_syncbn_500.py"

model = dict(backbone=dict(norm_cfg=dict(type="psSyncBN")))
