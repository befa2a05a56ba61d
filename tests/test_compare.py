"""Many evaluations side by side: order, frontiers, page, and refusals."""

import copy
import json
import types

import planted
import pytest
from planted import K, T

from sae_jax import compare as comparison
from sae_jax.cli import compare as command
from sae_jax.evals import EvaluateConfig, evaluate

SMALL = EvaluateConfig(rows=336, batch_rows=4 * T, sequences=8, batch_sequences=4)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    subject = planted.make_subject()
    store = planted.write_store(tmp_path_factory.mktemp("compare") / "store", subject)
    params = planted.random_params()
    return {
        k: evaluate(planted.make_sae(params, k=k), subject, store, config=SMALL)
        for k in (K, 2)
    }


@pytest.fixture
def folders(results, tmp_path):
    for k, result in results.items():
        folder = tmp_path / f"<k{k}>"
        folder.mkdir()
        (folder / "evaluation.json").write_text(json.dumps(result))
    return [tmp_path / f"<k{k}>" for k in results]


def _rewrite(folder, **changes):
    file = folder / "evaluation.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_rows_are_in_order_of_size_and_l0(folders, results):
    rows = comparison.compare(folders)
    assert [row.name for row in rows] == ["<k2>", f"<k{K}>"]
    names = comparison.list_names(rows)
    assert names[:2] == ["l0", "nmse_raw"] and "delta_ce" in names
    for row, k in zip(rows, (2, K), strict=True):
        want = results[k]["metrics"]["reconstruction"]["nmse_raw"]
        assert row.figures["nmse_raw"] == want
    text = comparison.format_rows(rows)
    first, *lines = text.splitlines()
    assert first.split() == ["SAE", "latents", *names]
    assert [line.split()[0] for line in lines] == ["<k2>", f"<k{K}>"]


def test_the_page_and_its_data(folders, results, tmp_path):
    rows = comparison.compare(folders, tmp_path / "new" / "out")
    page = (tmp_path / "new" / "out" / "compare.html").read_text()
    assert "&lt;k2&gt;" in page and "<k2>" not in page
    names = comparison.list_names(rows)
    assert page.count("<svg") == len(names) - 1  # every figure over L0
    data = json.loads((tmp_path / "new" / "out" / "compare.json").read_text())
    line = data["frontiers"]["nmse_raw"]["points"]["topk, 32"]
    metric = {k: result["metrics"]["reconstruction"] for k, result in results.items()}
    assert line == [
        [metric[k]["l0"]["value"], metric[k]["nmse_raw"]["value"]] for k in (2, K)
    ]


def test_each_architecture_has_a_frontier_of_its_own(folders, tmp_path):
    _rewrite(folders[1], architecture="jumprelu")
    comparison.compare(folders, tmp_path)
    data = json.loads((tmp_path / "compare.json").read_text())
    assert data["frontiers"]["nmse_raw"]["points"].keys() == {
        "topk, 32",
        "jumprelu, 32",
    }


def test_folders_of_one_name_are_told_apart(folders, tmp_path):
    twin = tmp_path / "other" / "<k2>"
    twin.mkdir(parents=True)
    original = tmp_path / "<k2>"
    (twin / "evaluation.json").write_text((original / "evaluation.json").read_text())
    rows = comparison.compare([original, twin])
    assert {row.name for row in rows} == {str(original), str(twin)}


def test_what_not_all_have_is_left_blank(folders):
    metrics = copy.deepcopy(json.loads((folders[0] / "evaluation.json").read_text()))
    del metrics["metrics"]["downstream"]
    _rewrite(folders[0], metrics=metrics["metrics"])
    rows = comparison.compare(folders)
    lines = comparison.format_rows(rows).splitlines()
    assert "delta_ce" in lines[0] and len(lines[2]) < len(lines[1])


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"seed": 3}, "evaluated with seed 3, .* with 0: evaluate them alike"),
        ({"site": "resid_post.9"}, "with site resid_post.9"),
        ({"corpus": "1"}, "with corpus 1, .* with 0"),
        ({"layout": {"bos": "none"}}, "with layout {'bos': 'none'}, .*'document'"),
        ({"dtype": "int8"}, "with dtype int8, .* with bfloat16"),
        ({"subject": {"name": "other"}}, "with subject {'name': 'other'}"),
        (
            {"settings": {"reconstruction": {"rows": 1}}},
            "reconstruction was measured with rows = 1 in .*, with 336 in .*alike",
        ),
        ({"metrics": {}}, "not an evaluation with the suite core"),
        ({"settings": {"rows": 336}}, "not an evaluation with the suite core"),
    ],
)
def test_what_cannot_be_compared_is_refused(folders, changes, match):
    _rewrite(folders[1], **changes)
    with pytest.raises(ValueError, match=match) as error:
        comparison.compare(folders)
    assert "\n" not in str(error.value)


def test_a_folder_without_an_evaluation_is_refused(folders, tmp_path):
    with pytest.raises(FileNotFoundError, match="run sae-jax evaluate .*empty first"):
        comparison.compare([*folders, tmp_path / "empty"])


def test_the_command_prints_the_table(folders, capsys, monkeypatch):
    monkeypatch.setattr(command, "_OUT", types.SimpleNamespace(value=None))
    command.main(["compare", *map(str, folders)])
    assert capsys.readouterr().out.startswith("SAE")
    with pytest.raises(command.Misuse):
        command.main(["compare"])
