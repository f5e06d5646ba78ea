# A RetinaNet small enough to learn to find drawn shapes on a CPU in minutes
# (`make demo` draws them). From scratch, with batch statistics.
_base_ = "../retinanet/retinanet_bn_800.py"

data_root = "work_dirs/demo/shapes/"
scale = (128, 128)
classes = ("circle", "square", "triangle")
train_pipeline = [
    dict(step, scale=scale) if step["type"] == "Resize" else step for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, scale=scale) if step["type"] == "Resize" else step for step in _base_.test_pipeline
]
train_dataloader = dict(
    batch_size=8,
    dataset=dict(data_root=data_root, metainfo=dict(classes=classes), pipeline=train_pipeline),
)
val_dataloader = dict(
    batch_size=8,
    dataset=dict(data_root=data_root, metainfo=dict(classes=classes), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + "annotations/instances_val2017.json")
test_evaluator = val_evaluator

model = dict(
    backbone=dict(depth=18, base_channels=16, frozen_stages=-1, norm_eval=False, init_cfg=None),
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),
    bbox_head=dict(num_classes=3, in_channels=32, feat_channels=32, stacked_convs=1),
)

# Minutes instead of days: large decay and learning rate stand in for the many
# steps in which filters collapse.
train_cfg = dict(max_epochs=16, val_interval=16)
param_scheduler = [
    dict(type="LinearLR", start_factor=0.01, by_epoch=False, begin=0, end=50),
    dict(type="CosineAnnealingLR", by_epoch=True, convert_to_iter_based=True, T_max=16),
]
optim_wrapper = dict(
    optimizer=dict(lr=0.02, weight_decay=5e-3), clip_grad=dict(max_norm=10, norm_type=2)
)
default_hooks = dict(logger=dict(interval=25), checkpoint=dict(interval=4))
custom_hooks = [dict(type="SparsityLoggerHook", interval=25)]
