"""Process groups, the layer backend, and where fp32 masters live."""

import logging
import os
import warnings

import torch

# Both tell, on every import, of optional GPU packages that are not there.
warnings.filterwarnings("ignore", module=r"megatron\.core")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
