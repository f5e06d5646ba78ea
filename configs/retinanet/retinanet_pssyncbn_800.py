_base_ = "./retinanet_syncbn_800.py"

model = dict(backbone=dict(norm_cfg=dict(type="psSyncBN")))
