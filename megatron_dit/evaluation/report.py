"""Print the result of an evaluation."""

from __future__ import annotations

from rich.console import Console

from megatron_dit.evaluation.evaluate import Result
from megatron_dit.evaluation.protocol import LossProtocol, Protocol
from megatron_dit.runtime.table import Table
from megatron_dit.runtime.text import printable


def print_result(result: Result) -> None:
    """Print a table of the metrics that names the protocol, and what the result can be compared with."""
    protocol = result.protocol
    print(f"{printable(result.source)}: protocol {protocol.name} ({result.fingerprint})")
    table = Table()
    table.add_column("metric")
    table.add_column("value", justify="right")
    for name, value in result.metrics.items():
        table.add_row(name, f"{value:.6g}")
    Console().print(table)
    print(
        f"{_origin(protocol, generated=result.step is not None)}\ncomparable only to results with the fingerprint "
        f"{result.fingerprint}, which covers every key of the protocol and the content of its files"
    )


def _origin(protocol: Protocol | LossProtocol, *, generated: bool) -> str:
    """Return what was evaluated. Nothing is known about images that were not generated here."""
    if isinstance(protocol, LossProtocol):
        return f"{protocol.samples} samples at {protocol.timesteps} timesteps, seed {protocol.seed}"
    how = (
        f"{'labels: ' + protocol.labels if protocol.labels else 'prompts: ' + str(protocol.prompts)}, solver "
        f"{protocol.solver}, {protocol.steps} steps, guidance {protocol.guidance:g}"
    )
    origin = f"generated with {how}" if generated else f"not generated here; the protocol asks for {how}"
    return f"{protocol.images} images, {origin}"
