"""The command `resnet-fused`, on images and weights made here; nothing is downloaded."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import resnet_fused
from resnet_fused import cli

Image = pytest.importorskip("PIL.Image", reason="writes and reads the images")
models = pytest.importorskip("torchvision.models", reason="prepares the images")

COLOURS = {"blue": (20, 30, 220), "green": (20, 220, 30), "red": (220, 20, 30)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two images of each colour, in a folder of its name, and a file that is no image."""
    for name, colour in COLOURS.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(2):
            path = tmp_path / "images" / name / f"{number}.png"
            Image.new("RGB", (40 + 8 * number, 48), colour).save(path)
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A ResNet-18 that tells the three colours apart by the centre tap of its stem alone."""
    torch.manual_seed(0)
    model = resnet_fused.resnet18(num_classes=3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.weight.fill_(1.0)
        model.conv1.weight[[0, 1, 2], [2, 1, 0], 3, 3] = 1.0  # blue, green, red
        for stage in (model.layer2, model.layer3, model.layer4):
            for channel in range(3):
                stage[0].downsample[0].weight[channel, channel] = 1.0
        model.fc.weight[[0, 1, 2], [0, 1, 2]] = 4.0
    path = tmp_path / "colours.pth"
    torch.save(model.state_dict(), path)
    return path


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    path = tmp_path / "labels.txt"
    path.write_text("\n".join(COLOURS))
    return path


def test_classify_names_the_classes_of_a_folder(folder, weights, labels, tmp_path, capsys) -> None:
    out = tmp_path / "found.csv"
    command = ["classify", str(folder), "--arch", "resnet18", "--weights", str(weights)]
    command += ["--labels", str(labels), "--batch", "4", "--csv", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "images are prepared as for ResNet18_Weights.IMAGENET1K_V1" in printed.err
    lines = printed.out.splitlines()
    assert len(lines) == 6
    for line in lines:
        path, likeliest = line.split(": ")
        assert likeliest.startswith(Path(path).parent.name)
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18  # the three classes that there are, though five are asked for
    for name in COLOURS:
        best = [r for r in rows if r["rank"] == "1" and Path(r["path"]).parent.name == name]
        assert [r["label"] for r in best] == [name, name]
    for path in {row["path"] for row in rows}:
        of_one = [float(row["probability"]) for row in rows if row["path"] == path]
        assert of_one == sorted(of_one, reverse=True)
        assert sum(of_one) == pytest.approx(1.0, abs=1e-5)


def test_the_recipe_and_the_labels_are_those_of_the_weights(folder, tmp_path, capsys) -> None:
    """A file of a published name is prepared as these weights say: V1 resizes to 256, V2 to 232."""
    entries = models.ResNet50_Weights
    assert cli._published("IMAGENET1K_V2", entries) is entries.IMAGENET1K_V2
    assert cli._published("ResNet50_Weights.DEFAULT", entries) is entries.IMAGENET1K_V2
    assert cli._published("ours.pth", entries) is None
    torch.manual_seed(0)
    state = resnet_fused.resnet18().state_dict()
    path = tmp_path / "resnet18-f37072fd.pth"
    torch.save(state, path)
    image = folder / "red/0.png"
    command = ["classify", str(image), "--arch", "resnet18", "--weights", str(path), "--top", "2"]
    assert cli.main(command) == 0
    printed = capsys.readouterr()
    assert "prepared as for" not in printed.err
    entry = models.ResNet18_Weights.IMAGENET1K_V1
    theirs = models.resnet18()
    theirs.load_state_dict(state)
    with torch.no_grad():
        x: Tensor = entry.transforms()(Image.open(image))[None]
        best = theirs.eval()(x).softmax(1)[0].topk(2)
    expected = [
        f"{entry.meta['categories'][i]} {p:.1%}"
        for p, i in zip(*(part.tolist() for part in best), strict=True)
    ]
    assert printed.out == f"{image}: {', '.join(expected)}\n"


def test_what_is_no_image_is_named_and_the_others_are_done(folder, weights, capsys) -> None:
    (folder / "broken.jpg").write_bytes(b"\xff\xd8 and no more")
    assert cli.main(["classify", str(folder), "--arch", "resnet18", "--weights", str(weights)]) == 1
    printed = capsys.readouterr()
    assert re.search(r"broken\.jpg cannot be read as an image", printed.err)
    assert "classes are numbered; --labels FILE names them" in printed.err
    assert len(printed.out.splitlines()) == 6


@pytest.mark.parametrize("inside", [False, True], ids=["folder", "folder/val"])
def test_validate_counts_right_answers(inside, folder, weights, tmp_path, capsys) -> None:
    (folder / "red/1.png").rename(folder / "blue/2.png")  # five of six are right
    if inside:
        (tmp_path / "data").mkdir()
        folder = folder.rename(tmp_path / "data/val").parent
    command = ["validate", "--data", str(folder), "--arch", "resnet18", "--weights", str(weights)]
    assert cli.main([*command, "--batch", "4"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("6 images: top-1 83.333%, top-5 100.000%; ")
    assert re.search(r"; \d+\.\d images/s .*\(float32 on cpu\)", printed)


_CLASSIFY = ("classify", "{folder}", "--arch", "resnet18", "--weights", "{weights}")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["classify", "{folder}", "--arch", "resnet17"], "--arch resnet17 is unknown; take one of"),
        (["classify", "{folder}", "--weights", "sub/absent.pth"], "there is no such file"),
        (["classify", "{folder}", "--weights", "V9"], "known names are IMAGENET1K_V1"),
        (["classify", "{folder}", "--weights", "{weights}"], "are not those of resnet50"),
        (
            ["classify", "nowhere", "--arch", "resnet18", "--weights", "{weights}"],
            "nowhere: there is no such file or folder",
        ),
        (
            ["validate", "--data", "{folder}/red", "--arch", "resnet18", "--weights", "{weights}"],
            "has 0 folders; these weights have 3 classes",
        ),
        (["validate", "--data", "nowhere"], "--data nowhere is no folder"),
        (["classify", "nowhere", "--weights", "V9"], "nowhere: there is no such file or folder"),
        ([*_CLASSIFY, "--csv", "{folder}/absent/found.csv"], "absent/found.csv"),
        ([*_CLASSIFY, "--labels", "{folder}/absent.txt"], "absent.txt"),
        ([*_CLASSIFY, "--labels", "{weights}"], "lines; the weights have 3 classes"),
        ([*_CLASSIFY, "--device", "gpu"], "--device gpu: Expected one of cpu, cuda"),
        (
            (
                *("classify", "{folder}", "--arch", "resnet18"),
                *("--weights", "{weights}", "--labels", "{weights}.labels"),
            ),
            "--labels has 1 lines; the weights have 3 classes",
        ),
    ],
)
def test_mistakes_are_answered_in_a_sentence(arguments, said, folder, weights) -> None:
    Path(f"{weights}.labels").write_text("only one\n")
    named = [a.format(folder=folder, weights=weights) for a in arguments]
    with pytest.raises(SystemExit, match=re.escape(said)):
        cli.main(named)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["classify", "x", "--workers", "-1"], "--workers: -1 is not at least 0"),
        (["classify", "x", "--batch", "many"], "--batch: invalid number value: 'many'"),
        (["env", "--all"], "unrecognized arguments: --all"),
    ],
)
def test_wrong_options_are_named(arguments, said, capsys) -> None:
    with pytest.raises(SystemExit, match="2"):
        cli.main(arguments)
    assert said in capsys.readouterr().err


def test_sixteen_bits_are_read_as_shades(tmp_path, capsys) -> None:
    """Pillow makes white of all but the darkest; the range of other wide pixels is not known."""
    for mode, value, name in (("I;16", 0x4000, "16.png"), ("I;16", 0x4000, "16.tif")):
        Image.new(mode, (9, 9), value).save(tmp_path / name)
        image = cli._open(tmp_path / name)
        assert image.mode == "RGB"
        assert image.getextrema() == ((63, 63),) * 3
    for mode in ("I", "F"):
        Image.new(mode, (9, 9), 1).save(tmp_path / "wide.tif")
        assert cli._open(tmp_path / "wide.tif") is None
        assert f"pixels of mode {mode} do not tell" in capsys.readouterr().err


def test_what_is_wrong_with_the_program_is_no_fault_of_the_image(tmp_path, monkeypatch) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "good.png")
    monkeypatch.setattr(Image.Image, "convert", lambda image: image)
    with pytest.raises(TypeError, match="takes 1 positional argument"):
        cli._open(tmp_path / "good.png")


def test_offline_the_download_says_what_to_do(folder, tmp_path, monkeypatch) -> None:
    """Without a network, the address and `--weights FILE` are named."""

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", unreachable)
    with pytest.raises(SystemExit, match=r"no route to host.*download that file elsewhere"):
        cli.main(["classify", str(folder), "--arch", "resnet18"])


def test_the_other_commands_are_the_modules(monkeypatch, capsys) -> None:
    seen = []
    monkeypatch.setattr("resnet_fused.tune.main", lambda rest: seen.append(rest))
    monkeypatch.setattr("resnet_fused.selfcheck.main", lambda rest: seen.append(rest) or 1)
    assert cli.main(["tune", "--arch", "resnet18", "--help"]) == 0
    assert cli.main(["selfcheck", "--only", "stem"]) == 1
    assert seen == [["--arch", "resnet18", "--help"], ["--only", "stem"]]
    assert cli.main(["env"]) == 0
    assert "backends\n" in capsys.readouterr().out


def test_bench_runs_the_benchmark_of_the_sources(monkeypatch, tmp_path) -> None:
    script = tmp_path / "throughput.py"
    script.write_text("import sys; sys.exit(sys.argv[1:] != ['--quick'] or 7)")
    monkeypatch.setattr(cli, "_BENCHMARK", script)
    assert cli.main(["bench", "--quick"]) == 7
    monkeypatch.setattr(cli, "_BENCHMARK", tmp_path / "absent.py")
    with pytest.raises(SystemExit, match="not in the wheel: unpack the sdist"):
        cli.main(["bench"])


def test_it_starts_without_torch() -> None:
    """`env` has to say that torch is missing, so the command may not need it."""
    code = (
        "import sys; sys.modules['torch'] = None\nfrom resnet_fused import cli; cli.main(['env'])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=".")
    assert result.returncode == 0, result.stderr
    assert "could not be found out" in result.stdout
