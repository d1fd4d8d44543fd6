"""Imports CUDA builds of torchvision, torchaudio and torchcodec beside a CPU build of torch.

The package registry holds only CUDA builds of the three. Their compiled extensions do not load on a CPU build of
torch, and `import torchvision` then dies for want of an operator schema that Python code refers to. A `.pth` file
imports this module at every interpreter start, so that Ray workers are covered too. On a machine with matching builds
it changes nothing; the set-up installs it only where they do not match.
"""

import importlib.abc
import importlib.machinery
import sys

_kept_alive = []  # a torch.library.Library takes its schemas with it when it is collected


def _after_torchvision_extension(module):
    if module._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "FRAGMENT")
    for schema in (
        "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
        "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    ):
        library.define(schema)
    _kept_alive.append(library)


def _after_torchaudio_utils(module):
    load = module._load_lib

    def load_or_report(lib):
        try:
            return load(lib)
        except OSError:
            return False

    module._load_lib = load_or_report


_AFTER = {
    "torchvision.extension": _after_torchvision_extension,
    "torchaudio._extension.utils": _after_torchaudio_utils,
}


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then mends the module; torchcodec's OSError becomes the ImportError that callers expect."""

    def __init__(self, name, loader):
        self.name = name
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        try:
            self.loader.exec_module(module)
        except OSError as error:
            raise ImportError(f"{self.name}: its compiled part does not load here") from error
        if self.name in _AFTER:
            _AFTER[self.name](module)

    def __getattr__(self, attribute):
        return getattr(self.loader, attribute)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname not in _AFTER and fullname != "torchcodec":
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(fullname, spec.loader)
        return spec


sys.meta_path.insert(0, _Finder())
