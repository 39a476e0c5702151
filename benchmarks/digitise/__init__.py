"""Paper well log to numbers: a small end-to-end use of veerloss on one real well.

``python -m benchmarks.digitise`` draws raster pages from a real well, trains a small
segmentation network with softmax focal + Lovász-Softmax, and recovers the curves.
"""
