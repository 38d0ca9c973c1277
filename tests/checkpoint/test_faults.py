"""Whatever is wrong with a source or a target: one clear line, an exit code, nothing that looks finished, and the
source as it was. Through the command that users run."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import resource
import shutil
import tempfile
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from megatron_patch.checkpoint import directory as layout
from megatron_patch.checkpoint import moving
from megatron_patch.checkpoint.convert import convert
from megatron_patch.checkpoint.huggingface import INDEX
from megatron_patch.checkpoint.opening import Wanted
from megatron_patch.checkpoint.sharding import Layout, Pipeline
from megatron_patch.checkpoint.verify import verify
from megatron_patch.launch.main import main
from tests.checkpoint.dying import differences

Directory = Callable[[str], Path]
Run = Callable[..., tuple[int, str]]

Q, DOWN = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.mlp.down_proj.weight"
LEGACY = Wanted(format="legacy", layout=Layout(2, Pipeline(2)))


def states(folder: Path) -> dict[str, str]:
    """Every file's hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs `megatron-patch convert`: the exit code and what it said on stderr. The source must stay as it is."""

    def convert_from(source: Path, *options: str, target: Path = tmp_path / "target") -> tuple[int, str]:
        before = states(source)
        capfd.readouterr()
        code = main(["convert", "--source", str(source), "--target", str(target), *options])
        assert states(source) == before
        return code, capfd.readouterr().err.strip()

    return convert_from


def leftovers(target: Path) -> list[str]:
    return [path.name for path in target.parent.iterdir() if path.name.lstrip(".").startswith(target.name)]


@pytest.fixture
def source(hf: Directory, tmp_path: Path) -> Path:
    """A Hugging Face directory to be damaged."""
    return Path(shutil.copytree(hf("gqa"), tmp_path / "source"))


def file_of(source: Path, name: str) -> Path:
    return source / json.loads((source / INDEX).read_text())["weight_map"][name]


