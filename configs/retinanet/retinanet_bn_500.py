_base_ = "./retinanet_bn_800.py"

# The shorter side 500, the longer one bounded in the same proportion as at 800.
scale = (833, 500)
train_pipeline = [
    dict(step, scale=scale) if step["type"] == "Resize" else step for step in _base_.train_pipeline
]
test_pipeline = [
    dict(step, scale=scale) if step["type"] == "Resize" else step for step in _base_.test_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
