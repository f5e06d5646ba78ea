"""Is the AP difference real? COCO's AP, the same under resampled images, and a verdict.

coco_files  annotations, results and work dirs, read with one-line errors
evaluate    matching and AP equal to pycocotools, once and under image weights
compare     intervals over images and seeds, and the verdict
report      Markdown, JSON, the layout of Table 2, expectations
page        the self-contained HTML page
"""
