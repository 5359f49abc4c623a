"""Files that are copied unchanged into exported folders: they import only torch, diffusers and safetensors."""
