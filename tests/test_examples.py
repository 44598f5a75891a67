"""The examples, on small images and networks; two processes where they are about several."""

from __future__ import annotations

import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import resnet_fused
from resnet_fused.numerics import relative_error

Image = pytest.importorskip("PIL.Image", reason="writes and reads the images")
models = pytest.importorskip("torchvision.models", reason="prepares the images")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
COLOURS = {"blue": (20, 30, 220), "green": (20, 220, 30), "red": (220, 20, 30)}
RESNET18 = models.ResNet18_Weights.DEFAULT


@pytest.fixture(scope="session")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a ResNet-18 nobody has trained."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(models.resnet18().state_dict(), path)
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight images of each colour, in a folder of its name."""
    root = tmp_path_factory.mktemp("images")
    for name, colour in COLOURS.items():
        (root / name).mkdir()
        for number in range(8):
            shade = tuple(max(0, c - 2 * number) for c in colour)
            Image.new("RGB", (48, 40), shade).save(root / name / f"{number}.png")
    return root


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Iterator[Callable[..., str]]:
    """What an example prints, run as a program but in this process."""

    def program(name: str, *arguments: object) -> str:
        path = EXAMPLES / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *map(str, arguments)])
        capsys.readouterr()
        runpy.run_path(str(path), run_name="__main__")
        return capsys.readouterr().out

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the images are too small for more
    yield program
    torch.set_num_threads(threads)


def theirs(weights: Path) -> torch.nn.Module:
    model = models.resnet18()
    model.load_state_dict(torch.load(weights))
    return model.eval()


def test_classify(run, weights, images) -> None:
    path = images / "red/0.png"
    printed = run("classify", path, "--arch", "resnet18", "--weights", weights)
    with torch.no_grad():
        best = theirs(weights)(RESNET18.transforms()(Image.open(path))[None]).softmax(1)[0].topk(5)
    labels = [RESNET18.meta["categories"][i] for i in best.indices]
    expected = ", ".join(f"{label} {p:.1%}" for label, p in zip(labels, best.values, strict=True))
    assert printed == f"{path}: {expected}\n"


def test_finetune(run, weights, images, tmp_path) -> None:
    """It learns the colours, and torchvision's network takes what it saved."""
    out = tmp_path / "colours.pth"
    torch.manual_seed(0)
    printed = run(
        *("finetune", "--data", images, "--out", out, "--arch", "resnet18", "--weights", weights),
        *("--size", 32, "--batch", 8, "--epochs", 4, "--learning-rate", 0.005),
    )
    assert printed.count("epoch") == 4
    state = torch.load(out)
    before = torch.load(weights)
    assert torch.equal(state["bn1.running_mean"], before["bn1.running_mean"]), "frozen"
    assert not torch.equal(state["conv1.weight"], before["conv1.weight"])
    model = models.resnet18(num_classes=3)
    model.load_state_dict(state)
    x = torch.stack([RESNET18.transforms()(Image.open(images / f"{c}/0.png")) for c in COLOURS])
    with torch.no_grad():
        assert model.eval()(x[:, :, :32, :32]).argmax(1).tolist() == [0, 1, 2]


def test_pyramid(run, weights) -> None:
    printed = run("pyramid", "--arch", "resnet18", "--weights", weights, "--size", 128)
    sizes = re.findall(r"level (\w+): \(1, 256, (\d+), (\d+)\)", printed)
    levels = (("0", 32), ("1", 16), ("2", 8), ("3", 4), ("pool", 2))
    assert sizes == [(name, str(size), str(size)) for name, size in levels]
    assert re.search(r"^\d+ boxes$", printed, re.MULTILINE)


def test_video(run, weights) -> None:
    """The labels change where those of the frames, taken one by one, do."""
    printed = run("video", "--arch", "resnet18", "--weights", weights, "--frames", 10)
    drawn = runpy.run_path(str(EXAMPLES / "video.py"))["frames"]
    model, prepare = theirs(weights), RESNET18.transforms()
    expected, last = [], None
    with torch.no_grad():
        for number, frame in enumerate(drawn(10)):
            label = RESNET18.meta["categories"][int(model(prepare(frame)[None]).argmax())]
            if label != last:
                expected.append(f"frame {number}: {label}")
            last = label
    *changes, summary = printed.splitlines()
    assert changes == expected
    assert summary.startswith("10 frames, ")


def test_video_reads_no_further_than_its_queue() -> None:
    """A slow consumer holds up the source: one batch waits, and one is being offered."""
    batches = runpy.run_path(str(EXAMPLES / "video.py"))["batches"]
    drawn = []

    def source() -> Iterator[torch.Tensor]:
        for number in range(100):
            drawn.append(number)
            yield torch.zeros(1)

    stream = batches(source(), lambda frame: frame, 4)
    assert next(stream).shape == (4, 1)
    time.sleep(0.5)
    assert len(drawn) <= 3 * 4
    assert sum(len(batch) for batch in stream) == 96


