# The schedule of the RetinaNet paper (arXiv 1708.02002, section 4.1): 90k steps
# of 16 images, lr 0.01, divided by 10 at 60k and 80k.
_base_ = "./retinanet_bn_800.py"

train_cfg = dict(_delete_=True, type="IterBasedTrainLoop", max_iters=90000, val_interval=10000)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.001, by_epoch=False, begin=0, end=500),
    dict(type="MultiStepLR", by_epoch=False, milestones=[60000, 80000], gamma=0.1),
]
default_hooks = dict(checkpoint=dict(by_epoch=False, interval=10000))
log_processor = dict(by_epoch=False)
