"""Process groups, the layer backend, and the location of fp32 master weights under ZeRO."""

import logging
import os
import warnings

import torch

# These warn on every import, or for every layer, about options we do not use and packages that are not installed.
warnings.filterwarnings("ignore", module=r"megatron\.core|transformer_engine")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed warns that it found no accelerator
