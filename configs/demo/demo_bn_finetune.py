# A second round from a checkpoint, given as load_from: the learning rate jumps
# back up, which is when the paper sees filters collapse.
_base_ = "./demo_bn.py"

randomness = dict(seed=1)
