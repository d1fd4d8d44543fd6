"""`sae-ray export` and `sae-ray push`."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pytest
from click.testing import CliRunner, Result
from sae_ray.jobs.cli import main

from sae_ray.sae import load_sae, save_sae
from sae_ray.sae.formats import sae_folder
from sae_ray.steering.interventions import load_max_token
from sae_ray.store.files import Folder
from tests.sae.test_formats import make_sae, same_codes


def run(*words: str | Path) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def sae(tmp_path: Path) -> Path:
    save_sae(make_sae("topk"), Folder(tmp_path / "sae"))
    latents = pa.table({"latent": range(24), "max_token": [2.0] * 24})
    Folder(tmp_path / "sae").write_parquet("latents.parquet", latents)
    return tmp_path / "sae"


@pytest.mark.parametrize("library", ["saelens", "dictionary_learning", "sparsify", "overcomplete"])
def test_an_export_opens_again(sae, library, tmp_path):
    centred = ["--centred"] if library == "overcomplete" else []
    result = run("export", sae, "--to", library, "--out", tmp_path / "out", *centred)
    assert (result.exit_code, result.output) == (0, f"{tmp_path / 'out'}\n")
    assert same_codes(load_sae(tmp_path / "out"), load_sae(sae))
    assert load_max_token(sae_folder(tmp_path / "out")).tolist() == [2.0] * 24


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--to", "overcomplete", "--out", "{out}"], "with --centred the SAE is written"),
        (["--to", "sparsify", "--out", "{sae}"], "is not empty; choose a new folder"),
        (["--to", "sparsify", "--out", "{sae}/cfg.json"], "cfg.json is a file; choose a new folder"),
        (["--to", "sparsify", "--out", "{out}", "--centred"], "sparsify subtracts b_dec itself; leave it out"),
        (["--to", "neuronpedia", "--out", "{out}", "--centred"], "--centred is for the SAE itself"),
        (["--to", "neuronpedia", "--out", "{out}"], "does not lie in the root of a study"),
        (["--to", "prisma", "--out", "{out}"], "'prisma' is not one of 'saelens', 'dictionary_learning'"),
    ],
)
def test_what_cannot_be_exported_is_refused(sae, words, said, tmp_path):
    result = run("export", sae, *(word.format(out=tmp_path / "out", sae=sae) for word in words))
    assert result.exit_code == 2
    assert said in " ".join(result.output.split())
    assert not (tmp_path / "out").exists()


def test_a_bad_repository_is_refused(sae):
    result = run("push", sae, "saes")
    assert result.exit_code == 2
    assert "repo_id = 'saes': name it as owner/name" in result.output
