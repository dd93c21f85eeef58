"""From the records of a run to the facts of its report, and the sentence of verdict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

ORIGINAL, INT8, SHIPPED, EQUAL = "original fp32", "dense int8", "factorized + adapter", "factorized, equal bytes"
#: A choice that is this much larger and better in accuracy is the better one.
NEAR = 1.25


def gather(run: Mapping[str, Any], records: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the report: one object that holds every number of the tables and plots."""
    result = {name: r["result"] for name, r in records.items()}
    factorize, validate, published = result["factorize"], result["validate"], result["publish"]
    trained = {name: r.get("trained") or r for name, r in result.items()}
    training = {name: r["train_seconds"] for name, r in trained.items() if r.get("train_seconds") is not None}
    recipe = run["recipe"]
    return {
        "schema": 1,
        "recipe": run["name"],
        "about": recipe["about"],
        "trained_here": recipe["model"]["train"] is not None,
        "metric": recipe["metric"],
        "rows": validate["rows"],
        "parity": validate["parity"],
        "device_rows": published["device_rows"],
        "updates": [_update(recipe, release) for release in published["releases"]],
        "shifts": published["shifts"],
        "model_bytes": published["model_bytes"],
        "fleet": published["fleet"],
        "training_seconds": training,
        "seconds": sum(r["seconds"] for r in records.values()),
        "stage_seconds": {name: r["seconds"] for name, r in records.items()},
        "params_before": factorize["params_before"],
        "params_after": factorize["params_after"],
        "layers": factorize["layers"],
        "spectra": factorize["spectra"],
        "histories": {n: r["loss"]["history"] for n, r in result.items() if isinstance(r.get("loss"), dict)},
        "hashes": {s["name"]: s["digest"] for s in run["stages"] if s["digest"]},
        "versions": run["versions"],
        "seed": run["seed"],
        "threads": run["threads"],
        "verdict": verdict(validate["rows"], recipe["metric"]["max_drop"]),
    }


def _update(recipe: Mapping[str, Any], release: Mapping[str, Any]) -> dict[str, Any]:
    about = next(
        (u["about"] for u in recipe["updates"] if u["name"] == release["name"]), "wins back what factorization lost"
    )
    return {**release, "about": about}


def keeps(row: Mapping[str, Any], max_drop: float) -> bool:
    """Tell whether a row stays within the drop that the recipe allows, two standard errors given."""
    return bool(row["drop"] <= max_drop + 2 * row["drop_stderr"])


def verdict(rows: list[dict[str, Any]], max_drop: float) -> str:
    """Return one honest sentence: the smallest row that keeps the accuracy, dense int8 always among the candidates."""
    named = {r["name"]: r for r in rows}
    original, int8 = named[ORIGINAL], named[INT8]
    good = [r for r in rows if r["name"] != ORIGINAL and keeps(r, max_drop)]
    if not good:
        return f"Nothing here keeps the {original['metric']} within {max_drop:g} of the original: use the original."
    best = min(good, key=lambda r: (r["bytes"], r["drop"]))
    if best is int8 or (
        keeps(int8, max_drop) and int8["drop"] < best["drop"] and int8["bytes"] <= NEAR * best["bytes"]
    ):
        rival = min(
            (r for r in rows if r["name"].startswith("factorized")), key=lambda r: abs(r["bytes"] - int8["bytes"])
        )
        return (
            f"Dense int8 is the better choice for this network: {_facts(int8)}, against {_facts(rival)} for "
            f"{rival['name']}; what the factorized form adds is a small update path{_equal(named)}."
        )
    caution = "" if keeps(int8, max_drop) else " and loses more than allowed"
    kept = f"keeps the {original['metric']} within {max_drop:g}, two standard errors given,"
    choice = f"{best['name']}: {_facts(best)}; dense int8 takes {_facts(int8)}{caution}"
    return f"The smallest choice that {kept} is {choice}{_equal(named)}."


def _equal(named: Mapping[str, Mapping[str, Any]]) -> str:
    """Say what the adapter's bytes are worth when they are spent on higher ranks instead."""
    shipped, equal = named.get(SHIPPED), named.get(EQUAL)
    if equal is None or shipped is None:
        return ""
    return f"; at equal bytes the adapter gives {_value(shipped)} and a higher rank {_value(equal)}"


def _facts(row: Mapping[str, Any]) -> str:
    return f"{row['bytes'] / 1000:,.1f} kB, {_value(row)}, {row['p50_ms']:.2f} ms"


def _value(row: Mapping[str, Any]) -> str:
    return f"{100 * row['value']:.1f} %" if row["metric"] in ("accuracy", "top5") else f"{row['value']:.4f}"
