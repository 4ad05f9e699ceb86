"""Trains ERNIE 4.5 mixture-of-experts models into reasoners, natively in PaddlePaddle."""

import warnings

from ernie_train.core.cpu import __version__ as __version__
from ernie_train.core.cpu import configure_process

# Paddle reads its CPU settings once, on import, so they are set before anything imports it.
configure_process()
# Paddle looks for ccache on import to compile C++ extensions; nothing here compiles any.
warnings.filterwarnings("ignore", message="No ccache found", category=UserWarning)
