"""`deeprelax train`: data, models, methods, the training loop, and what is written about a run.

Nothing here is imported by `import deeprelax_cuda`; the packages it needs are the ``train`` extra.
"""
