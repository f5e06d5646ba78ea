"""What collapsed filters cost a detector, and what psBN gives back: Table 2 in miniature.

- :mod:`.data`: BCCD's images and boxes in memory
- :mod:`.settings`: all that decides the outcome of a run
- :mod:`.training`: one run: rounds of SGD on a RetinaNet, with COCO results after each
- :mod:`.experiments`: which runs make up each experiment
- :mod:`.engine`: does the runs that are left
- :mod:`.summary`: finished runs as JSON and as Markdown
- :mod:`.figures`: and as pictures, from the JSON alone

The pretrained backbones are runs of the CIFAR-10 study (``studies.cifar``).
``python -m studies.detection`` is the command line, README.md the manual, results/ what has been
measured.
"""
