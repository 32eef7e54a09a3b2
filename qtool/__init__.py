"""qtool: the post-training quantization workbench for large language models."""

from qtool.hookspecs import Entry, hookimpl

__version__ = "0.1.0"
__all__ = ["Entry", "__version__", "hookimpl"]