def test_serve_answers_those_who_wait_in_one_batch(weights, images) -> None:
    """Eight ask at once while the network is held up; then one asks for what is no image."""
    example = runpy.run_path(str(EXAMPLES / "serve.py"))
    batcher = example["Batcher"]("resnet18", str(weights), largest=8)
    sizes, hold, model = [], threading.Event(), batcher.model

    def held(x: torch.Tensor) -> torch.Tensor:
        sizes.append(len(x))
        assert hold.wait(60)
        return model(x)

    batcher.model = held
    paths = sorted(images.rglob("*.png"))[::3]
    with example["server"](batcher, 0) as http, ThreadPoolExecutor(len(paths)) as pool:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        address = f"http://localhost:{http.server_address[1]}"

        def ask(body: bytes) -> Any:
            with urllib.request.urlopen(address, body) as answer:
                return json.load(answer)

        asked = [pool.submit(ask, path.read_bytes()) for path in paths]
        while sum(sizes) + batcher.waiting.qsize() < len(paths):
            time.sleep(0.01)
        hold.set()
        answers = [found.result() for found in asked]
        damaged = bytearray(paths[0].read_bytes())
        damaged[11] = 12  # the length of its first part, which Pillow answers by a ValueError
        for body in (b"no image", bytes(damaged)):
            with pytest.raises(urllib.error.HTTPError, match="400"):
                ask(body)
        for part in ("model", "prepare"):
            kept = getattr(batcher, part)
            for fault in (None, lambda x: int("no number")):
                setattr(batcher, part, fault)
                with pytest.raises(urllib.error.HTTPError, match="500"):
                    ask(paths[0].read_bytes())
            setattr(batcher, part, kept)
        http.shutdown()
    assert len(sizes) == 2, sizes  # the first that came, and all who waited for it
    network, prepare = theirs(weights), RESNET18.transforms()
    for path, answer in zip(paths, answers, strict=True):
        with torch.no_grad():
            best = network(prepare(Image.open(path))[None]).softmax(1)[0].topk(5)
        assert [found["label"] for found in answer] == [
            RESNET18.meta["categories"][index] for index in best.indices
        ]
        assert [found["probability"] for found in answer] == pytest.approx(
            best.values.tolist(), rel=1e-4
        )


@pytest.mark.parametrize("name", ["classify", "video", "serve"])
def test_weights_of_other_classes_do_not_get_imagenets_names(name, run, images, tmp_path) -> None:
    torch.save(models.resnet18(num_classes=3).state_dict(), tmp_path / "three.pth")
    arguments: tuple[Any, ...] = ("--arch", "resnet18", "--weights", tmp_path / "three.pth")
    if name == "classify":
        arguments += (images / "red/0.png",)
    with pytest.raises(RuntimeError, match=r"size mismatch for fc\.weight"):
        run(name, *arguments)


class StandIn:
    """What the model uses of Triton Inference Server's module, which only the server has."""

    class Tensor(NamedTuple):
        name: str
        array: Any

        def as_numpy(self) -> Any:
            return self.array

    class InferenceResponse(NamedTuple):
        output_tensors: list[Any]

    @staticmethod
    def get_input_tensor_by_name(request: dict[str, Any], name: str) -> Any:
        return StandIn.Tensor(name, request[name])


def test_triton_server(weights, tmp_path, monkeypatch) -> None:
    """Requests of different batches get their own logits; names are those of the configuration."""
    folder = EXAMPLES / "triton_server/resnet50"
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", StandIn)
    model = runpy.run_path(str(folder / "1/model.py"))["TritonPythonModel"]()
    (tmp_path / "1").mkdir()
    shutil.copy(weights, tmp_path / "1/weights.pth")
    parameters = {"parameters": {"arch": {"string_value": "resnet18"}}}
    model.initialize(
        {
            "model_config": json.dumps(parameters),
            "model_repository": str(tmp_path),
            "model_version": "1",
            "model_instance_kind": "CPU",
            "model_instance_device_id": "0",
        }
    )
    asked = [torch.randn(count, 3, 64, 64) for count in (1, 3)]
    responses = model.execute([{"images": x.numpy()} for x in asked])
    for x, response in zip(asked, responses, strict=True):
        (logits,) = response.output_tensors
        with torch.no_grad():
            assert relative_error(torch.from_numpy(logits.array), theirs(weights)(x)) < 1e-5
        assert f'output [{{ name: "{logits.name}"' in (folder / "config.pbtxt").read_text()


