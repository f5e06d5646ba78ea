_base_ = "./retinanet_bn_500.py"

model = dict(backbone=dict(norm_cfg=dict(type="psBN")))
