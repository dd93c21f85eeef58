"""The statements on what forms can represent hold, and one that is wrong is found out."""

from __future__ import annotations

import json

import pytest
import torch

import lrcompress
from lrcompress.cli.main import run
from lrcompress.inspect import theory
from lrcompress.inspect.theory import Case, Page, Statement, hadamard, khatri_rao, svd
from lrcompress.inspect.theory._statement import dimension, equal, jacobian_rank, random, rank_of

GAUGES = ("pivoted", "pivoted_spatial", "pivoted_tucker")
EVERY = [(page.name, i) for page in theory.pages("all") for i in range(len(page.statements))]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize(("name", "i"), EVERY, ids=[f"{n}-{i}" for n, i in EVERY])
def test_the_statement_holds(name, i, seed):
    (page,) = theory.pages(name)
    checked = page.statements[i].check(seed)
    assert checked.cases and checked.holds, [c for c in checked.cases if not c.holds]


def test_every_form_that_users_ask_for_has_a_page():
    wanted = {"hadamard", "kronecker", "khatri_rao", "svd", "lokr", "loha", "tensor_train", *GAUGES}
    assert wanted <= set(theory.names())
    assert all(len(page.statements) >= 3 for page in theory.pages("all"))


def low_rank(count):
    return dimension(
        "wrong", "dim", [(5, 7, 2), (6, 6, 3)],
        shapes=lambda s: [(s[0], s[2]), (s[2], s[1])], build=lambda u, v: u @ v, count=count, text=str,
    )  # fmt: skip


def product(count):
    return dimension(
        "wrong", "dim", [(12, 12, 2, 2)], shapes=hadamard.shapes, build=hadamard.build, count=count, text=str
    )


def rank_at_least(size, g):
    """The bound without its condition: zero columns are drawn as they come."""
    i, j, n = size
    for _ in range(500):
        a, b = (torch.randint(-1, 2, (m, n), generator=g).double() for m in (i, j))
        if rank_of(khatri_rao.khatri_rao(a, b)) < max(rank_of(a), rank_of(b)):
            return Case(str(size), "never below", "below", False)
    return Case(str(size), "never below", "never", True)


WRONG = {
    "numbers are taken for dimensions": low_rank(lambda s: s[2] * (s[0] + s[1])),
    "one gauge too many": low_rank(lambda s: s[2] * (s[0] + s[1] - s[2]) - 1),
    "the common scaling forgotten": product(lambda s: (s[2] + s[3]) * (s[0] + s[1]) - s[2] ** 2 - s[3] ** 2),
    "one scaling of rows and columns too few": product(lambda s: hadamard.count(s) + 1),
    "every matrix of rank r²": product(lambda s: hadamard.of_rank(s[0], s[1], s[2] * s[3])),
    "ranks add": Statement(
        "wrong", "rank = r₁ + r₂", [(12, 15, 3, 3)],
        lambda s, g: equal(str(s), s[2] + s[3], rank_of(hadamard.build(*(random(g, *x) for x in hadamard.shapes(s))))),
    ),
    "Khatri-Rao with zero columns": Statement("wrong", "rank(A⊙B) ≥ max", [(2, 2, 2)], rank_at_least),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_statement_is_found_out(name):
    assert not WRONG[name].check(0).holds


def test_one_wrong_case_is_enough():
    statement = Statement(
        "wrong for one size", "n < 3", [(1,), (2,), (3,)], lambda s, g: Case(str(s), "< 3", str(s[0]), s[0] < 3)
    )
    checked = statement.check(0)
    assert [c.holds for c in checked.cases] == [True, True, False] and not checked.holds


def test_broken_code_is_found_out(monkeypatch):
    """Statements are checked on the forms themselves: where one errs, its page says so."""
    from lrcompress.factorize import svd as form

    exact = form.decompose
    monkeypatch.setattr(form, "decompose", lambda w, r, s=None: exact(w, max(r - 1, 1), s))
    assert not all(s.check(0).holds for s in svd.STATEMENTS)


def test_a_wrong_page_is_exit_5_and_says_which(monkeypatch, capsys):
    wrong = Page("svd", svd.FORMULA, (*svd.STATEMENTS, WRONG["numbers are taken for dimensions"]))
    monkeypatch.setattr(theory, "pages", lambda name: [wrong])
    assert run(["inspect", "--theory", "svd", "-q"]) == 5
    text = capsys.readouterr().out
    assert (
        "DOES NOT HOLD  wrong" in text
        and f"{len(wrong.statements) - 1} of {len(wrong.statements)} statements hold" in text
    )
    assert run(["inspect", "--theory", "svd", "-q", "--json"]) == 5
    answer = json.loads(capsys.readouterr().out)
    assert (
        not answer["ok"]
        and not answer["holds"]
        and [s["holds"] for s in answer["forms"][0]["statements"]].count(False) == 1
    )


def test_the_page_shows_words_formula_sizes_and_findings(capsys):
    assert run(["inspect", "--theory", "loha", "-q"]) == 0
    text = capsys.readouterr().out
    for part in (
        "LoHa_r ⊂ LoRA_{r²}",
        "5×5, r₁=2, r₂=2",
        "23 against 24",
        "expected",
        "found",
        "statements hold (float64, seed 0",
    ):
        assert part in text
    assert "DOES NOT HOLD" not in text


def test_the_same_seed_draws_the_same():
    one, two, other = (lrcompress.inspect(theory="svd", seed=seed).data for seed in (0, 0, 1))
    assert one == two != other and other["holds"]
    assert one["forms"] == [f for f in lrcompress.inspect(theory="all").data["forms"] if f["form"] == "svd"]


def test_a_dimension_is_the_rank_of_the_jacobian():
    g = torch.Generator().manual_seed(0)
    plane = jacobian_rank(lambda x: torch.stack([x.sum(), 2 * x.sum(), x[0]]), [random(g, 4)])
    sphere = jacobian_rank(lambda x: x / x.norm(), [random(g, 5)])
    assert (plane, sphere) == (2, 4)
