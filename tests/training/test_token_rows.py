"""A task's tokens in a file: the rows that its codec gives, read by the next attempt, gone with the task's end."""

from dataclasses import replace

import pytest
from short_runs import settings, task_files
from trainer_kit import load, rows

from aimmerging import ContinualTrainer
from aimmerging.config import resolve
from aimmerging.run import learning
from aimmerging.run.start import run
from aimmerging.training import token_rows
from aimmerging.training.encoding import Truncation
from aimmerging.training.length_batches import length

COUNT = 2 * token_rows._CHUNK + 7


@pytest.fixture(params=["tiny_t5", "tiny_llama"])
def codec(request):
    """One that cuts some prompts and most answers."""
    return replace(load(request.getfixturevalue(request.param))[1], max_input_tokens=20, max_output_tokens=2)


def test_rows_lengths_and_cuts_are_the_codecs(codec, tmp_path):
    texts, count = rows(COUNT, 0), Truncation()
    wanted = codec.examples(texts, count)
    token_rows.write(tmp_path, codec, texts)
    found = token_rows.read(tmp_path, codec)
    assert list(found) == wanted
    assert found[3:-3:500] == wanted[3:-3:500]
    assert found.lengths == [length(row) for row in wanted]
    assert found.truncation == count
    assert min(count.inputs, count.outputs) > 0


def test_rows_stay_on_disk(codec, tmp_path):
    import pyarrow as pa

    token_rows.write(tmp_path, codec, rows(COUNT, 0))
    before = pa.total_allocated_bytes()
    found = token_rows.read(tmp_path, codec)
    assert found.table.nbytes > 4 * sum(map(sum, found.lengths)) / 2
    assert pa.total_allocated_bytes() - before < found.table.nbytes / 10


@pytest.mark.parametrize("change", [{"max_input_tokens": 21}, {"max_output_tokens": 3}])
def test_tokens_of_another_codec_are_not_read(codec, tmp_path, change):
    token_rows.write(tmp_path, codec, rows(3, 0))
    assert token_rows.read(tmp_path, replace(codec, **change)) is None


def test_tokens_of_another_tokenizer_are_not_read(codec, tmp_path):
    token_rows.write(tmp_path, codec, rows(3, 0))
    codec.tokenizer.add_tokens(["movie"])
    assert token_rows.read(tmp_path, codec) is None


class PowerCut(BaseException):
    """Ends a run as nothing catches it."""


@pytest.mark.parametrize("then", ["whole", "damaged"])
def test_a_run_that_goes_on_reads_its_tokens(tiny_llama, tmp_path, monkeypatch, then):
    task_files(tmp_path, "alpha")
    config, wrote = resolve(settings(tiny_llama, ("alpha",))), []

    def write(folder, codec, texts):
        wrote.append(len(texts))
        real(folder, codec, texts)

    def cut(*args, **kwargs):
        raise PowerCut

    real = token_rows.write
    monkeypatch.setattr(learning.token_rows, "write", write)
    with monkeypatch.context() as patch:
        patch.setattr(ContinualTrainer, "train", cut)
        with pytest.raises(PowerCut):
            run(config, tmp_path / "cut", base=tmp_path)
    file = tmp_path / "cut/working/01-alpha/tokens/rows.arrow"
    assert file.is_file()
    if then == "damaged":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    run(config, tmp_path / "cut", base=tmp_path)
    assert wrote == ([16] if then == "whole" else [16, 16])
    run(config, tmp_path / "straight", base=tmp_path)
    one, other = ((tmp_path / name / "stages/01-alpha/adapter") for name in ("cut", "straight"))
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()
    assert not list(tmp_path.rglob("rows.arrow"))
