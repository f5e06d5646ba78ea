# RetinaNet-R50 at scale 800 with BN as mmdet ships it: the baseline of Table 2.
_base_ = "mmdet::retinanet/retinanet_r50_fpn_1x_coco.py"

custom_imports = dict(imports=["psbn_mmdet.registry"])
# Finds torchvision://resnet50 without torchvision, and resumes under torch >= 2.6.
runner_type = "psbn_mmdet.Runner"
# mmengine draws a new seed per process start otherwise, and a resumed run would
# go on with another order of images.
randomness = dict(seed=0)
# Filter collapse in the log, the curves and WORK_DIR; does not touch the training.
custom_hooks = [dict(type="SparsityLoggerHook", interval=500)]
