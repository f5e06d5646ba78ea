_base_ = "./demo_bn_finetune.py"

model = dict(backbone=dict(norm_cfg=dict(type="psBN")))
