"""Imports what training needs, also what is only imported on the way: processes forked from this one have it.

Half of the seconds that a run takes to begin are imports which T5, DeepSpeed and TensorBoard do when they are
first used.
"""

import gc
from contextlib import suppress
from importlib import import_module

_OURS = (
    "sat_train.training.build",
    "sat_train.training.callbacks.tensorboard",
    "sat_train.models.text.t5",
    "sat_train.engine.optim.adamw",
)
# Some are private to their library: one that has gone is imported later, if at all.
_OTHERS = (
    "deepspeed",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops",
    "PIL.Image",
    "sentencepiece",
    "setuptools",
    "torch._dynamo",
    "torch.utils.tensorboard",
    "torchvision.transforms.v2",
)

for name in _OURS:
    import_module(name)
for name in _OTHERS:
    with suppress(ImportError):
        import_module(name)
# What is imported stays: a collection need not look through it, and forks share its memory.
gc.collect()
gc.freeze()
