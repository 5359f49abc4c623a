"""``megatron-dit verify``: compare layouts with a single process, in the first steps and across checkpoints."""

from megatron_dit.verify.layout_parity import Comparison, Trace, compare, disturbed, verify
from megatron_dit.verify.layouts import LAYOUTS, REFERENCE, Layout
from megatron_dit.verify.resume_parity import Pair, verify_resume

__all__ = [
    "LAYOUTS",
    "REFERENCE",
    "Comparison",
    "Layout",
    "Pair",
    "Trace",
    "compare",
    "disturbed",
    "verify",
    "verify_resume",
]
