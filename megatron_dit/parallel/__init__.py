"""Process groups, the layer backend, and where fp32 masters live."""

import logging
import os
import warnings

import torch

# They tell, on every import or for every layer, of options that we do not use and packages that are not there.
warnings.filterwarnings("ignore", module=r"megatron\.core|transformer_engine")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
