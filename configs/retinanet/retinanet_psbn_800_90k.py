_base_ = "./retinanet_bn_800_90k.py"

model = dict(backbone=dict(norm_cfg=dict(type="psBN")))
