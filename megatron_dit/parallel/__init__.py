"""Process groups, the layer backend, and the location of fp32 master weights under ZeRO."""
