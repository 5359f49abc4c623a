"""evaluate --follow: each checkpoint that a run keeps is evaluated once, while the run saves, deletes and is killed."""

import json
import shutil
import signal
import subprocess
import sys
import threading
import time

import pytest
import yaml

from megatron_dit.checkpoint.listing import delete, list_checkpoints
from megatron_dit.checkpoint.load import open_checkpoint
from megatron_dit.cli import run
from megatron_dit.data.scenes import held_out_captions
from megatron_dit.evaluation import validation
from megatron_dit.evaluation.checkpoint import evaluate_checkpoint
from megatron_dit.evaluation.follow import follow
from megatron_dit.evaluation.protocol import load_protocol
from megatron_dit.parallel.topology import SOLO, connect
from megatron_dit.sampling.model import load_model
from megatron_dit.sampling.sampler import Sampler
from tests.helpers.configs import write_config

MAIN = [sys.executable, "-m", "megatron_dit"]


def config_of(folder, dataset, steps):
    """Write the config of a run and a protocol for it, and return the config's path."""
    (folder / "protocol.yaml").write_text(
        yaml.safe_dump({"kind": "validation_loss", "name": "loss", "samples": 16, "data": str(dataset)})
    )
    keys = {"data.path": str(dataset), "train.steps": steps, "checkpoint.every": 5, "checkpoint.keep": 3}
    return write_config(folder, **keys)


@pytest.fixture(scope="module")
def trained(dataset, tmp_path_factory):
    """A finished run with the checkpoints of steps 10, 15 and 20, and a protocol."""
    path = config_of(tmp_path_factory.mktemp("follow"), dataset, steps=20)
    assert run(["train", str(path)]) == 0
    return path.parent


def results_of(folder):
    return sorted(path.stem for path in (folder / "evaluation" / "loss").glob("*.json"))


def toy_protocol(folder):
    (folder / "prompts.txt").write_text("\n".join(held_out_captions(4, seed=0)))
    values = {"name": "toy", "metrics": ["scene_score"], "images": 4, "prompts": str(folder / "prompts.txt")}
    (folder / "toy.yaml").write_text(yaml.safe_dump({**values, "steps": 1, "guidance": 1.0}))
    return load_protocol(folder / "toy.yaml")


def test_images_that_an_interrupted_evaluation_left_are_used_or_replaced(copied):
    protocol = toy_protocol(copied.parent)
    reader = open_checkpoint(copied)
    folder = copied / "evaluation" / "toy" / "step_00000020"

    def evaluate(keep):
        connect()
        sampler = lambda: Sampler(reader.folder)  # noqa: E731
        return evaluate_checkpoint(reader, [protocol], sampler, copied, SOLO, 4, keep_images=keep)[0].metrics

    expected = evaluate(keep=True)
    kept = folder / "images" / "000" / "000000.png"
    time_of = kept.stat().st_mtime_ns
    (folder / "images" / "000" / "000003.png").unlink()
    assert evaluate(keep=True) == expected
    assert kept.stat().st_mtime_ns != time_of  # its batch was generated again
    settings = folder / "sample.json"
    settings.write_text(settings.read_text().replace('"sha256": "', '"sha256": "0'))
    assert evaluate(keep=False) == expected
    assert not folder.exists()
    assert folder.with_suffix(".png").exists()


class Recorder:
    """Evaluates checkpoints and remembers their names."""

    def __init__(self, folder, before=lambda path: None):
        self.folder, self.before, self.names = folder, before, []
        self.protocol = load_protocol(folder.parent / "protocol.yaml")

    def __call__(self, reader):
        self.names.append(reader.folder.name)
        self.before(reader.folder)
        evaluate_checkpoint(reader, [self.protocol], None, self.folder, SOLO, 16, keep_images=False)

    def follow(self):
        connect()
        return follow(self.folder, self.protocol, self, poll=0.05)


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    values = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump({**values, "run_dir": str(tmp_path / "run")}))
    return tmp_path / "run"


def test_each_checkpoint_of_a_finished_run_is_evaluated_once(copied):
    recorder = Recorder(copied)
    assert recorder.follow() == 3
    assert recorder.names == results_of(copied) == ["step_00000010", "step_00000015", "step_00000020"]
    assert recorder.follow() == 0
    (copied / "evaluation" / "loss" / "step_00000015.json").write_text("{")  # an unreadable result is replaced
    assert recorder.follow() == 1
    other = copied.parent / "protocol.yaml"
    other.write_text(other.read_text().replace("samples: 16", "samples: 24"))
    assert Recorder(copied).follow() == 3  # by another protocol of the same name


