"""Files that go into exported folders as they are: they import torch, diffusers and safetensors alone."""
