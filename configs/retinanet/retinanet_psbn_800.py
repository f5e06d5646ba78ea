_base_ = "./retinanet_bn_800.py"

model = dict(backbone=dict(norm_cfg=dict(type="psBN")))
