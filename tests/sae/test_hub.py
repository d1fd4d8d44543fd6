"""SAEs to the hub and back, by huggingface_hub itself, and what repositories of others look like."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch

from sae_ray.encoders.hub import hub_problem
from sae_ray.errors import UsageError
from sae_ray.sae import load_sae, save_sae
from sae_ray.sae.figures import figures as figures_of
from sae_ray.sae.formats.hub_names import HubName
from sae_ray.steering.interventions import load_max_token
from sae_ray.store.files import Folder
from sae_ray.study.root import remember
from sae_ray.study.summary import summarise
from tests.hub_server import TOKEN, Hub, Repository, serving
from tests.sae.test_exchange import GOLDEN as FORMS
from tests.sae.test_exchange import visaebench
from tests.sae.test_formats import GOLDEN, inputs, make_sae, same_codes, theirs


@pytest.fixture(scope="module")
def server() -> Iterator[Hub]:
    with serving() as hub:
        yield hub


@pytest.fixture
def hub(server: Hub, tmp_path: Path, monkeypatch) -> Iterator[Hub]:
    """An empty hub, to which this process is logged in; nothing is cached yet."""
    from huggingface_hub import close_session, constants

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    close_session()  # which may have been opened with a proxy
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    server.repositories.clear()
    server.objects.clear()
    server.requests.clear()
    hub_problem.cache_clear()
    yield server
    hub_problem.cache_clear()


def put(hub: Hub, repo: str, folder: Path, inside: str = "") -> str:
    """A commit of all files of a folder. Returns its id."""
    repository = hub.repositories.setdefault(repo, Repository())
    prefix = f"{inside}/" if inside else ""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return repository.commit("main", {prefix + name: data for name, data in files.items()})


def test_several_saes_of_a_repository_come_back_and_open_in_sae_lens(hub: Hub):
    import sae_lens

    made = {"a/first": make_sae("batch_topk"), "second": make_sae("topk", seed=1), "third": make_sae("guided_topk")}
    for folder, sae in made.items():
        address = sae.push_to_hub("me/saes", folder, license="apache-2.0" if folder == "second" else None)
        assert address == f"{hub.url}/me/saes/commit/{hub.repositories['me/saes'].refs['main']}"
    for folder, sae in made.items():
        opened = load_sae(f"hf://me/saes/{folder}")
        assert opened.architecture == sae.architecture
        assert same_codes(opened, sae)
    from_there = sae_lens.SAE.from_pretrained("me/saes", "a/first")
    with torch.no_grad():
        torch.testing.assert_close(from_there.encode(inputs()), made["a/first"].encode(inputs()))
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    card = tree["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\nlibrary_name: saelens\n")
    assert all(f"| `{folder}` |" in card for folder in made)
    assert 'load_sae("hf://me/saes/a/first")' in card
    assert 'SAE.from_pretrained("me/saes", "a/first")' in card
    assert "SAELens has no architecture with the codes of `third`: use sae-ray." in card
    assert json.loads(tree["second/figures.json"]) == {
        "architecture": "topk", "d_in": 8, "d_sae": 24, "k": 3, "sae_lens": "topk"
    }  # fmt: skip
    with pytest.raises(
        UsageError, match=r"hf://me/saes is not an SAE, but the folder of 3: a/first, second, third; name"
    ):
        load_sae("me/saes")


def test_a_revision_is_opened_and_kept_in_the_cache(hub: Hub, monkeypatch):
    old, new = make_sae("topk"), make_sae("topk", seed=5)
    old.push_to_hub("me/saes", "layer22")
    repository = hub.repositories["me/saes"]
    commit = repository.refs["v1.0"] = repository.refs["refs/pr/1"] = repository.refs["main"]
    new.push_to_hub("me/saes", "layer22")
    assert same_codes(load_sae("me/saes/layer22"), new)
    for revision in ("v1.0", commit, "refs/pr/1"):
        assert same_codes(load_sae(f"hf://me/saes/layer22@{revision}"), old)
    assert same_codes(load_sae("hf://me/saes@v1.0/layer22/cfg.json"), old)
    with pytest.raises(UsageError, match=r"hf://me/saes/layer22@v2 is neither .* cannot be loaded"):
        load_sae("hf://me/saes/layer22@v2")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub_problem.cache_clear()
    hub.requests.clear()
    assert same_codes(load_sae("me/saes/layer22"), new)
    assert same_codes(load_sae("me/saes/layer22@v1.0"), old)
    assert hub.requests == []


def test_an_sae_at_the_top_of_its_repository(hub: Hub):
    sae = make_sae("relu")
    sae.push_to_hub("me/one")
    assert same_codes(load_sae("hf://me/one"), sae)
    again = load_sae("me/one")
    again.push_to_hub("me/one")  # nothing has changed
    tree = hub.repositories["me/one"].commits[hub.repositories["me/one"].refs["main"]]
    assert sorted(tree) == [".gitattributes", "README.md", "cfg.json", "figures.json", "sae_weights.safetensors"]
    assert 'SAE.load_from_disk(snapshot_download("me/one"))' in tree["README.md"].decode()


def test_tables_beside_an_sae_go_with_it(hub: Hub, tmp_path: Path):
    folder = Folder(tmp_path / "sae")
    save_sae(make_sae("topk"), folder)
    for name in ("latents.parquet", "metrics.parquet", "notes.parquet"):
        folder.write_parquet(name, pa.table({"latent": [0], "max_token": [2.0]}))
    load_sae(folder).push_to_hub("me/saes", "layer22")
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    assert sorted(name for name in tree if name.endswith(".parquet")) == [
        "layer22/latents.parquet",
        "layer22/metrics.parquet",
    ]
    opened = load_sae("hf://me/saes/layer22")
    assert opened.source is not None
    assert load_max_token(opened.source).tolist() == [2.0]
    opened.push_to_hub("me/copies", "layer22")
    copied = hub.repositories["me/copies"].commits[hub.repositories["me/copies"].refs["main"]]
    assert {"layer22/latents.parquet", "layer22/metrics.parquet"} <= copied.keys()


def test_a_card_that_others_wrote_is_left_alone(hub: Hub):
    hub.repositories["me/saes"] = Repository()
    hub.repositories["me/saes"].commit("main", {"README.md": b"---\nlicense: mit\n---\n# Mine\n"})
    make_sae("topk").push_to_hub("me/saes", "layer22")
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    assert tree["README.md"].endswith(b"# Mine\n")
    assert b"| `layer22` |" in tree["layer22/README.md"]
    # One that has only a licence, as the hub's own page for new repositories writes it, is none.
    others = {"README.md": b"---\nlicense: mit\n---\n", "a/figures.json": b"[1]", "b/figures.json": b"no JSON"}
    hub.repositories["me/saes"].commit("main", others)
    make_sae("topk").push_to_hub("me/saes", "layer22")
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    assert tree["README.md"].startswith(b"---\nlicense: mit\n")
    assert b"| `layer22` |" in tree["README.md"]


def test_the_card_tells_what_a_study_found(hub: Hub, small_study: Path, plan_small_study, tmp_path: Path):
    shutil.copytree(small_study, tmp_path / "study")
    plan = plan_small_study(tmp_path / "study")
    remember(plan)
    train = next(one for one in plan.trains if one.grid_cell.cell.architecture != "topk")
    sae = load_sae(train.step.folder)
    sae.push_to_hub("me/saes")
    name = train.grid_cell.name
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    figures = json.loads(tree[f"{name}/figures.json"])
    fidelity = next(one for one in plan.evaluations if one.sae is train).step.record()
    assert fidelity is not None
    assert figures["fidelity"] == fidelity["counts"]
    row = next(row for row in summarise(plan) if row.name == name)
    assert figures["monosemanticity"]["mean"] == pytest.approx(row.mean_ms)
    assert figures["monosemanticity"]["neurons"] == row.n_scored
    assert figures["encoder"] == {"model": Path(plan.encoder.model).name, "revision": plan.encoder.revision}
    assert figures["data"] == Path(plan.study.images.train.path).name
    assert str(tmp_path) not in json.dumps(figures)
    card = tree["README.md"].decode()
    assert f"| `{name}` | {train.grid_cell.site.name} | {train.grid_cell.cell.architecture} |" in card
    assert f"mean {row.mean_ms:.3f}, best {row.best_ms:.3f}, of the {row.n_scored} latents" in card
    assert f"L0 {row.l0:.4f}, R² {row.r2:.4f}" in card
    # An encoder on the hub is named as there, with its licence; a directory that is named alike is not on the hub.
    memory = plan.root.read_json("study.json")
    for model in ("encoder", "judge"):
        memory["survey"]["models"][model]["model"] = f"models/{model}"
    plan.root.write_json("study.json", memory)
    found = figures_of(sae)
    assert (found["encoder"]["model"], found["monosemanticity"]["judge"]) == ("encoder", "judge")
    hub.repositories["someone/clip"] = Repository()
    commit = hub.repositories["someone/clip"].refs["main"]
    activations = train.activations.step.folder
    record = activations.read_bytes("step.json").decode()
    activations.write_bytes("step.json", record.replace(plan.encoder.revision, commit).encode())
    memory["survey"]["models"]["encoder"] |= {"model": "someone/clip", "revision": commit}
    memory["survey"]["images"]["train"]["manifest_digest"] = "of other images"  # those of the root's last study
    plan.root.write_json("study.json", memory)
    sae.push_to_hub("me/saes")
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    figures = json.loads(tree[f"{name}/figures.json"])
    assert figures["encoder"]["license"] == "mit"
    assert "data" not in figures
    assert "- Licence of the encoder: mit." in tree["README.md"].decode()
    assert tree["README.md"].startswith(b"---\nlibrary_name: saelens\nbase_model:\n- someone/clip\n")
    # It stays known of a copy in another repository, but does not hold for other weights.
    load_sae(f"hf://me/saes/{name}").push_to_hub("me/copies", "copy")
    tree = hub.repositories["me/copies"].commits[hub.repositories["me/copies"].refs["main"]]
    assert json.loads(tree["copy/figures.json"])["fidelity"] == figures["fidelity"]
    dataclasses.replace(sae, b_dec=sae.b_dec + 1).push_to_hub("me/saes", "changed")
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    assert not {"fidelity", "monosemanticity", "encoder"} & json.loads(tree["changed/figures.json"]).keys()


def test_repositories_of_others_open(hub: Hub, tmp_path: Path):
    """SAELens's releases, the reference's checkpoints, dictionary_learning, sparsify and ViSAEBench."""
    place = tmp_path / "place"
    saes = {
        "blocks.8.hook_resid_pre": theirs(place, "relu"),
        "layer_11/width_2k": theirs(tmp_path / "other", "topk", k=3),
    }
    for inside, folder in saes.items():
        put(hub, "lens/release", folder, inside)
        assert same_codes(load_sae(f"hf://lens/release/{inside}"), load_sae(folder))
    paper = tmp_path / "paper" / "trainer_0"
    (paper / "checkpoints").mkdir(parents=True)
    shutil.copy(GOLDEN / "matryoshka.ae.pt", paper / "ae.pt")
    shutil.copy(GOLDEN / "batch_top_k.ae.pt", paper / "checkpoints" / "ae_10000.pt")
    (paper / "config.json").write_text(json.dumps({"trainer": {"dict_class": "AutoEncoderTopK", "k": 3}}))
    put(hub, "paper/saes", paper.parent, "clip_vit_l_14/layer_22")
    inside = "paper/saes/clip_vit_l_14/layer_22/trainer_0"
    with pytest.raises(UsageError, match="does not make a AutoEncoderTopK"):
        load_sae(inside)
    assert load_sae(f"{inside}/checkpoints/ae_10000.pt").architecture == "topk"
    (paper / "config.json").write_text("{}")
    put(hub, "paper/saes", paper.parent, "clip_vit_l_14/layer_22")
    assert load_sae(inside).architecture == "matryoshka_batch_topk"
    with pytest.raises(
        UsageError, match="the folder of 1: clip_vit_l_14/layer_22/trainer_0; name one, such as hf://pa"
    ):
        load_sae("hf://paper/saes")
    for form in ("sparsify", "dictionary_learning-JumpReluAutoEncoder", "overcomplete-jumprelu"):
        put(hub, "others/saes", FORMS / form, f"h.3/{form}")
        assert same_codes(load_sae(f"hf://others/saes/h.3/{form}"), load_sae(FORMS / form))
    bench = tmp_path / "bench"
    bench.mkdir()
    visaebench(bench, "batchtopk", k=3, threshold=0.5)
    put(hub, "visaebench/clip", bench, "batchtopk_16x_k128")
    assert same_codes(load_sae("visaebench/clip/batchtopk_16x_k128"), load_sae(bench))


def test_what_a_repository_lacks_is_said_without_downloading_it(hub: Hub, tmp_path: Path):
    scope = tmp_path / "scope"
    scope.mkdir()
    (scope / "params.npz").write_bytes(b"large")
    put(hub, "google/scope", scope, "layer_12/width_16k")
    with pytest.raises(UsageError, match="Gemma Scope"):
        load_sae("hf://google/scope/layer_12/width_16k")
    with pytest.raises(UsageError, match="google/scope on the Hugging Face hub has no SAE at layer_13"):
        load_sae("google/scope/layer_13")
    assert not any("params.npz" in request for request in hub.requests)
    with pytest.raises(UsageError, match="nobody/saes on the Hugging Face hub cannot be loaded"):
        load_sae("hf://nobody/saes")


def test_whoever_may_not_write_is_told_how_to_log_in(hub: Hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    with pytest.raises(UsageError, match=r"me/saes cannot be written: .*\(401\); log in with `hf auth login`"):
        make_sae("topk").push_to_hub("me/saes", "a")


@pytest.mark.parametrize(
    ("repo", "folder", "said"),
    [
        ("saes", None, "repo_id = 'saes': name it as owner/name"),
        ("me/saes/a", None, "repo_id = 'me/saes/a'"),
        ("me/a--b", None, "repo_id = 'me/a--b': Cannot have -- or"),
        ("me/x.git", None, "repo_id = 'me/x.git': "),
        ("é/b", None, "repo_id = 'é/b': "),
        ("a/..", None, r"repo_id = 'a/\.\.': "),
        ("me/saes", "../a", r"folder = '\.\./a': make it of letters"),
        ("me/saes", "a b", "folder = 'a b'"),
    ],
)
def test_bad_names_are_refused(repo, folder, said):
    with pytest.raises(UsageError, match=said):
        make_sae("topk").push_to_hub(repo, folder)


def test_without_a_connection_it_fails_at_once(hub: Hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UsageError, match=r"me/saes cannot be written: http://127\.0\.0\.1:9 cannot be reached: .*; push"
    ):
        make_sae("topk").push_to_hub("me/saes")
    with pytest.raises(UsageError, match=r"hf://me/saes/layer22 is neither (.|\n)*fill the cache"):
        load_sae("hf://me/saes/layer22")
    assert constants.HF_HUB_OFFLINE  # so that nothing is tried once more for every file


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://a/b", HubName("a/b", "", None)),
        ("a/b/c/d.pt", HubName("a/b", "c/d.pt", None)),
        ("hf://a/b/c@v1", HubName("a/b", "c", "v1")),
        ("hf://a/b@v1/c/d", HubName("a/b", "c/d", "v1")),
        ("a/b@refs%2Fpr%2F1/c", HubName("a/b", "c", "refs/pr/1")),
        ("hf://a/b/c@refs/pr/1", HubName("a/b", "c", "refs/pr/1")),
        ("a.b/c-d@0123456", HubName("a.b/c-d", "", "0123456")),
    ],
)
def test_names_on_the_hub(text, name):
    assert HubName.parse(text) == name
    assert HubName.parse(str(name)) == name


@pytest.mark.parametrize("text", ["hf://a", "hf://a/b@v1/c@v2", "a b/c", "hf://a/b/c@"])
def test_what_is_no_name_is_refused(text):
    with pytest.raises(UsageError, match="is no place on the Hugging Face hub"):
        HubName.parse(text)


@pytest.mark.parametrize("text", ["https://huggingface.co/a/b", "HF://a/b", "hf:a/b"])
def test_an_address_of_another_form_is_answered_with_the_form(text):
    with pytest.raises(UsageError, match=r"is not how an SAE is named; .*hf://owner/name/folder@revision"):
        load_sae(text)


def test_a_folder_is_saved_as_it_was(tmp_path):
    """What was opened knows where, and what is made of it can be saved."""
    save_sae(make_sae("topk"), Folder(tmp_path))
    opened = load_sae(tmp_path)
    assert opened.source == Folder(tmp_path)
    assert opened.to(dtype=torch.float64).source == opened.source


def test_the_pages_example_runs(hub: Hub):
    page = (Path(__file__).parents[2] / "docs" / "sharing.md").read_text(encoding="utf-8")
    [example] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    scope: dict = {}
    exec(example, scope)
    assert scope["opened"].d_sae == 128
    tree = hub.repositories["me/saes"].commits[hub.repositories["me/saes"].refs["main"]]
    assert {"layer22/latents.parquet", "layer22/metrics.parquet"} <= tree.keys()
