"""The CIFAR-10 study of the psBN paper (arXiv 2001.11216, sections 3 to 5.2).

- :mod:`.data`: CIFAR-10 in its binary version, on the device
- :mod:`.networks`: ResNet-20/56/110 and VGG11/16 with any normalization
- :mod:`.settings`: all that decides the outcome of a run
- :mod:`.rounds`: one run: rounds of cosine-annealed SGD on mmengine's Runner
- :mod:`.experiments`: which runs make up each figure and table
- :mod:`.engine`: does the runs of an experiment, here or as a share of a cluster
- :mod:`.summary`: finished runs in numbers and tables
- :mod:`.figures`: and in pictures

``python -m studies.cifar`` is the command line, README.md the manual, results/ what has been
measured.
"""
