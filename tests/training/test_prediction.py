"""loss.png shows the prediction in a run's folder, or warns about an invalid one."""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from megatron_dit.config import load_config
from megatron_dit.training.prediction import PREDICTION, Prediction
from megatron_dit.training.run_folder import RunFolder
from tests.helpers.configs import write_config


@pytest.fixture
def figures(monkeypatch):
    """Figures saved by matplotlib."""
    saved = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (saved.append(figure), original(figure, *a, **k)))
    return saved


def plotted(tmp_path):
    """Plot a run of two steps whose folder already has a prediction."""
    folder = RunFolder(load_config(write_config(tmp_path)))
    folder.open(0)
    for step in (1, 2):
        folder.log(step, {"loss": 1.0 / step, "grad_norm": 1.0})
    folder.plot()
    folder.close()
    folder.unlock()


@pytest.mark.parametrize("steps", [[10], [1, 5, 10]])
def test_loss_plot_shows_the_prediction(steps, tmp_path, figures):
    one = [0.5] * len(steps)
    Prediction(steps=steps, loss=one, low=[0.4] * len(steps), high=[0.7] * len(steps)).write(tmp_path / "run")
    plotted(tmp_path)
    (figure,) = figures
    _, labels = figure.axes[0].get_legend_handles_labels()
    assert sorted(labels) == ["measured", "predicted, with 90% interval"]
    drawn = [list(line.get_xdata()) for line in figure.axes[0].get_lines()]
    assert steps in drawn
    low, high = figure.axes[0].get_ylim()
    assert low < 0.4
    assert high > 0.7
    assert (tmp_path / "run" / "loss.png").stat().st_size > 5000


INVALID = [
    "",
    "{",
    "[]",
    "[" * 100_000,
    '{"steps": [1]}',
    '{"steps": [1], "loss": [NaN], "low": [1], "high": [1]}',
    '{"steps": [1], "loss": [2], "low": [1], "high": [1.5]}',
    '{"steps": [2, 1], "loss": [1, 1], "low": [1, 1], "high": [1, 1]}',
    '{"steps": [1], "loss": [1, 1], "low": [1], "high": [1]}',
    '{"steps": [], "loss": [], "low": [], "high": []}',
    '{"steps": [1], "loss": ["__import__"], "low": [1], "high": [1]}',
]


@pytest.mark.parametrize("text", INVALID, ids=range(len(INVALID)))
def test_invalid_prediction_is_warned_about_and_not_drawn(text, tmp_path, figures, caplog):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / PREDICTION).write_text(text)
    plotted(tmp_path)
    assert figures[0].axes[0].get_legend() is None
    (message,) = caplog.messages
    assert "is not a valid prediction" in message
    assert "\n" not in message