def change(source: Path, name: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    """Rewrite the file that holds a tensor."""
    tensors = load_file(file := file_of(source, name))
    edit(tensors)
    save_file(tensors, file, {"format": "pt"})


def change_index(source: Path, edit: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((source / INDEX).read_text())
    edit(index["weight_map"])
    (source / INDEX).write_text(json.dumps(index))


def _delete(source: Path) -> None:
    change(source, Q, lambda tensors: tensors.pop(Q))
    change_index(source, lambda where: where.pop(Q))


def _add(source: Path) -> None:
    extra, file = Q.replace(".1.", ".7."), file_of(source, Q).name
    change(source, Q, lambda tensors: tensors.update({extra: tensors[Q].clone()}))
    change_index(source, lambda where: where.update({extra: file}))


def _duplicate(source: Path) -> None:
    tensor = load_file(file_of(source, Q))[Q]
    change(source, "model.norm.weight", lambda tensors: tensors.update({Q: tensor}))


def _truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 10)


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "deleted tensor": (_delete, r"source has no tensor model\.layers\.1\.self_attn\.q_proj\.weight, which family"),
    "extra tensor": (_add, r"tensors that family llama does not know: model\.layers\.7\.self_attn\.q_proj\.weight"),
    "transposed tensor": (
        lambda source: change(source, DOWN, lambda t: t.update({DOWN: t[DOWN].T.contiguous()})),
        r"model\.layers\.1\.mlp\.down_proj\.weight has shape \(64, 48\); by its config it must have \(48, 64\)",
    ),
    "truncated shard": (
        lambda source: _truncate(file_of(source, Q)),
        r"model-\d+-of-00010\.safetensors is truncated or damaged: .*",
    ),
    "empty shard": (
        lambda source: file_of(source, Q).write_bytes(b""),
        r"model-\d+-of-00010\.safetensors is truncated or damaged: .*",
    ),
    "index names a missing file": (
        lambda source: file_of(source, Q).unlink(),
        r"model\.safetensors\.index\.json says that model-\d+-of-00010\.safetensors holds model\..*, but there is no",
    ),
    "index names a wrong file": (
        lambda source: change_index(source, lambda where: where.update({Q: where["model.norm.weight"]})),
        r"the index of .*source says that model-\d+-of-00010\.safetensors holds .*q_proj\.weight, but it does not",
    ),
    "index lacks a tensor": (
        lambda source: change_index(source, lambda where: where.pop(Q)),
        r"model-\d+-of-00010\.safetensors holds model\.layers\.1\.self_attn\.q_proj\.weight, which the index does not",
    ),
    "duplicate tensor": (
        _duplicate,
        r"tensor model\.layers\.1\.self_attn\.q_proj\.weight is in both .*safetensors and .*safetensors",
    ),
    "damaged config": (
        lambda source: (source / "config.json").write_text('{"model_type": "lla'),
        r"config\.json is no valid JSON: .*",
    ),
    "damaged manifest": (
        lambda source: (source / layout.MANIFEST).write_text("{}"),
        r"conversion\.json is no manifest of a conversion: it must hold a plan and tensors; remove it",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("options", [(), ("--target-format", "legacy", "--tensor-model-parallel-size", "2")])
def test_a_damaged_hugging_face_directory_is_refused(
    source: Path, tmp_path: Path, run: Run, fault: str, options: tuple[str, ...]
) -> None:
    damage, message = FAULTS[fault]
    damage(source)
    code, said = run(source, *options)
    assert code == 2 and leftovers(tmp_path / "target") == []
    assert _matches(f"megatron-patch convert: error: .*{message}", said)


def _matches(pattern: str, said: str) -> bool:
    print(said)  # shown where the test fails
    return re.match(pattern, said.splitlines()[-1]) is not None


# --------------------------------------------------------------------------------------------------- Megatron sources


def flip(file: Path, tensor: Tensor) -> None:
    """Flip one bit in the middle of a tensor's bytes."""
    content, needle = bytearray(file.read_bytes()), tensor.detach().contiguous().numpy().tobytes()
    assert content.count(needle) == 1
    content[content.index(needle) + len(needle) // 2] ^= 1
    file.write_bytes(content)


def _norm(source: Path) -> Tensor:
    return load_file(file_of(source, "model.norm.weight"))["model.norm.weight"]


def test_a_flipped_bit_in_a_hugging_face_directory_of_ours_is_refused(
    source: Path, megatron: Directory, tmp_path: Path, run: Run
) -> None:
    convert(megatron("gqa"), tmp_path / "ours")
    flip(file_of(tmp_path / "ours", "model.norm.weight"), _norm(source))
    code, said = run(tmp_path / "ours")
    assert code == 2 and leftovers(tmp_path / "target") == []
    assert _matches(
        r".*ours: decoder\.final_layernorm\.weight does not match its checksum in conversion\.json: a", said
    )


def test_a_square_tensor_transposed_in_a_hugging_face_directory_of_ours_is_refused(
    megatron: Directory, tmp_path: Path, run: Run
) -> None:
    convert(megatron("gqa"), tmp_path / "ours")
    change(tmp_path / "ours", Q, lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}))
    code, said = run(tmp_path / "ours")
    assert code == 2 and leftovers(tmp_path / "target") == []
    assert _matches(r".*decoder\.layers\.1\.self_attention\.linear_qkv\.weight does not match its checksum", said)


def test_a_square_tensor_transposed_elsewhere_is_seen_by_verify(source: Path, hf: Directory, tmp_path: Path) -> None:
    change(source, Q, lambda tensors: tensors.update({Q: tensors[Q].T.contiguous()}))
    convert(source, tmp_path / "target")  # no shape tells
    logits = verify(hf("gqa"), tmp_path / "target", "logits", max_tokens=16)
    assert not logits.ok and logits.texts[0].max_abs > 1e-2
    (problem,) = verify(hf("gqa"), tmp_path / "target", "checksums").problems
    assert problem.startswith("decoder.layers.1.self_attention.linear_qkv.weight: ")


@pytest.fixture
def damaged(source: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A Megatron checkpoint to be damaged, in either format."""

    def make(kind: str) -> Path:
        convert(source, tmp_path / kind, LEGACY if kind == "legacy" else Wanted())
        return tmp_path / kind

    return make


RANK_FILE = "release/mp_rank_01_001/model_optim_rng.pt"


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        ("torch_dist", "release/__0_0.distcp", r"__0_0\.distcp is truncated: \d+ bytes where the .* needs \d+"),
        ("legacy", RANK_FILE, r"mp_rank_01_001/model_optim_rng\.pt is damaged or no file of torch\.save: .*"),
    ],
)
def test_a_truncated_file_is_named(
    damaged: Callable[[str], Path], tmp_path: Path, run: Run, kind: str, file: str, message: str
) -> None:
    source = damaged(kind)
    _truncate(source / file)
    code, said = run(source)
    assert code == 2 and leftovers(tmp_path / "target") == []
    assert _matches(f".*{message}", said)


@pytest.mark.parametrize(
    ("kind", "file", "message"),
    [
        (
            "torch_dist",
            "release/__0_0.distcp",
            r"decoder\.final_layernorm\.weight at \(0,\) is damaged: .*__0_0\.distcp: bytes \d+ and following do not",
        ),
        ("legacy", RANK_FILE, r"mp_rank_01_001/model_optim_rng\.pt: bytes \d+ and following do not match their CRC"),
    ],
)
def test_a_flipped_bit_in_a_megatron_checkpoint_is_found_by_its_crc(
    damaged: Callable[[str], Path], source: Path, tmp_path: Path, run: Run, kind: str, file: str, message: str
) -> None:
    checkpoint = damaged(kind)
    (checkpoint / "release" / layout.MANIFEST).unlink()
    flip(checkpoint / file, _norm(source))
    code, said = run(checkpoint)
    assert code == 2 and leftovers(tmp_path / "target") == []
    assert _matches(f".*{message}", said)


def _rewrite_distcp(folder: Path) -> None:
    """Change a tensor of a .distcp file, and its CRC."""
    stored = FileSystemReader(folder).read_metadata().storage_data
    place = next(place for index, place in stored.items() if index.fqn == "decoder.final_layernorm.weight")
    content = bytearray((folder / place.relative_path).read_bytes())
    span, new = slice(place.offset, place.offset + place.length), io.BytesIO()
    tensor = torch.load(io.BytesIO(bytes(content[span])))
    torch.save(tensor + 1, new)
    assert len(new.getvalue()) == place.length
    content[span] = new.getvalue()
    (folder / place.relative_path).write_bytes(content)


def _rewrite_legacy(folder: Path) -> None:
    """Change a tensor of every rank file that has it, and its CRC."""
    for file in folder.glob("mp_rank_*/*.pt"):
        content = torch.load(file, weights_only=False)
        if "decoder.final_layernorm.weight" in content["model"]:
            content["model"]["decoder.final_layernorm.weight"] += 1
            torch.save(content, file)


@pytest.mark.parametrize(("kind", "rewrite"), [("torch_dist", _rewrite_distcp), ("legacy", _rewrite_legacy)])
def test_a_change_under_a_good_crc_is_found_by_the_manifest(
    damaged: Callable[[str], Path], tmp_path: Path, run: Run, kind: str, rewrite: Callable[[Path], None]
) -> None:
    source = damaged(kind)
    rewrite(source / "release")
    code, said = run(source)
    assert code == 2 and leftovers(tmp_path / "target") == []
    assert _matches(
        r".*release: decoder\.final_layernorm\.weight does not match its checksum in conversion\.json: a file is"
        r" damaged, or was changed since; where the change was meant, remove conversion\.json",
        said,
    )
    (source / "release" / layout.MANIFEST).unlink()
    assert run(source)[0] == 0


# ------------------------------------------------------------------------------------------------------ odd values


def test_nan_and_infinity_are_converted_reported_noted_and_printed(
    source: Path, tmp_path: Path, run: Run, capfd: pytest.CaptureFixture[str]
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[DOWN][0, :3] = float("nan")
        tensors[DOWN][1, 0] = float("-inf")

    change(source, DOWN, spoil)
    assert main(["convert", "--source", str(source), "--target", str(tmp_path / "target")]) == 0
    assert "4 values of decoder.layers.1.mlp.linear_fc2.weight" in " ".join(capfd.readouterr().out.split())
    noted = json.loads((tmp_path / "target" / "release" / layout.MANIFEST).read_text())["tensors"]
    assert {name: one["nonfinite"] for name, one in noted.items() if one["nonfinite"]} == {
        "decoder.layers.1.mlp.linear_fc2.weight": 4
    }
    back = convert(tmp_path / "target", tmp_path / "back")
    assert back.nonfinite == {"decoder.layers.1.mlp.linear_fc2.weight": 4}
    assert file_of(tmp_path / "back", DOWN).read_bytes() == file_of(source, DOWN).read_bytes()


# ----------------------------------------------------------------------------------------------------- bad targets


@contextmanager
def as_nobody() -> Iterator[None]:
    """Root, whom no permission stops, is somebody else for a while."""
    is_root = os.geteuid() == 0
    if is_root:
        os.seteuid(65534)
    try:
        yield
    finally:
        if is_root:
            os.seteuid(0)


@contextmanager
def file_size_limit(nbytes: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture
def public(source: Path) -> Iterator[Path]:
    """A directory that everybody may enter, with the source in it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for file in Path(shutil.copytree(source, folder / "source")).iterdir():
        file.chmod(0o644)
    yield folder
    shutil.rmtree(folder)


def test_a_read_only_place_is_refused(public: Path, run: Run) -> None:
    place = public / "place"
    place.mkdir()
    place.chmod(0o555)
    with as_nobody():
        code, said = run(public / "source", target=place / "target")
    assert code == 1 and os.listdir(place) == []
    assert _matches(r"megatron-patch convert: error: \[Errno 13\] Permission denied: '.*place/\.target\.partial'", said)


def test_a_target_below_a_file_is_refused(source: Path, tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").touch()
    code, said = run(source, target=tmp_path / "file" / "target")
    assert code == 2
    assert _matches(r".*error: .*file/target cannot be made: .*/file is a file", said)


def test_a_target_inside_of_the_source_is_refused(source: Path, run: Run) -> None:
    code, said = run(source, target=source / "target")
    assert code == 2
    assert _matches(r".*source .*source and target .*source/target must not contain one another", said)


def test_a_file_size_limit_keeps_what_is_done_for_resume(source: Path, tmp_path: Path, run: Run) -> None:
    with file_size_limit(100_000):
        code, said = run(source)
    assert code == 1 and leftovers(tmp_path / "target") == [".target.partial"]
    assert _matches(r".*\[Errno 27\] File too large; what is done so far is kept in .*: --resume goes on with it", said)
    assert run(source, "--resume")[0] == 0
    convert(source, tmp_path / "undisturbed")
    assert differences(tmp_path / "target", tmp_path / "undisturbed") == []


def test_a_disk_that_fills_up_keeps_what_is_done_for_resume(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "MEMORY", 1)
    left, pwrite = 200_000, os.pwrite

    def write(descriptor: int, data: bytes, offset: int) -> int:
        nonlocal left
        if left == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written = pwrite(descriptor, data[:left], offset)  # the last write is a short one, as on a real disk
        left -= written
        return written

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", write)
        code, said = run(source)
    assert code == 1 and leftovers(tmp_path / "target") == [".target.partial"]
    assert _matches(
        r".*\[Errno 28\] No space left on device; what is done so far is kept in .*: --resume goes on", said
    )
    report = convert(source, tmp_path / "target", resume=True)
    assert 0 < report.resumed < 27
    convert(source, tmp_path / "undisturbed")
    assert differences(tmp_path / "target", tmp_path / "undisturbed") == []


def test_too_little_free_space_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage(10**12, 10**12 - 1000, 1000))
    code, said = run(source)
    assert code == 2 and leftovers(tmp_path / "target") == []
    assert _matches(r".*error: .*target needs 0\.3 MB; .* has 0\.0 MB free", said)


def test_a_failed_replacement_leaves_the_former_target(source: Path, tmp_path: Path, run: Run) -> None:
    target = tmp_path / "target"
    convert(source, target)
    before = states(target)
    convert(target, tmp_path / "ours")
    flip(file_of(tmp_path / "ours", "model.norm.weight"), _norm(source))
    code, _ = run(tmp_path / "ours", "--overwrite")
    assert code == 2 and states(target) == before and leftovers(target) == ["target"]
    code, said = run(source)
    assert code == 2 and _matches(r".*target exists; give --overwrite to replace it, or another place", said)
