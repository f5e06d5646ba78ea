"""Is a difference in AP real? COCO's AP, the same under resampled images, and a verdict.

From two result files to the verdict, module by module:

runs        result files and work dirs, and whether they belong together
coco_files  annotations and results into columns, with errors of one line
matching    which boxes match which objects, once per model
evaluate    AP equal to pycocotools, and AP under image weights
compare     intervals over images and seeds, and the verdict
expect      claims that a CI job can fail on
images      the images that weigh most on a difference
tables      all that is said, as data, Markdown and JSON
page        the same as one HTML page
"""
