"""Going through a transformer block by block, with the weights of one block in memory at a time.

`blocks.py` runs a model's blocks one by one, `forwards.py` many batches abreast, `sequence.py` goes through their
layers in the order in which they run, `hessian.py` sums up what a layer is given, and `finished.py` keeps what is done,
so that a killed run goes on. `lazy_weights.py` reads and writes checkpoints tensor by tensor. What becomes of a layer's
weight is the business of a method: `quantize: gptq` and `prune: unstructured` both go this way.
"""