def test_a_checkpoint_deleted_while_it_is_read_is_skipped(copied, capsys):
    def before(path):
        if path.name == "step_00000015":
            delete(path)

    recorder = Recorder(copied, before)
    assert recorder.follow() == 2
    assert results_of(copied) == ["step_00000010", "step_00000020"]
    assert "step_00000015 was deleted by its run while it was read" in capsys.readouterr().out


def test_a_checkpoint_deleted_after_its_weights_are_loaded_is_evaluated(copied, monkeypatch):
    def load(reader, *arguments, ema, **options):
        model = load_model(reader, *arguments, ema=ema, **options)
        if not ema and reader.step == 15:
            delete(reader.folder)
        return model

    monkeypatch.setattr(validation, "load_model", load)
    assert Recorder(copied).follow() == 3
    assert results_of(copied) == ["step_00000010", "step_00000015", "step_00000020"]


def test_nothing_half_written_is_read(copied):
    """A save in progress has another name, and a damaged checkpoint is skipped with a warning."""
    folder = copied / "checkpoints"
    (folder / "step_00000010").rename(folder / "step_00000010.part")
    (data,) = (folder / "step_00000015").glob("*.safetensors")
    data.write_bytes(data.read_bytes()[:-100])
    recorder = Recorder(copied)
    assert recorder.follow() == 1
    assert results_of(copied) == ["step_00000020"]


def test_it_waits_for_the_last_step(copied):
    last = copied / "checkpoints" / "step_00000020"
    hidden = last.rename(copied / "hidden")
    recorder = Recorder(copied)
    done = []
    thread = threading.Thread(target=lambda: done.append(recorder.follow()))
    thread.start()
    deadline = time.monotonic() + 60
    while results_of(copied) != ["step_00000010", "step_00000015"]:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(0.3)
    assert thread.is_alive()
    hidden.rename(last)
    thread.join(timeout=60)
    assert done == [3]


def test_a_run_that_is_killed_and_restarted_is_followed_to_its_end(dataset, tmp_path):
    path = config_of(tmp_path, dataset, steps=60)
    run_folder = tmp_path / "run"
    train = [*MAIN, "train", str(path)]
    first = subprocess.Popen(train, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_for(lambda: list_checkpoints(run_folder / "checkpoints").checkpoints, first)
    command = [*MAIN, "evaluate", str(run_folder), "--protocol", str(tmp_path / "protocol.yaml"), "--follow"]
    out = str(tmp_path / "out.json")
    follower = subprocess.Popen([*command, "--json", out], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert subprocess.run(train, capture_output=True, check=False).returncode == 0
    text, _ = follower.communicate(timeout=240)
    assert follower.returncode == 0, text
    kept = [path.name for path in list_checkpoints(run_folder / "checkpoints").checkpoints]
    results = json.loads((tmp_path / "out.json").read_text())
    steps = [result["step"] for result in results]
    assert len(steps) == len(set(steps))
    assert set(kept) <= set(results_of(run_folder))
    for result in results:
        folder = run_folder / "checkpoints" / f"step_{result['step']:08d}"
        if folder.is_dir():
            assert open_checkpoint(folder).step == result["step"]
    assert (run_folder / "loss.png").exists()


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{data}", "--protocol", "{protocol}", "--follow"], "is not the folder of a run, which has a config.yaml"),
        (["{run}", "--protocol", "{protocol}", "--follow", "--no-ema"], "--follow evaluates EMA weights only"),
        (["{run}", "--protocol", "{protocol}", "--no-ema"], "--no-ema has no effect on a validation loss"),
        (["{data}", "--protocol", "{protocol}"], "is not a checkpoint, and a validation loss is of a checkpoint"),
        (["{run}", "--follow"], "--follow without --protocol has no effect"),
    ],
)
def test_flags_that_do_not_fit_are_errors(trained, dataset, capsys, arguments, words):
    names = {"run": trained / "run", "data": dataset, "protocol": trained / "protocol.yaml"}
    assert run(["evaluate", *(word.format(**names) for word in arguments)]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
