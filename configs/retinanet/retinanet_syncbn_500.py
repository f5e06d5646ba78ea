# Batch statistics in training, over all processes (2 images each are too few):
# the setting that the paper's theory speaks of.
_base_ = "./retinanet_bn_500.py"

model = dict(backbone=dict(norm_eval=False, norm_cfg=dict(type="SyncBN")))