def test_profiling(run, tmp_path) -> None:
    trace = tmp_path / "trace.json"
    printed = run(
        *("profiling", "--arch", "resnet18", "--batch", 2, "--size", 64, "--trace", trace)
    )
    x = torch.randn(1, 3, 64, 64)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        models.resnet18().eval()(x)
    assert f"{counter.get_total_flops() / 1e9:.2f} GFLOP an image" in printed
    kept = resnet_fused.kept_activation_bytes(resnet_fused.resnet18(), torch.cat([x, x])).total
    assert f"{kept / 2 / 2**20:.1f} MiB saved" in printed
    assert "Self CPU time total" in printed
    if "cpu" in resnet_fused.available_backends():
        assert re.search(r"^ *resnet_fused::conv_bn ", printed, re.MULTILINE)
    assert '"traceEvents"' in trace.read_text()


class Training:
    """torchrun of examples/train.py by two processes, as far as it has printed."""

    def __init__(self, images: Path, out: Path, *arguments: str) -> None:
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        program = [str(EXAMPLES / "train.py"), "--data", str(images), "--out", str(out)]
        sizes = ["--arch", "resnet18", "--size", "32", "--batch", "2", "--epochs", "3"]
        sizes += ["--learning-rate", "0.01"]
        self.out = out
        self.printed = ""
        self.process = subprocess.Popen(
            [*launch, "--nproc-per-node", "2", "--max-restarts", "1", *program, *sizes, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",  # see examples/train.py
            },
        )

    def until(self, pattern: str) -> re.Match[str]:
        """Reads on to a line like that."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.printed += line
            if found := re.search(pattern, line):
                return found
        raise AssertionError(self.printed)

    def result(self) -> dict[str, torch.Tensor]:
        assert self.process.stdout is not None
        self.printed += self.process.stdout.read()
        assert self.process.wait(timeout=240) == 0, self.printed
        return torch.load(self.out / "model.pth")


@pytest.fixture(scope="module")
def undisturbed(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The network after eighteen steps of two processes under DDP, which nothing stops."""
    return Training(images, tmp_path_factory.mktemp("undisturbed")).result()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_training_goes_on_after_a_process_was_killed(
    parallel: str, images: Path, undisturbed: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    run = Training(images, tmp_path, "--parallel", parallel, "--save-every", "4")
    victim = int(run.until(r"rank 1 is process (\d+), begins at step 0 of 18")[1])
    run.until(r"^step 6:")
    os.kill(victim, signal.SIGKILL)
    found = run.result()
    begun = [int(step) for step in re.findall(r"begins at step (\d+) of 18", run.printed)]
    assert sorted(begun)[-2:] in ([4, 4], [8, 8]), run.printed
    assert [p.name for p in tmp_path.glob("step-*")] == ["step-16"]
    assert found.keys() == undisturbed.keys()
    for key, expected in undisturbed.items():
        if parallel == "ddp":
            assert torch.equal(found[key], expected), key
        else:  # its sums over processes are rounded in another order
            assert relative_error(found[key], expected.double()) < 1e-4, key


def _workers(token: str) -> list[int]:
    """Processes of the cluster that are scoring a batch, as their titles say."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            title = (process / "cmdline").read_bytes().decode()
            ours = token in (process / "environ").read_bytes().decode()
            if ours and re.search(r"ray::.*Scorer.*\.submit", title):
                found.append(int(process.name))
        except OSError:  # it has ended
            continue
    return found


@pytest.mark.thorough
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_batch_scoring_loses_nothing_when_a_worker_is_killed(images, weights, tmp_path) -> None:
    pytest.importorskip("ray.data", reason="pip install '.[examples]'")
    token = uuid.uuid4().hex
    command = [sys.executable, str(EXAMPLES / "batch_scoring.py"), "--arch", "resnet18"]
    command += ["--images", str(images), "--out", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(
        [*command, "--weights", str(weights), "--batch", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TOKEN_OF_THE_TEST": token, "OMP_NUM_THREADS": "1"},
    )
    killed = 0
    while process.poll() is None and not killed:
        for worker in _workers(token)[:1]:
            os.kill(worker, signal.SIGKILL)
            killed = worker
        time.sleep(0.05)
    printed, _ = process.communicate(timeout=240)
    assert process.returncode == 0, printed
    assert killed, printed
    rows = []
    for part in (tmp_path / "out").glob("*.csv"):
        with part.open() as file:
            rows += list(csv.DictReader(file))
    paths = sorted(images.rglob("*.png"))
    assert sorted(Path(row["path"]) for row in rows) == paths  # each once
    model, prepare = theirs(weights), RESNET18.transforms()
    with torch.no_grad():
        for row in rows:
            best = model(prepare(Image.open(row["path"]))[None]).softmax(1).max(1)
            assert row["label"] == RESNET18.meta["categories"][int(best.indices)]
            assert float(row["probability"]) == pytest.approx(float(best.values), rel=1e-3)
