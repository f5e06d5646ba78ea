from setuptools import setup
setup(name='psbn_mmdet', version='0.1.0', packages=[])
